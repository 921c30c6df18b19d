"""A picture of neighborhood attention: the cells that single queries attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vistoken.errors import ConfigError
from vistoken.kernels.neighborhood import na2d
from vistoken.view.picture import Pixels
from vistoken.view.sheet import Cell, compose

OTHER, KEY, QUERY, LINE = (238, 238, 242), (120, 170, 222), (214, 84, 48), (255, 255, 255)
LEGEND = (
    "orange: the query, a key too   ·   blue: the keys it attends to   ·   grey: all other cells"
)


@dataclass(frozen=True)
class Query:
    """One query of neighborhood attention.

    Attributes:
        cell: row and column on the grid.
        window: keys per axis.
        dilation: cells from one key to the next.
        stride: queries per axis that share one window.
        note: first line of the caption.
    """

    cell: tuple[int, int]
    window: int = 7
    dilation: int = 1
    stride: int = 1
    note: str = ""

    def keys(self, grid: tuple[int, int]) -> NDArray[np.bool_]:
        """Mask `[rows, columns]` of the cells attended to, as the operator itself has it.

        Raises:
            ConfigError: the cell is not on the grid, or the window does not fit.
        """
        rows, columns = grid
        if not (0 <= self.cell[0] < rows and 0 <= self.cell[1] < columns):
            raise ConfigError(f"cell={self.cell}: must be on the grid of {rows} x {columns} cells")
        cells = rows * columns
        q = torch.zeros(1, rows, columns, 1, 1)
        one_hot = torch.eye(cells).view(1, rows, columns, 1, cells)
        out = na2d(q, q, one_hot, self.window, self.stride, self.dilation)
        assert isinstance(out, torch.Tensor)
        weights = out[0, self.cell[0], self.cell[1], 0]
        return (weights > 0).view(rows, columns).numpy()


EXAMPLES = (
    Query((7, 6), note="in the middle"),
    Query((1, 12), note="near a corner: the window moves inwards"),
    Query((7, 6), dilation=2, note="dilation 2: every second cell"),
)


def draw_windows(
    queries: Sequence[Query] = EXAMPLES, grid: tuple[int, int] = (14, 14), scale: int = 30
) -> Any:
    """The windows of a few queries side by side.

    Args:
        queries: one panel each.
        grid: rows and columns of cells.
        scale: pixels per cell.

    Returns:
        A PIL image.

    Raises:
        ConfigError: a query that does not fit the grid.
    """
    panels = []
    for query in queries:
        keys = query.keys(grid)
        detail = f"window {query.window} x {query.window}, {int(keys.sum())} keys"
        panels.append(Cell(paint(keys, query.cell, scale), query.note, detail))
    return compose([panels], f"Neighborhood attention on {grid[0]} x {grid[1]} cells", LEGEND)


def paint(keys: NDArray[np.bool_], cell: tuple[int, int], scale: int) -> Pixels:
    """Cells as squares with hair lines between them, `[rows * scale, columns * scale, 3]`."""
    colors = np.where(keys[..., None], np.array(KEY), np.array(OTHER)).astype(np.uint8)
    colors[cell] = QUERY
    out: Pixels = colors.repeat(scale, axis=0).repeat(scale, axis=1)
    out[::scale], out[:, ::scale] = LINE, LINE
    return out
