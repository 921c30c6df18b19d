"""MustDrop: tokens merge before the language model, go inside it, and leave the cache behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.errors import ScheduleError
from vistoken.methods.base import is_int, is_rate, require
from vistoken.models.llava import LanguageHost
from vistoken.vlm.base import Image, ImageMethod, Positions, Reduced
from vistoken.vlm.choose import top
from vistoken.vlm.inside import LayerMethod, Stages, checked_stages
from vistoken.vlm.layout import Layout
from vistoken.vlm.rows import check_rows

WINDOW = 3
CELLS = WINDOW * WINDOW
DEPTH, AFTER = 32, (2, 6, 10, 14)
"""The published stages: after these layers of so many."""


@dataclass(frozen=True)
class MustDrop(ImageMethod, LayerMethod):
    """Merge alike windows, drop what the text ignores, in stages (Liu et al., 2411.10803).

    Windows of 3 x 3 tokens that are most alike behind the tower's first layer become their mean;
    the `fixed` share with the largest class attention of the tower's last layer stays for good;
    after some decoder layers, tokens go that the text behind the first image looks at least, by
    sum and by maximum; in the end layers from the first stage on forget them in their caches, too.

    Published are thresholds, whose counts depend on the picture. Here windows merge from the most
    alike down, and the two thresholds of a stage are scaled together, until the counts are met.
    Merging is applied behind the projector, since packing needs whole maps.

    Args:
        budget: mean share of image tokens over the decoder layers, as published counts are.
        merged: share of the tokens outside padding that merging takes; None: like each later stage.
        fixed: share of the merged tokens that no stage drops, in [0, 1].
        after: rising 0-based decoder layers after which tokens go; None is 2, 6, 10 and 14 of 32.
        similarity: mean cosine in a window from which on it merges, with `paper`.
        thresholds: share of the attention's sum, and largest attention, that a token needs to stay.
        budget_policy: `exact` meets the budget; `paper` takes the thresholds as they are: budget
            and merged do nothing.
    """

    name: ClassVar[str] = "mustdrop"
    paper: ClassVar[str] = "Liu et al., 2024"
    reads: ClassVar[str] = "one tower output, one class row, the text's rows in some layers"
    guarantees: ClassVar[str] = "exactly floor(share * image tokens) per prompt and layer"
    row: ClassVar[Literal["before", "own", "text"]] = "text"
    evicts: ClassVar[bool] = True

    positions: Positions = field(default="original", kw_only=True)
    merged: float | None = None
    fixed: float = 0.08
    after: Sequence[int] | None = None
    similarity: float = field(default=0.8, kw_only=True)
    thresholds: Sequence[float] = field(default=(0.001, 0.001), kw_only=True)
    budget_policy: Literal["exact", "paper"] = field(default="exact", kw_only=True)

    def check(self) -> None:
        ok = self.merged is None or _share(self.merged)
        require(self, "merged", ok, "a number in [0, 1] or None")
        require(self, "fixed", _share(self.fixed), "a number in [0, 1]")
        if self.after is not None:
            given: Any = self.after
            layers = tuple(given) if isinstance(given, (list, tuple)) else (given,)
            ok = bool(layers) and all(is_int(x) and x >= 0 for x in layers)
            ok = ok and list(layers) == sorted(set(layers))
            require(self, "after", ok, "rising decoder layers, 0 is the first")
            object.__setattr__(self, "after", layers)
        ok = isinstance(self.similarity, (int, float)) and -1 <= self.similarity <= 1
        require(self, "similarity", ok, "a number in [-1, 1]")
        ok = isinstance(self.thresholds, (list, tuple)) and len(self.thresholds) == 2
        ok = ok and all(map(is_rate, self.thresholds))
        require(self, "thresholds", ok, "two numbers in (0, 1]")
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        require(self, "budget_policy", self.budget_policy in ("exact", "paper"), "exact or paper")

    @property
    def idle(self) -> bool:
        return self.budget == 1 and not self.by_threshold

    @property
    def by_threshold(self) -> bool:
        return self.budget_policy == "paper"

    def layers(self, host: LanguageHost) -> tuple[int, ...]:
        return (len(host.blocks) - 1,)

    def watched(self, host: LanguageHost) -> tuple[int, ...]:
        return (0,)

    def check_host(self, host: LanguageHost) -> None:
        check_rows(host, self.layers(host), self.name)

    def fitted(self, host: LanguageHost) -> MustDrop:
        if self.by_threshold or self.merged is not None:
            return self
        return replace(self, merged=1 - self.shares(len(host.decoder))[0])

    def last_layers(self, depth: int) -> tuple[int, ...]:
        """Layers after which tokens go, for a language model of `depth` layers."""
        if self.after is not None:
            return tuple(self.after)
        return tuple(sorted({depth * layer // DEPTH for layer in AFTER}))

    def shares(self, depth: int) -> tuple[float, ...]:
        """Share of image tokens behind merging and behind every stage; their mean is the budget.

        Raises:
            ScheduleError: no fall by equal factors has this mean.
        """
        cuts = [0, *(layer + 1 for layer in self.last_layers(depth)), depth]
        spans = [stop - start for start, stop in pairwise(cuts)]

        def at(factor: float) -> tuple[float, ...]:
            first = max(factor, 1 / CELLS) if self.merged is None else 1 - self.merged
            least = self.fixed * first
            return tuple(max(least, first * factor**stage) for stage in range(len(spans)))

        def mean(factor: float) -> float:
            return sum(s * n for s, n in zip(at(factor), spans, strict=True)) / depth

        if not mean(0) - 1e-9 <= self.budget <= mean(1) + 1e-9:
            raise ScheduleError(
                f"mustdrop: a mean share of {self.budget} is out of reach with {depth} layers, "
                f"merged={self.merged}, fixed={self.fixed} and stages after layers "
                f"{self.last_layers(depth)}; it can be {mean(0):.3g} to {mean(1):.3g}"
            )
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) < self.budget else (low, middle)
        return at(high)

    def stages(self, depth: int) -> Stages:
        after = self.last_layers(depth)
        if self.by_threshold:
            # Shares mean nothing then, but stages that share nothing would be left out.
            falls = {layer + 1: 1 / (stage + 2) for stage, layer in enumerate(after)}
        else:
            shares = self.shares(depth)[1:]
            falls = {layer + 1: share for layer, share in zip(after, shares, strict=True)}
        return checked_stages(self.name, falls, depth)

    def worth(self, total: Tensor, peak: Tensor) -> Tensor:
        of_sum, of_peak = self.thresholds
        share = total / total.sum(1, keepdim=True).clamp(min=1e-12)
        return torch.maximum(share / of_sum, peak / of_peak)

    def merging(self, layout: Layout) -> int:
        """Windows of one image that merge; None of them depends on the picture."""
        whole = len(windows(layout.side, layout.grid, layout.mosaic, layout.origin))
        return min(whole, int((self.merged or 0.0) * layout.candidates / (CELLS - 1) + 1e-9))

    def count(self, layout: Layout) -> int:
        return layout.candidates - (CELLS - 1) * self.merging(layout)

    def kept(self, layout: Layout) -> int | None:
        return None if self.by_threshold else super().kept(layout)

    def merges(self, image: Image) -> Tensor:
        """Places of the tokens of every window that merges `[r, 9]`."""
        layout = image.layout
        whole = windows(layout.side, layout.grid, layout.mosaic, layout.origin)
        whole = whole.to(image.features.device, non_blocking=True)
        assert layout.source is not None
        cells = image.outputs[0].flatten(0, 1)[layout.source[whole]].float()
        # The cosines of all pairs, from the length of the sum.
        alike = (F.normalize(cells, dim=-1).sum(1).square().sum(-1) - CELLS) / (CELLS * (CELLS - 1))
        if self.by_threshold:
            return whole[alike >= self.similarity]
        return whole[alike.argsort(descending=True, stable=True)[: self.merging(layout)]]

    def select(self, image: Image) -> Tensor:
        merged = self.merges(image)
        return (~image.layout.newline).index_fill(0, _others(merged), False)

    def reduce(self, image: Image) -> Reduced:
        index = self.places(image)
        with torch.no_grad():
            merged = self.merges(image)
            (row,) = image.rows.values()
            attention = image.packed(row.attention)
            attention = attention.index_put((merged[:, CELLS // 2],), attention[merged].mean(1))
            tokens = image.layout.candidates - (CELLS - 1) * len(merged)
            fixes = math.ceil(self.fixed * tokens - 1e-9)
            fixed = top(attention[index], fixes)
        means = image.features[merged].float().mean(1).to(image.features.dtype)
        features = image.features.index_put((merged[:, CELLS // 2],), means)
        return Reduced(features[index], index, fixed, fixes)


def _others(merged: Tensor) -> Tensor:
    """The tokens that go into the middle one of their window."""
    half = CELLS // 2
    return torch.cat([merged[:, :half], merged[:, half + 1 :]], 1).flatten()


@lru_cache(maxsize=256)
def windows(
    side: tuple[int, int], grid: tuple[int, int], mosaic: tuple[int, int], origin: tuple[int, int]
) -> Tensor:
    """Places of the tokens of every whole window of every partition `[W, 9]`, on the host.

    Windows tile a partition from its first row and column; those that padding cuts are left out.
    """
    rows, columns = side
    place = torch.full((1 + grid[0] * grid[1], rows, columns), -1)
    place[0] = torch.arange(rows * columns).view(rows, columns)
    if mosaic != (0, 0):
        canvas = torch.full((grid[0] * rows, grid[1] * columns), -1)
        # One more column than the mosaic has: its newlines.
        inner = torch.arange(mosaic[0] * (mosaic[1] + 1)).view(mosaic[0], -1)[:, :-1]
        down, right = (slice(o, o + n) for o, n in zip(origin, mosaic, strict=True))
        canvas[down, right] = inner + rows * columns
        crops = canvas.view(grid[0], rows, grid[1], columns).transpose(1, 2)
        place[1:] = crops.reshape(-1, rows, columns)
    tiles = place.unfold(1, WINDOW, WINDOW).unfold(2, WINDOW, WINDOW).reshape(-1, CELLS)
    return tiles[(tiles >= 0).all(1)]


def _share(value: Any) -> bool:
    """True for numbers in [0, 1]."""
    return value == 0 or is_rate(value)
