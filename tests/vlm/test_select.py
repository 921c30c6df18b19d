"""Which tokens stay: every rule against a plain re-computation, budgets to the token."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vistoken
from tests.support import vlm_models as m
from tests.support.naive_budget import slow_allocate
from vistoken.errors import UnsupportedMethodError
from vistoken.models.llava import find_language
from vistoken.vlm import METHODS, ImageMethod, LayerMethod
from vistoken.vlm.base import Image
from vistoken.vlm.choose import split
from vistoken.vlm.layout import layout_of, regions
from vistoken.vlm.rows import Row

BEFORE = [
    name
    for name, cls in METHODS.items()
    if issubclass(cls, ImageMethod) and not issubclass(cls, LayerMethod)
]


SIZES = [(56, 56), (40, 56), (56, 33), (30, 90), (90, 31), (28, 56), (61, 23)]


def made_image(size, build=m.llava_next, seed=0):
    """An image of random features and rows, with its layout."""
    model = build()
    layout = layout_of(find_language(model), m.packed_length(model, size), size, whole=False)
    generator = torch.Generator().manual_seed(seed)
    parts = len(layout.sizes)

    def row():
        logits = torch.randn(parts, 4, 16, generator=generator) * 2
        attention = torch.cat([torch.zeros(parts, 4, 1), logits], -1).softmax(-1).mean(1)[:, 1:]
        return Row(logits, attention, torch.randn(parts, 16, 8, generator=generator))

    features = torch.randn(layout.tokens, 32, generator=generator)
    return Image(features, layout, 2, {0: row(), 2: row(), 3: row()})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("budget", [0.1, 0.2, 0.45, 0.9])
@pytest.mark.parametrize("name", [n for n in BEFORE if n != "pool_tokens"])
def test_every_budget_is_met_to_the_token(name, budget, size):
    image = made_image(size)
    rows = {3: image.rows[3]} if name == "globalcom2" else image.rows
    image = Image(image.features, image.layout, 2, rows)
    layout = image.layout
    base = layout.raw if name == "hired" else layout.candidates
    expected = max(1, min(math.floor(budget * base + 1e-9), layout.candidates))
    for newlines in ("all", "drop", "rows"):
        method = METHODS[name](budget=budget, newlines=newlines)
        reduced = method.reduce(image)
        index = reduced.index
        assert (index[1:] > index[:-1]).all()
        ends = layout.newline[index]
        assert int((~ends).sum()) == expected == method.count(layout)
        if newlines == "rows":
            width = layout.mosaic[1] + 1
            place = index[(index >= 16) & ~ends] - 16
            assert int(ends.sum()) == len(set((place // width).tolist()))
        else:
            assert int(ends.sum()) == (layout.newlines if newlines == "all" else 0)
            assert len(index) == method.kept(layout)
        if name != "visionzip":
            assert torch.equal(reduced.features, image.features[index])


@pytest.mark.parametrize("size", SIZES)
def test_pooled_tokens_are_window_means(size):
    image = made_image(size)
    method = METHODS["pool_tokens"](budget=0.4, newlines="drop")
    reduced = method.reduce(image)
    assert len(reduced.index) == method.kept(image.layout) <= method.count(image.layout)
    rows, columns = image.layout.mosaic
    maps = [
        image.features[:16].view(4, 4, -1),
        image.features[16:].view(rows, columns + 1, -1)[:, :-1],
    ]
    expected = []
    for grid, (_, _, high, wide) in zip(maps, method.windows(image.layout), strict=True):
        for i in range(high):
            for j in range(wide):
                top, bottom = i * grid.shape[0] // high, -(-(i + 1) * grid.shape[0] // high)
                left, right = j * grid.shape[1] // wide, -(-(j + 1) * grid.shape[1] // wide)
                expected.append(grid[top:bottom, left:right].flatten(0, 1).mean(0))
    torch.testing.assert_close(reduced.features, torch.stack(expected))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_hired_equals_its_definition(size, alpha):
    image = made_image(size)
    layout = image.layout
    method = vistoken.HiRED(budget=0.3, alpha=alpha)
    total = min(int(0.3 * layout.raw + 1e-9), layout.candidates)
    caps = layout.sizes
    first = min(16, max(int(alpha * total), total - sum(caps[1:])))
    under = regions(layout)
    mass = [float(image.rows[0].attention[0][under == i].sum()) for i in range(len(caps) - 1)]
    budgets = [first, *slow_allocate([w + 1e-12 for w in mass], caps[1:], total - first)]
    expected = []
    for part, budget in enumerate(budgets):
        places = (layout.segment == part).nonzero().flatten().tolist()
        score = {p: float(image.rows[2].attention.flatten()[layout.source[p]]) for p in places}
        expected += sorted(places, key=lambda p: (-score[p], p))[:budget]
    assert method.select(image).nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("size", SIZES)
def test_hired_paper_rounding_loses_tokens(size):
    image = made_image(size)
    layout = image.layout
    method = vistoken.HiRED(budget=0.3, budget_policy="paper", newlines="drop")
    total = int(0.3 * layout.raw + 1e-9)
    first = int(0.5 * total)
    under = regions(layout)
    mass = [
        float(image.rows[0].attention[0][under == i].sum()) for i in range(len(layout.sizes) - 1)
    ]
    budgets = [first] + [int((total - first) * w / sum(mass)) for w in mass]
    kept = set()
    for part, budget in enumerate(budgets):
        order = image.rows[2].attention[part].argsort(descending=True, stable=True)[:budget]
        kept |= {part * 16 + int(j) for j in order}
    expected = [p for p in range(layout.tokens) if int(layout.source[p]) in kept]
    assert method.reduce(image).index.tolist() == expected
    assert len(expected) <= total


def test_hired_gives_the_budget_to_the_crop_that_is_looked_at():
    image = made_image((56, 56))
    under = regions(image.layout)
    looked = torch.zeros(5, 16)
    looked[0, under == 2] = 1.0
    rows = {**image.rows, 0: Row(image.rows[0].logits, looked, image.rows[0].keys)}
    image = Image(image.features, image.layout, 2, rows)
    chosen = vistoken.HiRED(budget=0.2).select(image)
    counts = [int(chosen[image.layout.segment == part].sum()) for part in range(5)]
    assert counts == [8, 0, 0, 8, 0]
    chosen = vistoken.HiRED(budget=0.5).select(image)  # 20 tokens for crops, 16 fit in one
    counts = [int(chosen[image.layout.segment == part].sum()) for part in range(5)]
    assert counts[3] == 16
    assert sum(counts) == 40


def test_hired_strips_are_those_of_the_published_code():
    layout = made_image((56, 56)).layout
    method = vistoken.HiRED(alpha=0.75, regions="strips")  # marks 4 of 16 patches
    corner = torch.rand(4, 4) * 0.1
    corner[:2, :2] += 1
    assert method.crop_mass(layout, corner.flatten()).tolist() == [2, 2, 0, 0]
    exact = vistoken.HiRED(alpha=0.75).crop_mass(layout, corner.flatten())
    assert exact.argmax() == 0
    assert exact[0] > 10 * exact[1:].max()
    wide = made_image((28, 56)).layout
    left = torch.rand(4, 4) * 0.1
    left[:, :2] += 1
    halves = vistoken.HiRED(alpha=0.5, regions="strips").crop_mass(wide, left.flatten())
    assert halves.tolist() == [4, 4]


@pytest.mark.parametrize("size", SIZES)
def test_max_min_equals_the_greedy_definition(size):
    image = made_image(size)
    real = [p for p in range(image.layout.tokens) if not image.layout.newline[p]]
    x = F.normalize(image.features[real].double(), dim=-1)
    gap = 1 - x @ x.T
    gap.fill_diagonal_(math.inf)
    kept = [int(gap.amin(1).argmax())]
    method = METHODS["max_min"](budget=0.3)
    while len(kept) < method.count(image.layout):
        rest = [i for i in range(len(real)) if i not in kept]
        kept.append(max(rest, key=lambda i: float(gap[i, kept].min())))
    expected = sorted(real[i] for i in kept)
    assert method.select(image).nonzero().flatten().tolist() == expected


def test_visionzip_merges_into_the_nearest_centre():
    image = made_image((40, 56))
    layout = image.layout
    method = METHODS["visionzip"](budget=0.4, merged=0.25)
    dominant, centres, others = method.roles(image)
    assert int(dominant.sum()) + len(centres) == method.count(layout)
    keys = image.rows[2].keys.flatten(0, 1)
    joined = {int(c): [] for c in centres}
    for token in others.tolist():
        cos = [
            float(F.cosine_similarity(keys[layout.source[token]], keys[layout.source[c]], 0))
            for c in joined
        ]
        joined[list(joined)[int(np.argmax(cos))]].append(token)
    reduced = method.reduce(image)
    for place, value in zip(reduced.index.tolist(), reduced.features, strict=True):
        expected = image.features[place]
        if joined.get(place):
            expected = expected + image.features[joined[place]].mean(0)
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", ["logits", "attention", "distance"])
def test_globalcom2_equals_its_definition(score):
    for size in SIZES:
        image = made_image(size)
        layout = image.layout
        image = Image(image.features, layout, 2, {3: image.rows[3]})
        method = METHODS["globalcom2"](budget=0.3, tau=0.7, score=score)
        if score == "distance":
            local = torch.zeros(layout.tokens)
            for part in range(len(layout.sizes)):
                here = layout.segment == part
                mean = image.features[here].mean(0)
                local[here] = -F.cosine_similarity(image.features[here], mean[None], dim=-1)
        else:
            row = image.rows[3]
            raw = row.attention if score == "attention" else row.logits.mean(1)
            local = raw.flatten()[layout.source.clamp(min=0)]
        thumb, k = local[:16], len(layout.sizes) - 1
        under = regions(layout)
        mass = torch.stack([thumb[under == i].sum() for i in range(k)])
        rate = (0.3 * (1 + (mass / 0.7).softmax(0) - 1 / k)).clamp(max=1)
        total = method.count(layout)
        first = min(16, max(int(0.3 * 16 + 1e-9), total - sum(layout.sizes[1:])))
        share = [float(r) * n for r, n in zip(rate, layout.sizes[1:], strict=True)]
        budgets = slow_allocate([s + 1e-12 for s in share], layout.sizes[1:], total - first)
        big = F.interpolate(thumb.view(1, 1, 4, 4), layout.mosaic, mode="bilinear")[0, 0]
        wide = torch.zeros(layout.tokens)
        wide[16:].view(layout.mosaic[0], -1)[:, :-1] = big
        expected = thumb.argsort(descending=True, stable=True)[:first].tolist()
        for part, budget in enumerate(budgets, 1):
            here = (layout.segment == part).nonzero().flatten()
            if len(here):
                both = wide[here] / wide[here].norm() + local[here] / local[here].norm()
                expected += here[both.argsort(descending=True, stable=True)[:budget]].tolist()
        assert method.select(image).nonzero().flatten().tolist() == sorted(expected)


def test_holov_spreads_over_strips():
    image = made_image((56, 56))
    method = METHODS["holov"](budget=0.5, strips=8, variety=0.0)
    chosen = method.select(image)
    real = [p for p in range(image.layout.tokens) if not image.layout.newline[p]]
    attention = [float(image.rows[2].attention.flatten()[image.layout.source[p]]) for p in real]
    sizes = split(len(real), (1,) * 8)
    starts = [sum(sizes[:i]) for i in range(9)]
    strips = [attention[a:b] for a, b in pairwise(starts)]
    budgets = slow_allocate([float(np.mean(s)) for s in strips], sizes, method.count(image.layout))
    for start, strip, budget in zip(starts, strips, budgets, strict=False):
        best = sorted(range(len(strip)), key=lambda i: -strip[i])[:budget]
        assert sorted(real[start + i] for i in best) == [
            p for p in real[start : start + len(strip)] if chosen[p]
        ]


def qwen_inputs():
    model = m.qwen()
    ids = [*m.words(3), 97, *[m.IMAGE] * 16, 96, *m.words(4, 1)]
    short = [*m.words(2, 2), 97, *[m.IMAGE] * 24, 96, *m.words(3, 3)]
    made = m.batch([ids, short])
    made["mm_token_type_ids"] = (made["input_ids"] == m.IMAGE).int()
    made["image_grid_thw"] = torch.tensor([[1, 8, 8], [1, 8, 12]])
    generator = torch.Generator().manual_seed(0)
    made["pixel_values"] = torch.randn(64 + 96, 3 * 2 * 16, generator=generator)
    return model, made


@pytest.mark.parametrize("name", ["random_tokens", "max_min", "pool_tokens"])
@torch.no_grad()
def test_qwen_keeps_three_axis_positions(name):
    model, made = qwen_inputs()
    vistoken.wrap(model, f"{name}:budget=0.4")
    options = {"max_new_tokens": 5, "do_sample": False}
    both = model.generate(**made, **options)[:, made["input_ids"].shape[1] :]
    # Reference: the plain language model on gathered embeddings and positions, without cache.
    tags = [f._vistoken_reduced for f in model.model.get_image_features(
        made["pixel_values"], made["image_grid_thw"]).pooler_output]  # fmt: skip
    vistoken.unwrap(model)
    for row in range(2):
        real = made["attention_mask"][row].bool()
        ids = made["input_ids"][row][real]
        places, _ = model.model.get_rope_index(
            ids[None], made["mm_token_type_ids"][row][real][None],
            image_grid_thw=made["image_grid_thw"][row : row + 1],
        )  # fmt: skip
        spots = (ids == m.IMAGE).nonzero().flatten()
        keep = sorted(
            (ids != m.IMAGE).nonzero().flatten().tolist() + spots[tags[row].index].tolist()
        )
        x = model.get_input_embeddings()(ids)
        x[spots[tags[row].index]] = tags[row].features
        x, places = x[keep][None], places[:, :, keep]
        for step in range(5):
            mask = torch.ones(x.shape[:2], dtype=torch.long)
            hidden = model.model.language_model(
                inputs_embeds=x, position_ids=places, attention_mask=mask, use_cache=False
            ).last_hidden_state
            token = model.lm_head(hidden[:, -1]).argmax(-1)
            assert int(token) == int(both[row, step])
            x = torch.cat([x, model.get_input_embeddings()(token)[:, None]], 1)
            places = torch.cat([places, places.amax() + 1 + torch.zeros_like(places[..., :1])], -1)


@torch.no_grad()
def test_onevision_and_internvl_batches_equal_single():
    for build in (m.onevision, m.internvl):
        model = vistoken.wrap(build(), "max_min:budget=0.4")
        options = {"max_new_tokens": 5, "do_sample": False}
        if build is m.onevision:
            sizes = [(56, 56), (28, 56)]
            images = m.anyres(model, sizes)
            counts = [m.packed_length(model, size) for size in sizes]
        else:
            images, counts = {"pixel_values": m.pictures(2)}, [4, 4]
        rows = [[*m.words(3 + i, i), *[m.IMAGE] * n, *m.words(4, i)] for i, n in enumerate(counts)]
        both = model.generate(**m.batch(rows), **images, **options)[:, -5:]
        for i in range(2):
            alone = {name: value[i : i + 1] for name, value in images.items()}
            single = model.generate(**m.batch([rows[i]]), **alone, **options)[:, -5:]
            assert torch.equal(both[i : i + 1], single)


def test_methods_that_need_a_class_token_say_so():
    for name in ("hired", "visionzip", "holov", "globalcom2"):
        for build in (m.onevision, m.qwen, m.internvl):
            with pytest.raises(UnsupportedMethodError):
                vistoken.wrap(build(), f"{name}:budget=0.3")


@pytest.mark.parametrize("name", METHODS)
def test_command_line_form_reads_back(name):
    method = METHODS[name]()
    assert vistoken.parse(method.to_string()) == method
    if name in BEFORE:
        method = METHODS[name](budget=0.35, newlines="drop", positions="original")
        assert vistoken.parse(method.to_string()) == method


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_runs_in_its_own_type(dtype):
    model = vistoken.wrap(m.llava_next().to(dtype), "hired:budget=0.3")
    size = (56, 56)
    ids = [*m.words(3), *[m.IMAGE] * m.packed_length(model, size), *m.words(4, 1)]
    inputs = {**m.batch([ids]), **m.anyres(model, [size])}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert (
        model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        .pooler_output[0]
        ._vistoken_reduced.features.dtype
        == dtype
    )
    assert model(**inputs).logits.dtype == dtype
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == len(ids) + 3


@pytest.mark.parametrize("name", BEFORE)
def test_selection_never_waits_for_the_device(name):
    image = made_image((56, 40))
    rows = {3: image.rows[3]} if name == "globalcom2" else image.rows
    image, called = Image(image.features, image.layout, 2, rows), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        METHODS[name](budget=0.3).reduce(image)
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    assert called
    assert not [op for op in called if any(word in op for word in waits)]
