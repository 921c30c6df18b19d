"""The picture of routed regions shows what means over loops say."""

import numpy as np
import pytest
import torch
from naive_routing import region_ids

import vistoken
from vistoken.view.regions import LINE, QUERY, draw_regions, paint, routed_cells, scene


@pytest.mark.parametrize(("grid", "regions", "topk"), [((8, 8), 4, 3), ((7, 9), 3, 2)])
def test_cells(grid, regions, topk):
    torch.manual_seed(0)
    features = torch.randn(*grid, 5)
    size = tuple(-(-n // regions) for n in grid)
    ids = torch.tensor(region_ids(grid, size))
    means = torch.stack([features.flatten(0, 1)[ids == r].mean(0) for r in range(ids.max() + 1)])
    for cell in ((0, 0), (4, 6), (grid[0] - 1, grid[1] - 1)):
        own = ids[cell[0] * grid[1] + cell[1]]
        listed = (means[own] @ means.T).topk(topk).indices
        wanted = torch.isin(ids, listed).view(grid).numpy()
        assert (routed_cells(features, cell, regions, topk) == wanted).all()
    with pytest.raises(vistoken.ConfigError, match="on the grid of"):
        routed_cells(features, (grid[0], 0), regions, topk)


def test_paint():
    pixels = np.full((24, 24, 3), 55, dtype=np.uint8)
    keys = np.zeros((4, 4), dtype=bool)
    keys[:2, :2] = True
    out = paint(pixels, keys, (3, 1), 2, 6)
    assert tuple(out[3, 3]) == (55, 55, 55) and tuple(out[3, 20]) == (205, 205, 205)
    assert tuple(out[12, 3]) == LINE and tuple(out[3, 12]) == LINE
    assert tuple(out[21, 9]) == QUERY


def test_sheet():
    pytest.importorskip("PIL")
    assert len(np.unique(scene(56).reshape(-1, 3), axis=0)) == 8
    sheet = draw_regions(scene(64), cells=[(1, 1), (6, 3)], regions=4, topk=2, grid=8, scale=40)
    assert sheet.size[0] > 2 * 8 * 40
