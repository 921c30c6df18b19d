"""MustDrop against naive loops in float64: merging, stages, the cache that forgets, generation."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vistoken
from tests.support import vlm_models as m
from tests.support.naive_must_drop import greedy_by_hand
from tests.support.vlm_prompts import NEW, ROWS, inputs_of, one_by_one, run
from vistoken.errors import ConfigError, ScheduleError, UnsupportedMethodError
from vistoken.models.llava import find_language
from vistoken.vlm import MustDrop
from vistoken.vlm.base import Image
from vistoken.vlm.layout import layout_of
from vistoken.vlm.must_drop import windows
from vistoken.vlm.rows import Row

LAYERS = 6
CASES = [
    MustDrop(budget=0.4),
    MustDrop(budget=0.45, merged=0.3, after=(1, 3), fixed=0.1),
    MustDrop(budget=0.3, merged=0.2, after=(0, 2, 3), thresholds=(0.002, 0.001), newlines="drop"),
    MustDrop(budget=0.5, positions="compact", after=(2,)),
    MustDrop(budget_policy="paper", similarity=0.1, thresholds=(0.02, 0.05), after=(1, 3)),
]


def build(kind=m.llava_next, **options):
    return kind(LAYERS, **options)


@pytest.mark.parametrize("method", CASES, ids=lambda c: c.to_string())
def test_equals_naive_loops_at_full_length(method):
    model = build(attention="eager" if method.after == (2,) else "sdpa")
    inputs = inputs_of(model, ROWS)
    expected, lengths = greedy_by_hand(build(), inputs, method, ROWS)
    vistoken.wrap(model, method)
    out = run(model, inputs)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert torch.equal(out[:, -NEW:], expected)
    assert torch.equal(out[:, -NEW:], one_by_one(model, ROWS))
    assert all(after < before for before, after in lengths[::2])
    plain = run(build(), inputs)[:, -NEW:]
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("method", CASES[1:3], ids=lambda c: c.to_string())
def test_one_partition_without_newlines(method):
    model, rows = build(m.llava), [[None], [None, None]]
    inputs = inputs_of(model, rows)
    expected, _ = greedy_by_hand(build(m.llava), inputs, method, rows)
    vistoken.wrap(model, method)
    assert torch.equal(run(model, inputs)[:, -NEW:], expected)
    right = inputs_of(model, rows, "right")
    assert torch.equal(run(model, right)[:, -NEW:], expected)


@pytest.mark.parametrize("method", CASES[:4], ids=lambda c: c.to_string())
@torch.no_grad()
def test_counts_and_caches_are_known_before(method):
    model = vistoken.wrap(build(), method)
    inputs = inputs_of(model, [[(56, 56)]])
    out = run(model, inputs, return_dict_in_generate=True)
    fitted = method.fitted(find_language(model))
    layout = layout_of(find_language(model), 88, (56, 56), whole=False)
    length = inputs["input_ids"].shape[1]
    stages = fitted.stages(LAYERS)
    last = int(min(stages.values()) * 88 + 1e-9)
    edge = max(1, min(stages) - 1)
    cut = [length - 88 + fitted.kept(layout)] * edge + [length - 88 + last] * (LAYERS - edge)
    cache = out.past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + NEW - 1 for n in cut]
    assert cache.get_seq_length() == length + NEW - 1
    assert vistoken.info(model).images == ((88, last),)
    spread = [fitted.count(layout) / 80] + [stages.get(i) for i in range(1, LAYERS)]
    for index in range(1, LAYERS):
        spread[index] = spread[index] or spread[index - 1]
    if method.merged is not None:
        assert abs(sum(spread) / LAYERS - method.budget) < 0.03


def test_shares_fall_by_one_factor_to_the_budget():
    for depth in (6, 24, 32):
        for budget in (0.15, 0.333, 0.7):
            for method in (MustDrop(budget=budget, fixed=0.0), MustDrop(budget, merged=0.1)):
                if depth == 6 and budget < 0.2:
                    continue
                shares = method.shares(depth)
                cuts = [0, *(layer + 1 for layer in method.last_layers(depth)), depth]
                spans = [b - a for a, b in pairwise(cuts)]
                mean = sum(s * n for s, n in zip(shares, spans, strict=True)) / depth
                assert abs(mean - budget) < 1e-9
                if method.fixed == 0:
                    factors = [b / a for a, b in pairwise(shares)]
                    assert max(factors) - min(factors) < 1e-9
                assert min(shares) >= method.fixed * shares[0] - 1e-12
    assert MustDrop().last_layers(32) == (2, 6, 10, 14)
    with pytest.raises(ScheduleError, match="it can be"):
        MustDrop(budget=0.95, merged=0.2).shares(32)
    with pytest.raises(ScheduleError, match="out of reach"):
        MustDrop(budget=0.015).shares(32)
    with pytest.raises(ScheduleError, match="layer 5"):
        MustDrop(after=(4,)).stages(5)


def test_windows_tile_every_partition():
    tiles = windows((6, 6), (0, 0), (0, 0), (0, 0))
    assert tiles.shape == (4, 9)
    assert tiles[1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert len(windows((24, 24), (2, 2), (48, 48), (0, 0))) == 5 * 64
    for size in [(56, 56), (40, 56), (30, 90), (90, 31), (28, 56)]:
        model = m.llava_next()
        layout = layout_of(find_language(model), m.packed_length(model, size), size, whole=False)
        tiles = windows(layout.side, layout.grid, layout.mosaic, layout.origin)
        raw = layout.source[tiles]
        step = torch.tensor([r * 4 + c for r in range(3) for c in range(3)])
        assert torch.equal(raw - raw[:, :1], step.expand_as(raw))
        assert (raw[:, 0] % 16 == 0).all()
        missing = set(range(len(layout.sizes))) - set((raw[:, 0] // 16).tolist())
        for part in missing:
            alive = set(layout.source[layout.segment == part].tolist())
            assert not {part * 16 + int(s) for s in step} <= alive


def made(first, features=None):
    layout = layout_of(find_language(m.llava_next()), 88, (56, 56), whole=False)
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(5, 16, generator=generator)
    features = torch.randn(88, 8, generator=generator) if features is None else features
    return Image(features, layout, 2, {3: Row(attention, attention, attention)}, {0: first})


def test_what_is_alike_merges_and_what_is_not_stays():
    paper = MustDrop(budget_policy="paper")
    apart = torch.eye(80)[:, :80].view(5, 16, 80)
    image = made(apart)
    reduced = paper.reduce(image)
    assert torch.equal(reduced.features, image.features)
    assert torch.equal(reduced.index, torch.arange(88))
    alike = apart.clone()
    alike[3] = 1.0  # a constant region: its window merges, nothing else
    image = made(alike, torch.ones(88, 8) * torch.arange(88)[:, None])
    reduced = paper.reduce(image)
    assert len(reduced.index) == 80
    same = made(alike, torch.full((88, 8), 0.7))
    torch.testing.assert_close(paper.reduce(same).features, torch.full((80, 8), 0.7))
    exact = MustDrop(merged=0.1)
    assert exact.merging(image.layout) == 1
    assert torch.equal(exact.reduce(image).index, reduced.index)
    assert reduced.fixed.sum() == reduced.fixes == math.ceil(0.08 * 72)


@torch.no_grad()
def test_thresholds_of_almost_nothing_drop_nothing():
    model = build()
    inputs = inputs_of(model, ROWS)
    plain = run(model, inputs)
    tiny = MustDrop(budget_policy="paper", similarity=1.0, thresholds=(1e-9, 1e-9))
    assert torch.equal(run(vistoken.wrap(model, tiny), inputs), plain)


@pytest.mark.parametrize("method", [CASES[0], CASES[1]], ids=lambda c: c.to_string())
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
def test_later_turns_run_on_what_is_left():
    model = vistoken.wrap(build(), CASES[1])
    both = [[(56, 56)], [(28, 56)]]
    first, found = inputs_of(model, both), []
    out = run(model, first, return_dict_in_generate=True)
    more = torch.tensor([m.words(4, 9), m.words(4, 10)])
    ids = torch.cat([out.sequences, more], 1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, NEW + 4, dtype=torch.long)], 1)
    turn = {"input_ids": ids, "attention_mask": mask}
    together = run(model, turn, past_key_values=out.past_key_values)[:, -NEW:]
    for row in range(2):
        alone = inputs_of(model, both[row : row + 1], seed=row)
        alone["pixel_values"] = first["pixel_values"][row : row + 1]
        out = run(model, alone, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, more[row : row + 1]], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found.append(run(model, turn, past_key_values=out.past_key_values)[0, -NEW:])
    assert torch.equal(together, torch.stack(found))
    # A new image in a later turn is cut as well.
    cache, text = out.past_key_values, m.words(3, 4)
    before = cache.layers[LAYERS - 1].keys.shape[-2]
    size = (40, 56)
    count = m.packed_length(model, size)
    ids = torch.cat([ids, found[1][None], torch.tensor([[*text, *[m.IMAGE] * count, *text]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **m.anyres(model, [size], 3)}
    run(model, turn, past_key_values=cache)
    share = min(CASES[1].stages(LAYERS).values())
    added = 1 + 2 * len(text) + int(share * count + 1e-9) + NEW - 1
    assert cache.layers[LAYERS - 1].keys.shape[-2] == before + added


@torch.no_grad()
def test_labels_and_whole_budget():
    model = build()
    inputs = inputs_of(model, ROWS)
    plain = model(**inputs).logits
    vistoken.wrap(model, MustDrop(budget=1.0))
    assert torch.equal(model(**inputs).logits, plain)
    vistoken.unwrap(model)
    vistoken.wrap(model, CASES[1])
    one = inputs_of(model, [[(40, 56)]])
    ids = one["input_ids"][0]
    out = model(**one, labels=ids.masked_fill(ids == m.IMAGE, -100)[None])
    logits, spots = out.logits[0], (ids == m.IMAGE).nonzero().flatten()
    head, tail = int(spots[0]), len(ids) - int(spots[-1]) - 1
    # Text is predicted by the token before it, the first word behind the image by the image's last.
    scores = torch.cat([logits[: head - 1], logits[-tail - 1 : -1]])
    loss = F.cross_entropy(scores, torch.cat([ids[1:head], ids[-tail:]]))
    torch.testing.assert_close(out.loss, loss)
    vistoken.unwrap(model)
    assert torch.equal(model(**inputs).logits, plain)


def test_selection_never_waits_for_the_device():
    image, called = made(torch.randn(5, 16, 12, generator=torch.Generator().manual_seed(1))), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    windows.cache_clear()
    MustDrop(merged=0.2).reduce(image)
    with Watch():
        MustDrop(merged=0.2).reduce(image)
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    assert called
    assert not [op for op in called if any(word in op for word in waits)]


def test_what_cannot_work_raises():
    with pytest.raises(UnsupportedMethodError, match="class token"):
        vistoken.wrap(m.onevision(), MustDrop())
    with pytest.raises(UnsupportedMethodError, match="class token"):
        vistoken.wrap(m.qwen(), MustDrop())
    with pytest.raises(UnsupportedMethodError, match="mustdrop drops tokens inside"):
        vistoken.accelerate(m.llava(), MustDrop())
    model = vistoken.wrap(build(), MustDrop(budget=0.4))
    with pytest.raises(UnsupportedMethodError, match="prefill_chunk_size"):
        run(model, inputs_of(model, [[(56, 56)]]), prefill_chunk_size=16)
    for bad in ("after=[3,1]", "merged=2", "thresholds=[0.1]", "similarity=3", "budget_policy=x"):
        with pytest.raises(ConfigError, match="must be"):
            vistoken.parse(f"mustdrop:{bad}")
    method = CASES[2]
    assert vistoken.parse(method.to_string()) == method
