"""HiRED: the thumbnail's early class row sets each crop's budget, late class rows fill it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistoken.methods.base import is_int, require
from vistoken.models.llava import LanguageHost
from vistoken.vlm.base import Image, ImageMethod, Share
from vistoken.vlm.choose import allocate, ranks, top, top_by_segment
from vistoken.vlm.layout import Layout, regions
from vistoken.vlm.rows import check_rows


@dataclass(frozen=True)
class HiRED(ImageMethod):
    """Keep what the class token looks at, crop by crop (Arif et al., AAAI 2025, 2408.10945).

    A share `alpha` of the budget goes to the thumbnail; the rest is split over the crops by the
    attention that the thumbnail's class token pays, in layer `first`, to the region under each
    crop; inside every partition the tokens with the largest class attention of layer `last` stay.

    Args:
        budget: share of the raw tokens, padding included.
        alpha: share of the budget for the thumbnail, in [0, 1].
        first: tower layer that splits the budget.
        last: tower layer that ranks tokens; None is the one whose output the projector reads.
        regions: `exact` maps thumbnail to crops through the padding, `grid` ignores padding;
            `strips` is what the published code does: it counts the `1 - alpha` most attended
            patches in equal strips of the raster, whatever lies under a crop.
        budget_policy: `exact` ranks only tokens that survive unpadding and meets the budget to the
            token; `paper` rounds down at every step, and tokens in padding are lost.
    """

    name: ClassVar[str] = "hired"
    paper: ClassVar[str] = "Arif et al., AAAI 2025"
    guarantees: ClassVar[str] = "exactly floor(budget * raw tokens) per image, newlines aside"
    reads: ClassVar[str] = "class rows of two tower layers"
    budget_of: ClassVar[Share] = "raw"

    alpha: float = 0.5
    first: int = 0
    last: int | None = None
    regions: Literal["exact", "grid", "strips"] = field(default="exact", kw_only=True)
    budget_policy: Literal["exact", "paper"] = field(default="exact", kw_only=True)

    def check(self) -> None:
        ok = isinstance(self.alpha, (int, float)) and 0 <= self.alpha <= 1
        require(self, "alpha", ok, "a number in [0, 1]")
        require(self, "first", is_int(self.first) and self.first >= 0, "an integer >= 0")
        ok = self.last is None or (is_int(self.last) and self.last >= 0)
        require(self, "last", ok, "an integer >= 0 or None")
        known = ("exact", "grid", "strips")
        require(self, "regions", self.regions in known, f"one of {known}")
        require(self, "budget_policy", self.budget_policy in ("exact", "paper"), "exact or paper")

    def layers(self, host: LanguageHost) -> tuple[int, ...]:
        last = host.consumed if self.last is None else self.last
        crops = host.spec.packing == "anyres"
        return tuple(sorted({self.first, last})) if crops else (last,)

    def check_host(self, host: LanguageHost) -> None:
        check_rows(host, self.layers(host), self.name)

    def kept(self, layout: Layout) -> int | None:
        return None if self.budget_policy == "paper" else super().kept(layout)

    def select(self, image: Image) -> Tensor:
        layout = image.layout
        scores = image.rows[image.consumed if self.last is None else self.last].attention
        total = self.count(layout)
        if layout.grid == (0, 0):
            return top(image.packed(scores), total)
        mass = self.crop_mass(layout, image.rows[self.first].attention[0])
        if self.budget_policy == "paper":
            return self.select_paper(image, scores, mass)
        thumb, crops = layout.sizes[0], layout.sizes[1:]
        first = min(thumb, max(int(self.alpha * total), total - sum(crops)))
        budgets = allocate(mass, crops, total - first)
        if total - first > sum(crops):
            first = total - sum(crops)
        budgets = torch.cat([budgets.new_full((1,), first), budgets])
        return top_by_segment(image.packed(scores), layout.segment, layout.sizes, budgets)

    def crop_mass(self, layout: Layout, row: Tensor) -> Tensor:
        """Attention `[k]` that falls on the region under every crop, from the row `[N]`."""
        crops = layout.grid[0] * layout.grid[1]
        if self.regions == "strips":
            marks = ranks(row) < int(row.shape[0] * (1 - self.alpha) + 1e-9)
            return torch.stack([part.sum() for part in marks.tensor_split(crops)]).to(row.dtype)
        under = regions(layout, self.regions == "exact").to(row.device, non_blocking=True)
        parts = torch.arange(crops, device=row.device)
        return (under == parts[:, None]).to(row.dtype) @ row

    def select_paper(self, image: Image, scores: Tensor, mass: Tensor) -> Tensor:
        """Rounding down at every step, padding ranked with the rest `[V]`."""
        layout = image.layout
        tokens = scores.shape[1]
        total = int(self.budget * layout.raw + 1e-9)
        first = min(int(self.alpha * total), tokens)
        rest = min(total - first, tokens * mass.shape[0])
        budgets = (
            ((total - first) * mass / mass.sum().clamp(min=1e-12))
            .floor()
            .clamp(max=min(rest, tokens))
        )
        budgets = torch.cat([budgets.new_full((1,), first), budgets])
        kept = ranks(scores) < budgets[:, None]
        assert layout.source is not None
        return kept.flatten()[layout.source.clamp(min=0)] & ~layout.newline
