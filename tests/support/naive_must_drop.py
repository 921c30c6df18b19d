"""MustDrop with loops in float64: merging before the language model, stages, what is generated."""

import math

import torch
import torch.nn.functional as F

from tests.support import vlm_models as m
from tests.support.vlm_prompts import NEW
from tests.vlm.test_inside import turned
from vistoken.models.llava import find_language
from vistoken.vlm.layout import layout_of


def seen_by_tower(model, inputs):
    """Whole features of every image, layer 0's output and the last class row, float64."""
    tower, found = model.model.vision_tower, {}
    handle = tower.encoder.layers[0].register_forward_hook(
        lambda _, __, out: found.update(first=(out[0] if isinstance(out, tuple) else out)[:, 1:])
    )
    attn = tower.encoder.layers[-1].self_attn
    taps = [
        part.register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
        for name, part in (("q", attn.q_proj), ("k", attn.k_proj))
    ]
    names = ("pixel_values", "image_sizes")
    given = {n: inputs[n] for n in names if n in inputs}
    given["pixel_values"] = given["pixel_values"].double()
    features = list(model.model.get_image_features(**given).pooler_output)
    for tap in (handle, *taps):
        tap.remove()
    q, k = (found[n].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for n in "qk")
    maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return features, found["first"], maps[:, :, 0, 1:].mean(1)


def merge_by_hand(method, layout, features, first, row):
    """(places, features, fixed places) of one image, with loops."""
    source, side = layout.source.tolist(), layout.side[0]
    place_of = {raw: place for place, raw in enumerate(source) if raw >= 0}
    x, scored = first.reshape(-1, first.shape[-1]), []
    for part in range(len(layout.sizes)):
        for top in range(0, side - 2, 3):
            for left in range(0, side - 2, 3):
                cells = [
                    part * side * side + r * side + c
                    for r in range(top, top + 3)
                    for c in range(left, left + 3)
                ]
                if all(cell in place_of for cell in cells):
                    pairs = torch.cartesian_prod(*[torch.tensor(cells)] * 2)
                    one, two = x[pairs[pairs[:, 0] != pairs[:, 1]]].unbind(1)
                    scored.append((float(F.cosine_similarity(one, two).mean()), cells))
    scored.sort(key=lambda pair: -pair[0])
    if method.by_threshold:
        chosen = [cells for rho, cells in scored if rho >= method.similarity]
    else:
        chosen = [cells for _, cells in scored][: int(method.merged * layout.candidates / 8 + 1e-9)]
    features, flat = features.clone(), row.flatten().clone()
    gone = set()
    for cells in chosen:
        places = [place_of[cell] for cell in cells]
        features[places[4]] = features[places].mean(0)
        flat[cells[4]] = flat[cells].mean()
        gone |= set(places) - {places[4]}
    keep = [
        p
        for p in range(layout.tokens)
        if p not in gone and (source[p] >= 0 or method.newlines == "all")
    ]
    real = [p for p in keep if source[p] >= 0]
    real.sort(key=lambda p: -float(flat[source[p]]))
    return keep, features[keep], set(real[: math.ceil(method.fixed * len(real) - 1e-9)])


def short_prompt(model, method, ids, sizes, features, first, rows):
    """Embeddings, positions, image flags and fixed flags of one row, cut by hand; V of the row."""
    table = model.get_input_embeddings().weight
    embeds, places, image, fixed, number, part = [], [], [], [], -1, 0
    host, before, kept, whole = find_language(model), None, {}, 0
    for position, token in enumerate(ids):
        if token == m.IMAGE:
            if before != m.IMAGE:
                number, at = number + 1, 0
                layout = layout_of(host, len(features[number]), sizes[number], whole=False)
                parts = slice(part, part + len(layout.sizes))
                keep, values, stay = merge_by_hand(
                    method, layout, features[number], first[parts], rows[parts]
                )
                part, whole = parts.stop, whole + layout.tokens
                kept = dict(zip(keep, values, strict=True))
            if at in kept:
                embeds.append(kept[at])
                fixed.append(at in stay)
                image.append(True)
                places.append(position)
            at += 1
        else:
            embeds.append(table[token])
            fixed.append(False)
            image.append(False)
            places.append(position)
        before = token
    if method.positions == "compact":
        places = list(range(len(places)))
    flags = torch.tensor(image), torch.tensor(fixed)
    return torch.stack(embeds), torch.tensor(places), *flags, whole


def drop_by_hand(method, layer, hidden, tables, alive, image, fixed, count):
    """Who is alive after a stage, from the whole map of the layer before it."""
    x, attn = layer.input_layernorm(hidden), layer.self_attn
    q = turned(attn.q_proj(x).unflatten(-1, (-1, attn.head_dim)).transpose(0, 1), *tables)
    k = turned(attn.k_proj(x).unflatten(-1, (-1, attn.head_dim)).transpose(0, 1), *tables)
    k = k.repeat_interleave(len(q) // len(k), 0)
    seen = torch.ones(len(x), len(x), dtype=torch.bool).tril() & alive
    maps = (q @ k.mT / attn.head_dim**0.5).masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
    maps = maps.tolist()
    start = int(image.int().argmax()) if image.any() else len(x)
    asks = sorted({*(t for t in range(start, len(x)) if not image[t]), len(x) - 1})
    left = (image & alive).nonzero().flatten().tolist()
    total = {v: sum(maps[t][v] for t in asks) for v in left}
    peak = {v: max(maps[t][v] for t in asks) for v in left}
    whole = sum(total.values())
    worth = {
        v: math.inf
        if fixed[v]
        else max(total[v] / whole / method.thresholds[0], peak[v] / method.thresholds[1])
        for v in left
    }
    order = sorted(left, key=lambda v: -worth[v])
    stay = [v for v in left if worth[v] >= 1] if method.by_threshold else order[:count]
    alive = ~image
    alive[stay] = True
    return alive


@torch.no_grad()
def greedy_by_hand(model, inputs, method, rows):
    """Greedy tokens of every row at full length: whoever was dropped is masked, layer by layer."""
    model, method = model.double(), method.fitted(find_language(model))
    language, found, lengths = model.model.language_model, [], []
    seen = seen_by_tower(model, inputs) if "pixel_values" in inputs else ([], None, None)
    features, first, attention = seen
    stages, part = method.stages(len(language.layers)), 0
    sizes = [(0, 0) if s is None else s for row in rows for s in row]
    for number, row in enumerate(rows):
        ids = inputs["input_ids"][number][inputs["attention_mask"][number].bool()].tolist()
        mine = slice(part, part + len(row))
        begin = sum(partitions(model, s) for row_ in rows[:number] for s in row_)
        embeds, places, image, fixed, whole = short_prompt(
            model, method, ids, sizes[mine], features[mine],
            None if first is None else first[begin:], None if first is None else attention[begin:],
        )  # fmt: skip
        part = mine.stop
        prompt, least, history, new = len(embeds), int(fixed.sum()), {}, []
        for _ in range(NEW):
            length = len(embeds)
            tables = [t[0] for t in language.rotary_emb(embeds[None], places[None])]
            alive, hidden, before = torch.ones(prompt, dtype=torch.bool), embeds, embeds
            final = history.get("final")
            for index, layer in enumerate(language.layers):
                if index in stages and final is None:
                    count = max(int(stages[index] * whole + 1e-9), least, min(1, whole))
                    alive = drop_by_hand(
                        method, language.layers[index - 1], before, tables, alive, image, fixed,
                        min(count, int((alive & image).sum())),
                    )  # fmt: skip
                    history[index] = alive
                elif index in stages:
                    alive = history[index]
                mask = torch.ones(length, length, dtype=torch.bool).tril()
                mask[:, :prompt] &= alive
                if final is not None and index >= max(1, min(stages) - 1):
                    mask[prompt:, :prompt] = final
                mask |= torch.eye(length, dtype=torch.bool)
                before = hidden
                hidden = layer(
                    hidden[None], attention_mask=mask[None, None],
                    position_embeddings=tuple(t[None] for t in tables),
                )  # fmt: skip
                hidden = (hidden[0] if isinstance(hidden, tuple) else hidden)[0]
            history.setdefault("final", alive)
            token = int(model.lm_head(language.norm(hidden[-1:]))[0].argmax())
            new.append(token)
            embeds = torch.cat([embeds, model.get_input_embeddings().weight[token][None]])
            places = torch.cat([places, places[-1:] + 1])
        found.append(new)
        lengths.append((prompt, int(history["final"].sum())))
    return torch.tensor(found), lengths


def partitions(model, size):
    return 1 if size is None else m.parts_of(model, size)
