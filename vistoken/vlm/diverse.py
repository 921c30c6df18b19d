"""Tokens that differ: max-min diversity, dominant tokens with merged rest, attention by strips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.farthest import farthest_first
from vistoken.methods.base import is_int, is_rate, require
from vistoken.models.llava import LanguageHost
from vistoken.vlm.base import Image, ImageMethod, Reduced
from vistoken.vlm.choose import allocate, index_of, split, top_by_segment
from vistoken.vlm.layout import Layout
from vistoken.vlm.rows import check_rows


@dataclass(frozen=True)
class MaxMin(ImageMethod):
    """Keep tokens far from each other, one after the other (the rule of DivPrune, 2503.02175).

    The first is the token whose nearest neighbour is farthest; each next one has the largest
    distance `1 - cos` to its nearest kept token. Takes as many steps as tokens are kept.

    Args:
        budget: share of the tokens outside padding.
    """

    name: ClassVar[str] = "max_min"
    paper: ClassVar[str] = "rule of Alvar et al., CVPR 2025"
    guarantees: ClassVar[str] = "exactly floor(budget * tokens) per image, newlines aside"
    reads: ClassVar[str] = "projected features"

    def select(self, image: Image) -> Tensor:
        layout = image.layout
        real = index_of(~layout.newline, layout.candidates)
        if len(real) < 2:
            return ~layout.newline
        picks = farthest_first(image.features[real], self.count(layout))
        return torch.zeros_like(layout.newline).index_fill(0, real[picks], True)


@dataclass(frozen=True)
class VisionZip(ImageMethod):
    """Keep what the class token looks at, merge a part of the rest (Yang et al., CVPR 2025).

    `merged` of the budget are centres, evenly spaced among the tokens that are not dominant; every
    other token joins the centre of the most similar mean key, and a centre becomes itself plus the
    mean of those that joined it (2412.04467). Every partition has an equal share of dominant
    tokens.

    Args:
        budget: share of the tokens outside padding.
        merged: share of the budget for merged tokens, in [0, 1).
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "Yang et al., CVPR 2025"
    guarantees: ClassVar[str] = "exactly floor(budget * tokens) per image, newlines aside"
    reads: ClassVar[str] = "class row and keys of one tower layer"

    merged: float = 0.15

    def check(self) -> None:
        ok = isinstance(self.merged, (int, float)) and 0 <= self.merged < 1
        require(self, "merged", ok, "a number in [0, 1)")

    def layers(self, host: LanguageHost) -> tuple[int, ...]:
        return (host.consumed,)

    def check_host(self, host: LanguageHost) -> None:
        check_rows(host, self.layers(host), self.name)

    def parts(self, layout: Layout) -> tuple[int, int]:
        """Dominant and merged tokens of one image."""
        total = self.count(layout)
        centres = int(self.merged * total)
        return total - centres, centres

    def roles(self, image: Image) -> tuple[Tensor, Tensor, Tensor]:
        """Dominant `[V]` bool; places of centres `[C]` and of the others `[M]`."""
        layout = image.layout
        dominant, centres = self.parts(layout)
        scores = image.packed(image.rows[image.consumed].attention)
        budgets = torch.tensor(split(dominant, layout.sizes)).to(scores.device, non_blocking=True)
        chosen = top_by_segment(scores, layout.segment, layout.sizes, budgets)
        rest = index_of(~chosen & ~layout.newline, layout.candidates - dominant)
        spots = torch.zeros(len(rest), dtype=torch.bool)
        spots[torch.arange(centres) * len(rest) // max(centres, 1)] = True
        spots = spots.to(rest.device, non_blocking=True)
        order = index_of(spots, centres), index_of(~spots, len(rest) - centres)
        return chosen, rest[order[0]], rest[order[1]]

    def select(self, image: Image) -> Tensor:
        chosen, centres, _ = self.roles(image)
        return chosen.index_fill(0, centres, True)

    def reduce(self, image: Image) -> Reduced:
        index = self.places(image)
        with torch.no_grad():
            _, centres, others = self.roles(image)
        if len(centres) == 0 or len(others) == 0:
            return Reduced(image.features[index], index)
        source = image.layout.source
        assert source is not None
        keys = F.normalize(image.rows[image.consumed].keys.flatten(0, 1), dim=-1)
        near = (keys[source[others]] @ keys[source[centres]].T).argmax(1)
        joined = (near == torch.arange(len(centres), device=near.device)[:, None]).float()
        x = image.features.float()
        mean = joined @ x[others] / joined.sum(1, keepdim=True).clamp(min=1)
        merged = (x[centres] + mean).to(image.features.dtype)
        return Reduced(image.features.index_put((centres,), merged)[index], index)


@dataclass(frozen=True)
class HoloV(ImageMethod):
    """Spread the budget over strips of the image by attention and variety (NeurIPS 2025).

    The tokens are cut into `strips` in their order. A token counts by its class attention plus the
    variance of its similarities inside the strip, scaled to the attention's mean; strips share the
    budget by their mean, and inside a strip the attention decides. The published scaling of the
    variance is not stated in closed form; this one is ours.

    Args:
        budget: share of the tokens outside padding.
        strips: parts of the token list, at least 1.
        variety: weight of the variance.
    """

    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "rule of HoloV, NeurIPS 2025"
    guarantees: ClassVar[str] = "exactly floor(budget * tokens) per image, newlines aside"
    reads: ClassVar[str] = "class row of one tower layer, projected features"

    strips: int = 16
    variety: float = 0.1

    def check(self) -> None:
        require(self, "strips", is_int(self.strips) and self.strips >= 1, "an integer >= 1")
        ok = self.variety == 0 or is_rate(self.variety)
        require(self, "variety", ok, "a number in [0, 1]")

    def layers(self, host: LanguageHost) -> tuple[int, ...]:
        return (host.consumed,)

    def check_host(self, host: LanguageHost) -> None:
        check_rows(host, self.layers(host), self.name)

    def select(self, image: Image) -> Tensor:
        layout = image.layout
        real = index_of(~layout.newline, layout.candidates)
        attention = image.packed(image.rows[image.consumed].attention)[real]
        x = F.normalize(image.features[real].float(), dim=-1)
        sizes = split(len(x), (1,) * min(self.strips, len(x)))
        spread = torch.cat([(part @ part.T).var(1, correction=0) for part in x.split(sizes)])
        scale = attention.mean() / spread.mean().clamp(min=1e-12)
        worth = attention + self.variety * scale * spread
        means = torch.stack([part.mean() for part in worth.split(sizes)])
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        owner = owner.to(real.device, non_blocking=True)
        budgets = allocate(means, sizes, self.count(layout))
        chosen = top_by_segment(attention, owner, sizes, budgets)
        return torch.zeros_like(layout.newline).index_put((real,), chosen)
