"""Prompts for tiny vision-language models, generation row by row, and a reference made by hand."""

import torch

from tests.support import vlm_models as m

NEW = 6


def run(model, inputs, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, **options)


def prompt(model, images, seed=0):
    """One row: words, then every image followed by words; image token counts from the model."""
    ids = m.words(3, seed)
    for index, size in enumerate(images):
        count = 16 if size is None else m.packed_length(model, size)
        ids += [m.IMAGE] * count + m.words(3 + index, seed + 7 + index)
    return ids


def inputs_of(model, rows, pad="left", seed=0):
    """A batch; rows are lists of image sizes, None for models that know one size."""
    made = m.batch([prompt(model, row, seed + i) for i, row in enumerate(rows)], pad)
    sizes = [size for row in rows for size in row]
    if not sizes:
        return made
    if sizes[0] is None:
        return {**made, "pixel_values": m.pictures(len(sizes), seed)}
    return {**made, **m.anyres(model, sizes, seed)}


def one_by_one(model, rows, **options):
    """New tokens of every row, generated alone and without padding."""
    batch = inputs_of(model, rows)
    first, found = 0, []
    for index, row in enumerate(rows):
        real = batch["attention_mask"][index].bool()
        alone = {"input_ids": batch["input_ids"][index][real][None]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        if row:
            for name in ("pixel_values", "image_sizes"):
                if name in batch:
                    alone[name] = batch[name][first : first + len(row)]
            first += len(row)
        found.append(run(model, alone, **options)[0, alone["input_ids"].shape[1] :])
    return torch.stack(found)


def reference(model, inputs, kept, positions="compact", steps=NEW):
    """Greedy tokens by the plain language model on a short prompt built by hand, without cache.

    Args:
        kept: per row, per image, (places, features) that stay.
    """
    found = []
    for row, images in enumerate(kept):
        real = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row][real].tolist()
        table = model.get_input_embeddings().weight
        embeds, places, image, at, before = [], [], -1, 0, None
        for position, token in enumerate(ids):
            if token != m.IMAGE:
                embeds.append(table[token])
                places.append(position)
            else:
                if before != m.IMAGE:
                    image, at = image + 1, 0
                where, values = images[image]
                hit = (where == at).nonzero()
                if len(hit):
                    embeds.append(values[int(hit)])
                    places.append(position)
                at += 1
            before = token
        new = []
        for _ in range(steps):
            x = torch.stack(embeds)[None]
            spots = torch.arange(len(embeds)) if positions == "compact" else torch.tensor(places)
            out = model.model.language_model(
                inputs_embeds=x, position_ids=spots[None], attention_mask=torch.ones(x.shape[:2]),
                use_cache=False,
            )  # fmt: skip
            token = int(model.lm_head(out.last_hidden_state[0, -1]).argmax())
            new.append(token)
            embeds.append(table[token])
            places.append(places[-1] + 1)
        found.append(new)
    return torch.tensor(found)


def selection(model, inputs):
    """What a wrapped model keeps of every image, read off its encoder."""
    names = ("pixel_values", "image_sizes")
    output = model.model.get_image_features(**{n: inputs[n] for n in names if n in inputs})
    return [(f._vistoken_reduced.index, f._vistoken_reduced.features) for f in output.pooler_output]


ROWS = [[(56, 56)], [], [(40, 56), (28, 56)]]
