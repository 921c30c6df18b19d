"""Where image tokens come from, what a budget is of, and class rows, against the host's own."""

import numpy as np
import pytest
import torch

import vistoken
from tests.support import vlm_models as m
from tests.support.naive_budget import slow_allocate
from vistoken.models.llava import find_language
from vistoken.vlm.choose import allocate, index_of, split, top_by_segment
from vistoken.vlm.layout import layout_of, regions
from vistoken.vlm.rows import RowReader

SIZES = [(56, 56), (40, 56), (56, 33), (30, 90), (90, 31), (28, 56), (61, 23)]


def test_allocation_is_exact_and_proportional():
    rng = np.random.default_rng(0)
    for _ in range(300):
        parts = int(rng.integers(1, 8))
        weights = rng.random(parts) ** 3 + 1e-3
        caps = tuple(int(c) for c in rng.integers(0, 40, parts))
        total = int(rng.integers(0, sum(caps) + 10))
        found = allocate(torch.tensor(weights), caps, total).tolist()
        assert sum(found) == min(total, sum(caps))
        assert all(0 <= f <= c for f, c in zip(found, caps, strict=True))
        assert found == slow_allocate(weights, caps, total)


def test_allocation_without_weights_is_even():
    assert allocate(torch.zeros(4), (10, 10, 10, 10), 20).tolist() == [5, 5, 5, 5]
    assert allocate(torch.tensor([1.0, 0, 0, 0]), (6, 10, 10, 10), 12).tolist() == [6, 2, 2, 2]
    assert allocate(torch.tensor([1.0, 0, 0, 0]), (16, 10, 10, 10), 12).tolist() == [12, 0, 0, 0]
    assert split(7, (3, 3, 1)) == (3, 3, 1)
    assert sum(split(100, (576, 36, 1000))) == 100


def test_top_by_segment_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        sizes = torch.randint(0, 9, (4,), generator=generator).tolist()
        segment = torch.cat(
            [torch.full((n,), i) for i, n in enumerate([*sizes])] + [torch.tensor([-1, -1])]
        )
        segment = segment[torch.randperm(len(segment), generator=generator)]
        scores = torch.randint(0, 5, segment.shape, generator=generator).float()  # many ties
        budgets = torch.tensor([min(trial % 7, n) for n in sizes])
        found = top_by_segment(scores, segment, tuple(sizes), budgets)
        for part, budget in enumerate(budgets.tolist()):
            here = (segment == part).nonzero().flatten().tolist()
            best = sorted(here, key=lambda i: (-float(scores[i]), i))[:budget]
            assert sorted(best) == [i for i in here if found[i]]
        assert not found[segment < 0].any()
        assert index_of(found, int(found.sum())).tolist() == found.nonzero().flatten().tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("build", [m.llava_next, m.onevision])
def test_layout_follows_the_models_own_packing(build, size):
    model = build()
    host = find_language(model)
    tokens, parts = m.packed_length(model, size), m.parts_of(model, size)
    layout = layout_of(host, tokens, size, whole=False)
    raw = torch.randn(parts, 16, 5)
    options = {} if build is m.onevision else {"vision_feature_select_strategy": "default"}
    packed = model.model.pack_image_features(
        [raw], torch.tensor([size]), image_newline=torch.full((5,), 7.0), **options
    )[0][0]
    flat = torch.cat([raw.flatten(0, 1), torch.full((1, 5), 7.0)])
    assert torch.equal(flat[layout.source], packed)
    assert layout.raw == parts * 16
    assert layout.newlines == int((packed == 7).all(1).sum())
    for part in range(parts):
        assert layout.sizes[part] == int((layout.source[layout.segment >= 0] // 16 == part).sum())


def test_interpolated_mosaics_have_no_source():
    model = m.onevision(aspect="anyres_max_1")
    size = (56, 56)
    base = model.model
    packed = base.pack_image_features(
        [torch.zeros(5, 16, 1)], torch.tensor([size]), image_newline=torch.zeros(1),
        vision_aspect_ratio="anyres_max_1",
    )[0][0]  # fmt: skip
    layout = layout_of(find_language(model), packed.shape[0], size, whole=False)
    assert layout.source is None
    assert sum(layout.sizes) == layout.candidates == packed.shape[0] - layout.newlines


def test_regions_follow_the_padding():
    layout = layout_of(find_language(m.llava_next()), 88, (56, 56), whole=False)
    quadrants = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    assert torch.equal(regions(layout).view(4, 4), quadrants)
    model = m.llava_next()
    flat = layout_of(find_language(model), m.packed_length(model, (15, 56)), (15, 56), whole=False)
    for exact in (True, False):
        under = regions(flat, exact).view(4, 4)
        for row in range(4):
            for column in range(4):
                # The centre of a thumbnail patch, in pixels of the image, then on the canvas.
                y, x = (row + 0.5) / 4 * 15, (column + 0.5) / 4 * 56
                high, wide = (flat.grid[0] * 28, flat.grid[1] * 28)
                scale = min(high / 15, wide / 56)
                top, left = (high - 15 * scale) / 2, (wide - 56 * scale) / 2
                if exact:
                    crop = int((top + y * scale) // 28), int((left + x * scale) // 28)
                else:
                    crop = int(row * flat.grid[0] / 4), int(column * flat.grid[1] / 4)
                assert int(under[row, column]) == crop[0] * flat.grid[1] + crop[1]


@pytest.mark.parametrize("layers", [(0,), (1, 3)])
def test_rows_equal_eager_attention(layers):
    model = m.llava(attention="eager")
    host = find_language(model)
    pixels = m.pictures(3)
    maps = model.model.vision_tower(pixels, output_attentions=True).attentions
    fused = m.llava(attention="sdpa")
    host = find_language(fused)
    reader = RowReader(layers)
    reader.attach(host)
    fused.model.vision_tower(pixels)
    rows = reader.take()
    reader.detach()
    for layer in layers:
        expected = maps[layer][:, :, 0, 1:].mean(1)
        torch.testing.assert_close(rows[layer].attention, expected, atol=1e-6, rtol=1e-5)
        heads = rows[layer].logits.softmax(-1)
        cut = maps[layer][:, :, 0, 1:]
        torch.testing.assert_close(heads, cut / cut.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4)
    with pytest.raises(vistoken.TapError, match="did not run"):
        reader.take()


REAL = {  # (height, width): crops, raw tokens, map, V, budgets of 40, 20 and 10 %
    (672, 672): ((2, 2), 2880, (48, 48), 2928, (1152, 576, 288)),
    (1000, 1000): ((2, 2), 2880, (48, 48), 2928, (1152, 576, 288)),
    (480, 640): ((2, 2), 2880, (36, 48), 2340, (1152, 576, 288)),
    (640, 480): ((2, 2), 2880, (48, 36), 2352, (1152, 576, 288)),
    (1080, 1920): ((2, 2), 2880, (28, 48), 1948, (1152, 576, 288)),
    (336, 672): ((1, 2), 1728, (24, 48), 1752, (691, 345, 172)),
    (300, 900): ((1, 3), 2304, (24, 72), 2328, (921, 460, 230)),
    (900, 300): ((3, 1), 2304, (72, 24), 2376, (921, 460, 230)),
}


@pytest.fixture(scope="module")
def full_size():
    return m.llava_next(1, size=336, patch=14)


@pytest.mark.parametrize("size", REAL)
def test_counts_of_the_published_resolution(full_size, size):
    grid, raw, mosaic, tokens, budgets = REAL[size]
    layout = layout_of(find_language(full_size), tokens, size, whole=False)
    assert (layout.grid, layout.raw, layout.mosaic) == (grid, raw, mosaic)
    assert layout.newlines == mosaic[0]
    found = tuple(vistoken.HiRED(budget=b).count(layout) for b in (0.4, 0.2, 0.1))
    assert found == budgets
