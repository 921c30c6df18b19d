"""Pixels of one panel: an image whose patches are kept, merged or pruned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Groups = NDArray[np.int64]

LINE = (255, 255, 255)
EDGE = (20, 20, 20)
DARKEN = 0.28
HATCH = (92, 92, 100)
HATCH_PERIOD = 10


@dataclass(frozen=True)
class Panel:
    """What happened to every patch of one image after one block.

    Attributes:
        pixels: the image `[H, W, 3]`, as the model sees it.
        groups: `[h, w]`, the token that stands for each patch; -1 for pruned patches.
    """

    pixels: Pixels
    groups: Groups

    def edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pixel rows and columns at which patches begin, and the end."""
        (rows, cols), (height, width) = self.groups.shape, self.pixels.shape[:2]
        return (
            np.linspace(0, height, rows + 1).round().astype(np.int64),
            np.linspace(0, width, cols + 1).round().astype(np.int64),
        )

    def cells(self) -> Groups:
        """`groups` for every pixel, `[H, W]`."""
        tops, lefts = self.edges()
        return self.groups.repeat(np.diff(tops), axis=0).repeat(np.diff(lefts), axis=1)

    def merged(self) -> set[int]:
        """Tokens that stand for two patches or more."""
        tokens, sizes = np.unique(self.groups[self.groups >= 0], return_counts=True)
        return {int(token) for token, size in zip(tokens, sizes, strict=True) if size > 1}

    def paint(self) -> Pixels:
        """Merged groups in their mean colour, pruned patches dark, the others as they are.

        Returns:
            `[H, W, 3]`, without hatching and outlines.
        """
        cells, out = self.cells(), self.pixels.copy()
        for token in self.merged():
            where = cells == token
            out[where] = np.rint(self.pixels[where].mean(0)).astype(np.uint8)
        gone = cells < 0
        grey = self.pixels[gone].mean(-1, keepdims=True).repeat(3, -1)
        out[gone] = (grey * DARKEN).astype(np.uint8)
        return out

    def draw(self, scale: int) -> Pixels:
        """The painted panel enlarged, with hatching and outlines.

        Args:
            scale: whole factor by which pixels are enlarged.

        Returns:
            `[H * scale, W * scale, 3]`.
        """
        cells = self.cells().repeat(scale, axis=0).repeat(scale, axis=1)
        out = self.paint().repeat(scale, axis=0).repeat(scale, axis=1)
        height, width = cells.shape
        diagonal = np.arange(height)[:, None] + np.arange(width)
        out[(cells < 0) & (diagonal % HATCH_PERIOD < 1 + scale // 2)] = HATCH
        lines = outlines(cells, max(1, scale // 2))
        singles = ~np.isin(cells, list(self.merged()) or [-2])
        # Kept patches get a hair line, or a dense grid of single tokens would hide the picture.
        hair = outlines(cells, 1) & singles
        out[lines & ~singles] = LINE
        out[hair] = (0.35 * out[hair] + 0.65 * np.array(EDGE)).astype(np.uint8)
        return out


def outlines(cells: Groups, thickness: int) -> NDArray[np.bool_]:
    """Mask of the pixels next to a pixel of another token, `[H, W]`.

    Args:
        cells: token of every pixel `[H, W]`.
        thickness: pixels on either side of a border.
    """
    mask = np.zeros(cells.shape, dtype=bool)
    down, right = cells[1:] != cells[:-1], cells[:, 1:] != cells[:, :-1]
    mask[1:] |= down
    mask[:-1] |= down
    mask[:, 1:] |= right
    mask[:, :-1] |= right
    for _ in range(thickness - 1):
        wider = mask.copy()
        wider[1:] |= mask[:-1]
        wider[:-1] |= mask[1:]
        wider[:, 1:] |= mask[:, :-1]
        wider[:, :-1] |= mask[:, 1:]
        mask = wider
    return mask
