"""Baselines that every score must beat: tokens at random, and pooled tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.methods.base import is_int, require
from vistoken.vlm.base import Image, ImageMethod, Reduced
from vistoken.vlm.choose import index_of
from vistoken.vlm.layout import Layout


@dataclass(frozen=True)
class RandomTokens(ImageMethod):
    """Keep tokens at random: the same places for every image of one size.

    Args:
        budget: share of the tokens outside padding.
        seed: another seed, other places.
    """

    name: ClassVar[str] = "random_tokens"
    paper: ClassVar[str] = "baseline"
    guarantees: ClassVar[str] = "exactly floor(budget * tokens) per image, newlines aside"

    seed: int = 0

    def check(self) -> None:
        require(self, "seed", is_int(self.seed) and self.seed >= 0, "an integer >= 0")

    def select(self, image: Image) -> Tensor:
        layout = image.layout
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(layout.candidates, generator=generator)[: self.count(layout)]
        chosen = torch.zeros(layout.candidates, dtype=torch.bool)
        chosen[order] = True
        places = torch.zeros(layout.tokens, dtype=torch.bool, device=layout.segment.device)
        real = index_of(~layout.newline, layout.candidates)
        return places.index_put((real,), chosen.to(places.device, non_blocking=True))


@dataclass(frozen=True)
class PoolTokens(ImageMethod):
    """Average neighbouring tokens on the thumbnail's grid and on the mosaic of crops.

    Args:
        budget: share of the tokens outside padding; the result has at most that many.
    """

    name: ClassVar[str] = "pool_tokens"
    paper: ClassVar[str] = "baseline"
    guarantees: ClassVar[str] = "at most floor(budget * tokens) per image, known from its size"

    def windows(self, layout: Layout) -> list[tuple[int, int, int, int]]:
        """(rows, columns, pooled rows, pooled columns) of every map."""
        side = layout.side if layout.side != (0, 0) else (1, layout.sizes[0])
        maps = [side] + ([layout.mosaic] if layout.mosaic != (0, 0) else [])
        total, found = self.count(layout), []
        for rows, columns in maps:
            share = max(1, total * rows * columns // layout.candidates)
            high = max(1, min(rows, int((share * rows / columns) ** 0.5)))
            found.append((rows, columns, high, max(1, min(columns, share // high))))
        return found

    def kept(self, layout: Layout) -> int | None:
        tokens = sum(high * wide for _, _, high, wide in self.windows(layout))
        ends = {"drop": 0, "all": layout.newlines}.get(self.newlines)
        return None if ends is None and layout.newlines else tokens + (ends or 0)

    def select(self, image: Image) -> Tensor:
        centres = torch.zeros(image.layout.tokens, dtype=torch.bool)
        for places in self.centres(image.layout):
            centres[places] = True
        return centres.to(image.features.device, non_blocking=True)

    def centres(self, layout: Layout) -> list[Tensor]:
        """The token in the middle of every window, per map, rising."""
        found, start = [], 0
        for number, (rows, columns, high, wide) in enumerate(self.windows(layout)):
            row = (torch.arange(high) * 2 + 1) * rows // (2 * high)
            column = (torch.arange(wide) * 2 + 1) * columns // (2 * wide)
            width = columns + (1 if number else 0)
            found.append((start + row[:, None] * width + column).flatten())
            start += layout.sizes[0]
        return found

    def reduce(self, image: Image) -> Reduced:
        layout, index = image.layout, self.places(image)
        values, start = [], 0
        for number, (rows, columns, high, wide) in enumerate(self.windows(layout)):
            width = columns + (1 if number else 0)
            grid = image.features[start : start + rows * width].view(rows, width, -1)[:, :columns]
            pooled = F.adaptive_avg_pool2d(grid.permute(2, 0, 1).float(), (high, wide))
            values.append(pooled.flatten(1).T.to(image.features.dtype))
            start += layout.sizes[0]
        centres = torch.cat(self.centres(layout)).to(index.device, non_blocking=True)
        whole = image.features.index_put((centres,), torch.cat(values))
        return Reduced(whole[index], index)
