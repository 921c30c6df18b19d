"""A picture of bi-level routing: the regions that single queries attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vistoken.errors import ConfigError
from vistoken.kernels.routing import routed_attention
from vistoken.kernels.routing_regions import route
from vistoken.view.picture import Pixels
from vistoken.view.sheet import Cell, compose

QUERY, LINE, FAINT = (214, 84, 48), (24, 24, 27), 0.25
"""Colours of the query's cell and of rims, and what is left of cells that are not attended."""
LEGEND = (
    "orange: the query's cell   ·   in colour: the regions it attends to   ·   pale: all others"
)


def routed_cells(
    features: torch.Tensor, cell: tuple[int, int], regions: int, topk: int
) -> NDArray[np.bool_]:
    """Mask `[rows, columns]` of the cells that one query attends to, as the operator has it.

    Args:
        features: queries and keys alike `[rows, columns, C]`.
        cell: row and column of the query.
        regions: regions per side.
        topk: regions that a region attends to.

    Raises:
        ConfigError: the cell is not on the grid.
    """
    rows, columns, _ = features.shape
    if not (0 <= cell[0] < rows and 0 <= cell[1] < columns):
        raise ConfigError(f"cell={cell}: must be on the grid of {rows} x {columns} cells")
    size = -(-rows // regions), -(-columns // regions)
    x = features[None, :, :, None]
    index = route(x, x, size, topk)
    one_hot = torch.eye(rows * columns).view(1, rows, columns, 1, -1)
    out = routed_attention(torch.zeros_like(x), x, one_hot.to(x.dtype), index, size)
    assert isinstance(out, torch.Tensor)
    weights = out[0, cell[0], cell[1], 0]
    return (weights > 0).view(rows, columns).numpy()


def draw_regions(
    image: Pixels | None = None,
    cells: Sequence[tuple[int, int]] = ((16, 19), (13, 6), (25, 20)),
    regions: int = 7,
    topk: int = 6,
    grid: int = 28,
    scale: int = 15,
) -> Any:
    """The regions of a few queries side by side, routed by the colours of an image.

    Args:
        image: `[H, W, 3]` uint8; None is a drawn scene.
        cells: row and column of each query on the grid.
        regions: regions per side.
        topk: regions that a region attends to.
        grid: cells per side.
        scale: pixels per cell.

    Returns:
        A PIL image.

    Raises:
        ConfigError: a cell that is not on the grid.
    """
    pixels = scene(grid * scale) if image is None else image
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    tensor = torch.nn.functional.interpolate(
        tensor, size=(grid * scale, grid * scale), mode="bilinear", antialias=True
    )
    features = torch.nn.functional.avg_pool2d(tensor, scale)[0].permute(1, 2, 0)
    features = features - features.mean((0, 1))
    features = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    shown: Pixels = (tensor[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    panels = []
    for cell in cells:
        keys = routed_cells(features, cell, regions, topk)
        detail = f"{topk} of {regions * regions} regions, {int(keys.sum())} of {grid * grid} keys"
        caption = f"row {cell[0]}, column {cell[1]}"
        panels.append(Cell(paint(shown, keys, cell, regions, scale), caption, detail))
    title = f"Bi-level routing by colour: {grid} x {grid} cells, {regions} x {regions} regions"
    return compose([panels], title, LEGEND)


def paint(
    pixels: Pixels, keys: NDArray[np.bool_], cell: tuple[int, int], regions: int, scale: int
) -> Pixels:
    """The image with what is not attended made pale, region rims and the query's cell."""
    mask = keys.repeat(scale, axis=0).repeat(scale, axis=1)
    pale = 255 - (255 - pixels.astype(np.float32)) * FAINT
    out: Pixels = np.where(mask[..., None], pixels, pale).round().astype(np.uint8)
    for axis, count in enumerate(keys.shape):
        side = -(-count // regions) * scale
        for edge in range(side, count * scale, side):
            if axis == 0:
                out[edge] = LINE
            else:
                out[:, edge] = LINE
    top, left = cell[0] * scale, cell[1] * scale
    out[top : top + scale, left : left + scale] = 255
    out[top + 2 : top + scale - 2, left + 2 : left + scale - 2] = QUERY
    return out


def scene(side: int) -> Pixels:
    """Sky, sun, meadow, a house and its tree: areas of few colours, some of them in two places."""
    y, x = np.mgrid[0:side, 0:side] / side
    out = np.empty((side, side, 3), dtype=np.uint8)
    out[:] = (150, 196, 240)
    out[y > 0.62] = (96, 160, 74)
    out[(x - 0.16) ** 2 + (y - 0.16) ** 2 < 0.1**2] = (250, 208, 72)
    out[(abs(x - 0.7) < 0.16) & (abs(y - 0.6) < 0.17)] = (188, 84, 64)
    out[(y > 0.26) & (y < 0.43) & (abs(x - 0.7) < (y - 0.26) * 1.3)] = (104, 58, 52)
    out[(abs(x - 0.25) < 0.03) & (y > 0.55) & (y < 0.8)] = (110, 76, 48)
    out[(x - 0.25) ** 2 + (y - 0.47) ** 2 < 0.14**2] = (64, 128, 60)
    out[(y > 0.86) & (abs(x - 0.5) < 0.45)] = (214, 196, 150)
    return out
