"""Dropping inside the decoder against full-length runs whose dropped columns are masked."""

import json
from itertools import pairwise

import pytest
import torch

import vistoken
from tests.support import vlm_models as m
from tests.support.vlm_prompts import NEW, ROWS, inputs_of, one_by_one, prompt, run
from vistoken.errors import ConfigError, ScheduleError, UnsupportedMethodError
from vistoken.vlm import FastV, LayerRates, PSigmoid, PyramidDrop

LAYERS = 4
CASES = [
    FastV(budget=0.4, layer=2),
    FastV(budget=0.25, layer=1),
    PyramidDrop(budgets=(0.5, 0.25, 0.1)),
    PyramidDrop(budgets=(0.3,), layers=(3,)),
    PSigmoid(budget=0.5),
]


def build(kind=m.llava_next, **options):
    return kind(LAYERS, **options)


def turned(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def row_by_hand(layer, hidden, cos, sin, alive, last):
    """Attention of token `last`, mean over heads, with the whole map in memory."""
    x, attn = layer.input_layernorm(hidden), layer.self_attn
    width = attn.head_dim
    q = turned(attn.q_proj(x).unflatten(-1, (-1, width)).transpose(0, 1), cos, sin)
    k = turned(attn.k_proj(x).unflatten(-1, (-1, width)).transpose(0, 1), cos, sin)
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    scores = (q @ k.mT / width**0.5)[:, last]
    scores[:, ~alive] = -torch.inf
    scores[:, last + 1 :] = -torch.inf
    return scores.softmax(-1).mean(0)


def masked_run(model, embeds, image, method, last, kept=None):
    """Last hidden state `[L, C]` at full length, and the alive tokens of every stage."""
    language = model.model.language_model
    length, stages = len(embeds), method.stages(LAYERS)
    cos, sin = language.rotary_emb(embeds[None], torch.arange(length)[None])
    alive, history, hidden = torch.ones(length, dtype=torch.bool), {}, embeds
    before = embeds
    for index, layer in enumerate(language.layers):
        if index in stages:
            if kept is None:
                source = (
                    (layer, hidden) if method.row == "own" else (language.layers[index - 1], before)
                )
                scores = row_by_hand(*source, cos[0], sin[0], alive, last)
                scores[~image] = -1
                scores[~alive] = -2
                count = max(1, int(stages[index] * int(image.sum()) + 1e-9))
                alive = ~image
                alive[scores.argsort(descending=True, stable=True)[:count]] = True
            else:
                alive = torch.cat(
                    [kept[index], torch.ones(length - len(kept[index]), dtype=torch.bool)]
                )
            history[index] = alive
        seen = (
            torch.ones(length, length, dtype=torch.bool).tril() & alive | torch.eye(length).bool()
        )
        before = hidden
        hidden = layer(
            hidden[None], attention_mask=seen[None, None], position_embeddings=(cos, sin)
        )
        hidden = (hidden[0] if isinstance(hidden, tuple) else hidden)[0]
    return language.norm(hidden[None])[0], history


def whole_embeds(model, inputs, row, images):
    """Embeddings of one row of the plain prompt, features in place."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    x = model.get_input_embeddings()(ids)
    if images:
        x[ids == m.IMAGE] = torch.cat(images)
    return x, ids == m.IMAGE


def features_of(model, inputs):
    names = ("pixel_values", "image_sizes")
    return list(
        model.model.get_image_features(**{n: inputs[n] for n in names if n in inputs}).pooler_output
    )


def greedy_by_hand(model, inputs, method, rows):
    """Greedy tokens of every row by masking at full length, the sets fixed by the prompt."""
    features, found = features_of(model, inputs), []
    for row, images in enumerate(rows):
        mine, features = features[: len(images)], features[len(images) :]
        x, image = whole_embeds(model, inputs, row, mine)
        last, kept, new = len(x) - 1, None, []
        for _ in range(NEW):
            hidden, history = masked_run(model, x, image, method, last, kept)
            kept = kept or history
            token = int(model.lm_head(hidden[-1]).argmax())
            new.append(token)
            x = torch.cat([x, model.get_input_embeddings().weight[token][None]])
            image = torch.cat([image, torch.zeros(1, dtype=torch.bool)])
        found.append(new)
    return torch.tensor(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", CASES, ids=lambda c: c.to_string())
@torch.no_grad()
def test_dropping_equals_masking(method, attention):
    model = build(attention=attention)
    inputs = inputs_of(model, ROWS)
    plain = build()
    expected = greedy_by_hand(plain, inputs, method, ROWS)
    vistoken.wrap(model, method)
    out = run(model, inputs)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert torch.equal(out[:, -NEW:], expected)
    assert not torch.equal(run(plain, inputs)[:, -NEW:], expected)
    assert torch.equal(out[:, -NEW:], one_by_one(model, ROWS))


@pytest.mark.parametrize("method", CASES, ids=lambda c: c.to_string())
@torch.no_grad()
def test_caches_shrink_layer_by_layer(method):
    model = vistoken.wrap(build(), method)
    inputs = inputs_of(model, [[(56, 56)]])
    out = run(model, inputs, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    images = int((inputs["input_ids"] == m.IMAGE).sum())
    share, expected = 1.0, []
    stages = method.stages(LAYERS)
    for layer in range(LAYERS):
        share = stages.get(layer, share)
        expected.append(length - images + int(share * images + 1e-9) + NEW - 1)
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == expected
    assert out.past_key_values.get_seq_length() == length + NEW - 1


@torch.no_grad()
def test_whole_budget_changes_nothing_to_the_bit():
    model = build()
    inputs = inputs_of(model, ROWS)
    plain = model(**inputs).logits
    hooks = sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules())
    vistoken.wrap(model, FastV(budget=1.0, layer=2))
    assert torch.equal(model(**inputs).logits, plain)
    vistoken.unwrap(model)
    vistoken.wrap(model, FastV(budget=0.3, layer=2))
    assert model(**inputs).logits.shape[1] < plain.shape[1]
    vistoken.unwrap(model)
    assert torch.equal(model(**inputs).logits, plain)
    assert hooks == sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules())


@pytest.mark.parametrize("method", [CASES[0], CASES[2]], ids=lambda c: c.to_string())
@torch.no_grad()
def test_generation_modes_agree(method):
    model = vistoken.wrap(build(), method)
    for rows in ([[(56, 56)]], ROWS):
        inputs = inputs_of(model, rows)
        plain = run(model, inputs)
        static = run(model, inputs, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, plain)
        prefill = model(**inputs, logits_to_keep=1).logits
        bare = model(**inputs, logits_to_keep=1, use_cache=False).logits
        torch.testing.assert_close(bare, prefill)
    inputs = inputs_of(model, [[(56, 56)]])
    plain = run(model, inputs, max_new_tokens=12)
    lookup = run(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup, plain)
    rows = [[(56, 56)], [(40, 56)]]
    inputs = inputs_of(model, rows)
    beams = run(model, inputs, num_beams=3, num_return_sequences=2)
    assert torch.equal(beams[::2, -NEW:], one_by_one(model, rows, num_beams=3))


@torch.no_grad()
def test_text_in_turn_two_continues_the_cache():
    method = CASES[2]
    model = vistoken.wrap(build(), method)
    first = inputs_of(model, [[(56, 56)], [(28, 56)]])
    out = run(model, first, return_dict_in_generate=True)
    more = torch.tensor([m.words(4, 9), m.words(4, 10)])
    ids = torch.cat([out.sequences, more], 1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, NEW + 4, dtype=torch.long)], 1)
    turn = {"input_ids": ids, "attention_mask": mask}
    going_on = run(model, turn, past_key_values=out.past_key_values)[:, -NEW:]
    # Reference: masks at full length, the sets as the first prompt's last token chose them.
    plain, features = build(), features_of(build(), first)
    for row in range(2):
        x, image = whole_embeds(plain, first, row, features[row : row + 1])
        _, kept = masked_run(plain, x, image, method, len(x) - 1)
        rest = ids[row, first["input_ids"].shape[1] :]
        x = torch.cat([x, plain.get_input_embeddings()(rest)])
        for step in range(NEW):
            image = torch.zeros(len(x), dtype=torch.bool)
            hidden, _ = masked_run(plain, x, image, method, len(x) - 1, kept)
            token = int(plain.lm_head(hidden[-1]).argmax())
            assert token == int(going_on[row, step])
            x = torch.cat([x, plain.get_input_embeddings().weight[token][None]])


@torch.no_grad()
def test_new_image_in_turn_two_runs_and_drops_again():
    model = vistoken.wrap(build(), CASES[0])
    first = inputs_of(model, [[(56, 56)]])
    out = run(model, first, return_dict_in_generate=True)
    tail = prompt(model, [(40, 56)], seed=5)
    ids = torch.cat([out.sequences, torch.tensor([tail])], 1)
    turn = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **m.anyres(model, [(40, 56)], 3),
    }
    before = out.past_key_values.layers[3].keys.shape[-2]
    more = run(model, turn, past_key_values=out.past_key_values, return_dict_in_generate=True)
    images = m.packed_length(model, (40, 56))
    added = 1 + len(tail) - images + int(0.4 * images) + NEW - 1
    assert more.past_key_values.layers[3].keys.shape[-2] == before + added


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("method", [CASES[0], CASES[2]], ids=lambda c: c.to_string())
@torch.no_grad()
def test_labels_give_the_loss_of_what_is_left(method, pad):
    model = build()
    inputs = inputs_of(model, ROWS, pad)
    labels = inputs["input_ids"].clone()
    labels[(labels == m.IMAGE) | (inputs["attention_mask"] == 0)] = -100
    features, total, count = features_of(model, inputs), 0.0, 0
    for row, images in enumerate(ROWS):
        mine, features = features[: len(images)], features[len(images) :]
        x, image = whole_embeds(model, inputs, row, mine)
        hidden, history = masked_run(model, x, image, method, len(x) - 1)
        alive = list(history.values())[-1]
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        target = ids.masked_fill(image, -100)[alive][1:]
        logits = model.lm_head(hidden[alive])[:-1]
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        count += int((target != -100).sum())
    vistoken.wrap(model, method)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, total / count)


@torch.no_grad()
def test_no_map_of_the_prompt_is_formed():
    from torch.overrides import TorchFunctionMode

    largest = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    for kind, method in ((m.llava_next, CASES[0]), (m.llava_next, CASES[2])):
        model = vistoken.wrap(build(kind), method)
        inputs = inputs_of(model, [[(56, 56), (56, 56), (56, 56)]])
        length = inputs["input_ids"].shape[1]
        embeds = build().get_input_embeddings()(inputs["input_ids"])
        largest.clear()
        with Watch():
            run(model, inputs, max_new_tokens=1)
        assert max(largest) < 4 * length * length, (max(largest), length, embeds.shape)


def test_sigmoid_rates():
    for depth in (4, 24, 32):
        for budget in (0.2, 0.5, 0.9):
            if depth == 4 and budget < 0.3:
                continue
            for sharpness in (0.3, 1.0, 5.0):
                rates = PSigmoid(budget=budget, sharpness=sharpness).rates(depth)
                assert abs(sum(rates) / depth - budget) < 1e-6
                assert all(a >= b for a, b in pairwise(rates))
    with pytest.raises(ScheduleError, match="out of reach"):
        PSigmoid(budget=0.1).rates(4)


def test_schedule_files(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"rates": [1.0, 1.0, 0.5, 0.25]}))
    assert LayerRates(file=str(path)).stages(4) == {2: 0.5, 3: 0.25}
    model = vistoken.wrap(build(), LayerRates(file=str(path)))
    inputs = inputs_of(model, [[(56, 56)]])
    same = vistoken.wrap(build(), vistoken.parse(f"layer_rates:file={path}"))
    assert torch.equal(run(model, inputs), run(same, inputs))
    with pytest.raises(ScheduleError, match="model of 5"):
        LayerRates(file=str(path)).stages(5)
    path.write_text(json.dumps({"rates": [1.0, 0.5, 0.7, 0.1]}))
    with pytest.raises(ConfigError, match="falling"):
        LayerRates(file=str(path)).stages(4)
    with pytest.raises(ConfigError, match="nowhere"):
        LayerRates(file="nowhere").stages(4)
    with pytest.raises(ConfigError, match="one of them must be given"):
        LayerRates().stages(4)


def test_what_cannot_work_raises():
    with pytest.raises(UnsupportedMethodError, match="three axes"):
        vistoken.wrap(m.qwen(), "fastv:budget=0.5,layer=1")
    with pytest.raises(ScheduleError, match="layer 9"):
        vistoken.wrap(build(), "fastv:layer=9")
    model = vistoken.wrap(build(), "fastv:layer=2")
    with pytest.raises(UnsupportedMethodError, match="prefill_chunk_size"):
        run(model, inputs_of(model, [[(56, 56)]]), prefill_chunk_size=16)
    model = vistoken.unwrap(model)
    model.config.text_config.layer_types = ["sliding_attention"] * LAYERS
    with pytest.raises(UnsupportedMethodError, match="windows"):
        vistoken.wrap(model, "fastv:layer=2")
    for bad in ("fastv:layer=0", "fastv:budget=2", "pyramiddrop:budgets=[0.2,0.5]"):
        with pytest.raises(ConfigError, match="must be"):
            vistoken.parse(bad)


@torch.no_grad()
def test_trainers_divide_the_loss_by_their_own_count():
    model = vistoken.wrap(build(), "fastv:budget=0.5,layer=2")
    inputs = inputs_of(model, [[(40, 56)]])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == m.IMAGE, -100)
    count = int((labels[:, 1:] != -100).sum())
    loss = model(**inputs, labels=labels).loss
    got = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(10 * count)).loss
    torch.testing.assert_close(got, loss / 10)


@torch.no_grad()
def test_tuples_carry_the_same_loss_and_cache():
    model = vistoken.wrap(build(), "fastv:budget=0.5,layer=2")
    inputs = inputs_of(model, ROWS)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ROWS), 1).long()], 1)
    step = {
        "input_ids": torch.full((len(ROWS), 1), 5), "attention_mask": mask,
        "position_ids": mask.sum(1, keepdim=True) - 1,
    }  # fmt: skip
    named = model(**inputs, labels=inputs["input_ids"])
    loss, logits, cache = model(**inputs, labels=inputs["input_ids"], return_dict=False)[:3]
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits)
    after = model(**step, past_key_values=named.past_key_values).logits
    assert torch.equal(model(**step, past_key_values=cache).logits, after)


@pytest.mark.parametrize("method", [CASES[0], CASES[2]], ids=lambda c: c.to_string())
@torch.no_grad()
def test_padding_on_the_right_changes_nothing(method):
    model = vistoken.wrap(build(), method)
    assert torch.equal(
        run(model, inputs_of(model, ROWS, "right"))[:, -NEW:], one_by_one(model, ROWS)
    )


@pytest.mark.parametrize("method", [CASES[0], CASES[2]], ids=lambda c: c.to_string())
@torch.no_grad()
def test_a_static_cache_with_padding_on_the_right_is_refused(method):
    model = vistoken.wrap(build(), method)
    inputs = inputs_of(model, ROWS, "right")
    with pytest.raises(ConfigError, match="pad on the left"):
        run(model, inputs, cache_implementation="static", disable_compile=True)
    whole = inputs_of(model, ROWS)
    assert torch.equal(run(model, whole), run(model, whole)), "the model still works"


@pytest.mark.parametrize("method", ["fastv:budget=0.5,layer=1", "mustdrop:budget=0.6"])
def test_a_pass_that_fails_leaves_nothing_to_the_next(method):
    model = build(m.llava)
    inputs = inputs_of(model, [[None], [None, None]])
    vistoken.wrap(model, method)
    wanted = run(model, inputs)
    embeds = torch.randn(1, 7, 32)
    language = model.model.language_model
    plain = language(inputs_embeds=embeds).last_hidden_state

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = language.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        run(model, inputs)
    handle.remove()
    assert torch.equal(language(inputs_embeds=embeds).last_hidden_state, plain)
    assert model._vistoken.pending is None
    assert torch.equal(run(model, inputs), wanted)
