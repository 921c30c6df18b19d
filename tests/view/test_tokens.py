"""Colours of panels and of the finished sheet at known pixels."""

import numpy as np
import pytest
import torch
from eval_models import SIDE, tiny_vit
from PIL import Image

import vistoken
from vistoken.errors import ConfigError
from vistoken.view.picture import DARKEN, EDGE, HATCH, LINE, Panel, outlines
from vistoken.view.sheet import Cell, origin
from vistoken.view.tokens import draw, look, to_pixels

GROUPS = np.array([[5, 5, 7], [5, -1, 8], [9, -1, 5]])


@pytest.fixture
def panel():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Panel(pixels, GROUPS)


def cell_mean(panel, cells):
    """Mean colour over the pixels of some 4 x 4 cells, by a loop."""
    total, count = np.zeros(3), 0
    for row, col in cells:
        for y in range(4 * row, 4 * row + 4):
            for x in range(4 * col, 4 * col + 4):
                total += panel.pixels[y, x]
                count += 1
    return np.rint(total / count)


def test_groups_get_their_mean_colour(panel):
    mean = cell_mean(panel, [(0, 0), (0, 1), (1, 0), (2, 2)])
    painted = panel.paint()
    for row, col in [(0, 0), (0, 1), (1, 0), (2, 2)]:
        cell = painted[4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        assert (cell == mean).all()


def test_single_patches_stay_and_pruned_ones_darken(panel):
    painted = panel.paint()
    for row, col in [(0, 2), (1, 2), (2, 0)]:
        part = np.s_[4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        assert (painted[part] == panel.pixels[part]).all()
    for row, col in [(1, 1), (2, 1)]:
        part = np.s_[4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        grey = panel.pixels[part].mean(-1, keepdims=True)
        assert (painted[part] == np.floor(grey * DARKEN)).all()


def test_outlines_run_exactly_where_tokens_differ(panel):
    cells = panel.cells()
    mask = outlines(cells, 1)
    for y in range(12):
        for x in range(12):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            differs = any(
                cells[a, b] != cells[y, x] for a, b in around if 0 <= a < 12 and 0 <= b < 12
            )
            assert mask[y, x] == differs
    assert not outlines(np.zeros((6, 6), np.int64), 1).any()
    assert (outlines(cells, 2) | mask == outlines(cells, 2)).all()


def test_drawn_panel_has_white_group_borders_dark_hair_lines_and_hatching(panel):
    drawn = panel.draw(10)
    white, between = np.array(LINE), (0.35 * panel.pixels + 0.65 * np.array(EDGE)).astype(np.uint8)
    # Inside the group of (0, 0) and (0, 1) no line; towards the pruned cell below, a white one.
    assert (drawn[15, 39] == drawn[15, 41]).all()
    assert (drawn[15, 79] == white).all()
    # Single patches (0, 2) and (1, 2) are parted by a hair line over their own colour.
    assert (drawn[39, 100] == between[3, 10]).all()
    gone = drawn[45:115, 45:75].reshape(-1, 3)
    assert (gone == np.array(HATCH)).all(-1).any()
    assert gone.max() <= max(HATCH)


def test_uneven_patches_cover_the_image():
    panel = Panel(np.zeros((10, 13, 3), np.uint8), np.arange(12).reshape(3, 4))
    assert panel.cells().shape == (10, 13)
    assert (np.unique(panel.cells()) == np.arange(12)).all()


@pytest.mark.parametrize("method", ["tome:r=3", "evit:keep_rate=0.4,at=[1]", "random:at=[1]"])
def test_sheet_shows_what_the_trace_says(tmp_path, method):
    torch.manual_seed(1)
    model, image = tiny_vit(), torch.rand(3, SIDE, SIDE)
    torch.manual_seed(2)
    vistoken.wrap(model, method)
    with torch.inference_mode(), vistoken.trace(model) as trace:
        model(image[None])
    parent = trace.blocks[2].source_map.parent[0, 1:].tolist()
    counts = [block.tokens for block in trace.blocks]
    vistoken.unwrap(model)
    torch.manual_seed(2)
    path = draw(model, image, [method], [2], tmp_path / "a" / "t.png", title="t")
    sheet = np.asarray(Image.open(path).convert("RGB"))
    pixels, scale, patch = to_pixels(image, (0,) * 3, (1,) * 3), 6, 16
    top, left = origin(0, 1, Cell(np.zeros((SIDE * scale, SIDE * scale, 3), np.uint8), ""))
    for index, token in enumerate(parent):
        row, col = divmod(index, 4)
        members = [divmod(i, 4) for i, other in enumerate(parent) if other == token]
        shown = sheet[top + (row * patch + 5) * scale + 2, left + (col * patch + 5) * scale + 2]
        blocks = [pixels[r * 16 : r * 16 + 16, c * 16 : c * 16 + 16] for r, c in members]
        if token < 0:
            assert shown.max() <= max(*HATCH, int(255 * DARKEN))
        elif len(members) > 1:
            assert (shown == np.rint(np.stack(blocks).mean((0, 1, 2)))).all()
        else:
            assert (shown == pixels[row * patch + 5, col * patch + 5]).all()
    assert (
        sheet[top + 3, origin(0, 0, Cell(np.zeros((1, 1, 3)), ""))[1] + 3] == pixels[0, 0]
    ).all()
    vistoken.wrap(model, method)
    torch.manual_seed(2)
    view = look(model, image, [0, 2])
    assert [block.tokens for block in view.blocks] == [counts[0], counts[2]]
    assert view.gflops == pytest.approx(vistoken.flops(model))
    assert view.dense_gflops == pytest.approx(vistoken.flops(tiny_vit()))


def test_pixels_undo_the_normalisation():
    image = torch.zeros(3, 2, 2)
    image[:, 0, 0] = 10.0
    shown = to_pixels(image, (0.2, 0.4, 0.6), (0.5, 0.5, 0.5))
    assert shown[1, 1].tolist() == [51, 102, 153]
    assert shown[0, 0].tolist() == [255, 255, 255]


def test_wrong_requests_leave_the_model_as_it_was(tmp_path):
    model, image = tiny_vit(), torch.rand(3, SIDE, SIDE)
    with pytest.raises(ConfigError, match="the model has blocks 0 to 3"):
        draw(model, image, ["tome:r=2"], [4], tmp_path / "t.png")
    with pytest.raises(ConfigError, match="must be"):
        draw(model, image[None], ["tome:r=2"], [1], tmp_path / "t.png")
    with pytest.raises(vistoken.NotWrappedError):
        draw(model, image, None, [1], tmp_path / "t.png")
    with pytest.raises(vistoken.NotWrappedError):
        vistoken.info(model)
    assert not (tmp_path / "t.png").exists()
