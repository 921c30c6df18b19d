"""GlobalCom2: the thumbnail says how much of each crop stays, and helps to say what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.errors import UnsupportedMethodError
from vistoken.methods.base import require
from vistoken.models.llava import LanguageHost
from vistoken.vlm.base import Image, ImageMethod
from vistoken.vlm.choose import allocate, top_by_segment
from vistoken.vlm.layout import regions
from vistoken.vlm.rows import check_rows


@dataclass(frozen=True)
class GlobalCom2(ImageMethod):
    """Keep more of the crops the thumbnail finds important (Liu et al., AAAI 2026, 2501.05179).

    With `S_m` the thumbnail's score over crop m and `k` crops, crop m keeps the rate
    `R (1 + softmax(S / tau)_m - 1 / k)`, at most 1. Inside a crop, tokens are ranked by their own
    score plus the thumbnail's, enlarged to the mosaic, each divided by its norm over the crop.

    Args:
        budget: R, share of the tokens outside padding.
        tau: temperature of the softmax.
        score: `logits` of the class token (as published), its `attention`, or for towers without
            one the `distance` of a feature from its crop's mean, `-cos`.
    """

    name: ClassVar[str] = "globalcom2"
    paper: ClassVar[str] = "Liu et al., AAAI 2026"
    guarantees: ClassVar[str] = "exactly floor(budget * tokens) per image, newlines aside"
    reads: ClassVar[str] = "class row of the last tower layer, or features"

    tau: float = 10.0
    score: Literal["logits", "attention", "distance"] = field(default="logits", kw_only=True)

    def check(self) -> None:
        ok = isinstance(self.tau, (int, float)) and self.tau > 0
        require(self, "tau", ok, "a number above 0")
        kinds = ("logits", "attention", "distance")
        require(self, "score", self.score in kinds, f"one of {kinds}")

    def layers(self, host: LanguageHost) -> tuple[int, ...]:
        return () if self.score == "distance" else (len(host.blocks) - 1,)

    def check_host(self, host: LanguageHost) -> None:
        if self.score != "distance":
            check_rows(host, self.layers(host), self.name)
        if host.spec.rotary_3d:
            raise UnsupportedMethodError(
                f"{self.name} needs images of thumbnail and crops or square grids, which "
                f"{host.spec.family} does not make"
            )

    def scores(self, image: Image) -> Tensor:
        """One score per token `[V]`, fp32; -inf at newlines."""
        layout = image.layout
        if self.score == "distance":
            return distance_from_mean(image.features, layout.segment, len(layout.sizes))
        (row,) = image.rows.values()
        return image.packed(row.attention if self.score == "attention" else row.logits.mean(1))

    def select(self, image: Image) -> Tensor:
        layout, local = image.layout, self.scores(image)
        total, thumb, crops = self.count(layout), layout.sizes[0], layout.sizes[1:]
        if not crops:
            return top_by_segment(local, layout.segment, layout.sizes, _one(total, local))
        first = min(thumb, max(int(self.budget * thumb + 1e-9), total - sum(crops)))
        whole = local[:thumb]
        under = regions(layout).to(local.device, non_blocking=True)
        parts = torch.arange(len(crops), device=local.device)
        mass = (under == parts[:, None]).to(whole.dtype) @ whole
        rate = self.budget * (1 + (mass / self.tau).softmax(0) - 1 / len(crops))
        share = rate.clamp(max=1) * torch.tensor(crops).to(local.device, non_blocking=True)
        budgets = torch.cat([_one(first, local), allocate(share, crops, total - first)])
        enlarged = F.interpolate(
            whole.view(1, 1, *layout.side), layout.mosaic, mode="bilinear", align_corners=False
        )[0, 0]
        enlarged = F.pad(enlarged, (0, 1)).flatten()  # a newline ends every row
        mosaic, segment = local[thumb:].clamp(min=-1e30), layout.segment[thumb:]
        both = _unit(enlarged, segment, len(crops)) + _unit(mosaic, segment, len(crops))
        return top_by_segment(torch.cat([whole, both]), layout.segment, layout.sizes, budgets)


def _one(value: int, like: Tensor) -> Tensor:
    """`[1]` int64 on the device."""
    return torch.full((1,), value, dtype=torch.long, device=like.device)


def _unit(values: Tensor, segment: Tensor, crops: int) -> Tensor:
    """Values divided by their norm over their crop `[V]`; 0 at newlines."""
    values = values.masked_fill(segment < 0, 0)
    member = segment == torch.arange(1, crops + 1, device=values.device)[:, None]
    norm = (member.to(values.dtype) @ values.square()).sqrt().clamp(min=1e-12)
    return values / norm[(segment - 1).clamp(min=0)]


def distance_from_mean(features: Tensor, segment: Tensor, parts: int) -> Tensor:
    """`-cos` of every feature `[V, C]` to the mean of its partition `[V]`; -inf at newlines."""
    x = features.float()
    member = (segment == torch.arange(parts, device=x.device)[:, None]).to(x.dtype)
    mean = (member @ x) / member.sum(1, keepdim=True).clamp(min=1)
    found = -F.cosine_similarity(x, mean[segment.clamp(min=0)], dim=-1)
    return found.masked_fill(segment < 0, float("-inf"))
