"""Token Merging (ToMe), Bolya et al., ICLR 2023, arXiv 2210.09461."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from vistoken.errors import ScheduleError
from vistoken.kernels.match import unit
from vistoken.kernels.reduce import take
from vistoken.methods.base import Features, Method, Need, at_count, is_int, require
from vistoken.schedule import Schedule, Step
from vistoken.shape import ModelShape
from vistoken.state import Assignment, TokenState


@dataclass(frozen=True)
class ToMe(Method):
    """Merge the r most similar pairs of tokens in every block.

    Tokens at even positions look for their most similar partner among those at odd positions, by
    the cosine of head-averaged keys; the r best pairs merge into their size-weighted mean.
    Attention weighs keys by size (proportional attention): right for supervised models, off for MAE
    models used without fine-tuning (section 4.2 of the paper).

    Args:
        r: tokens merged per block; a list gives one number per block and is padded with zeros.
        schedule: `constant`, or `decreasing`: from 2r in the first block to 0 in the last.
        proportional: add log(size) to every attention score.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "Token Merging, ICLR 2023"
    guarantees: ClassVar[str] = "sizes sum to N0; identical tokens merge without loss"

    r: int | Sequence[int] = 13
    schedule: Literal["constant", "decreasing"] = "constant"
    proportional: bool = True

    def check(self) -> None:
        """Check r and the schedule's name."""
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))
        many = isinstance(self.r, tuple) and all(is_int(n) and n >= 0 for n in self.r)
        require(self, "r", many or (is_int(self.r) and self.r >= 0), "an integer >= 0, or a list")  # type: ignore[operator]
        kinds = ("constant", "decreasing")
        require(self, "schedule", self.schedule in kinds, f"one of {kinds}")
        alone = not (many and self.schedule == "decreasing")
        require(self, "schedule", alone, "'constant' when r is a list")

    @property
    def needs(self) -> frozenset[Need]:
        """Keys."""
        return frozenset({Need.KEY})

    def counts(self, shape: ModelShape) -> Schedule:
        """Merge r tokens per block, at most half of the block's patch tokens."""
        return Schedule.merging(shape, self.removals(shape.depth))

    def plan(self, shape: ModelShape) -> Schedule:
        """Counts after `round_to`, still at most half of a block's patch tokens at a time."""
        return Schedule.merging(shape, self.removals(shape.depth), self.round_to)

    def removals(self, depth: int) -> tuple[int, ...]:
        """Tokens to merge in each of `depth` blocks, before the cap of one half."""
        if not is_int(self.r):
            numbers = tuple(self.r)  # type: ignore[arg-type]
            if len(numbers) > depth:
                raise ScheduleError(f"r has {len(numbers)} entries, the model has {depth} blocks")
            return numbers + (0,) * (depth - len(numbers))
        r = int(self.r)  # type: ignore[arg-type]
        if self.schedule == "constant" or depth == 1:
            return (r,) * depth
        return tuple(int(2 * r - 2 * r * block / (depth - 1)) for block in range(depth))

    def assign(self, features: Features, state: TokenState, step: Step) -> Assignment:
        """Bipartite soft matching (section 3 of the paper)."""
        assert features.key is not None
        scores = cosine_scores(features.key)
        return bipartite(scores, step.tokens - step.merged, state, features.x)

    @classmethod
    def at_gflops(cls, shape: ModelShape, gflops: float) -> Self:
        """Constant r for a cost of at most `gflops` G."""
        return cls(r=at_count(lambda r: cls(r=r), shape, gflops))


def cosine_scores(metric: Tensor) -> Tensor:
    """Cosine of the tokens at even positions with those at odd positions.

    Args:
        metric: `[B, N, d]`.

    Returns:
        `[B, ceil(N / 2), floor(N / 2)]`.
    """
    metric = unit(metric)
    return metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)


def bipartite(scores: Tensor, r: int, state: TokenState, x: Tensor) -> Assignment:
    """Merge the r even-position tokens with the best partner into that partner.

    Slots: prefix tokens, the even-position tokens left over in their order, then all odd-position
    tokens; this order decides who meets whom in the next block.

    Args:
        scores: `[B, N_even, N_odd]`; rows and columns of prefix tokens are excluded here.
        r: tokens to merge.
        state: current tokens.
        x: any tensor on the right device.
    """
    prefix = state.prefix
    even_prefix, odd_prefix = (prefix + 1) // 2, prefix // 2
    scores = scores[:, even_prefix:, odd_prefix:]
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, left = order[:, :r], order[:, r:].sort(-1).values

    batch = scores.shape[0]
    first = torch.arange(prefix, device=x.device).expand(batch, -1)
    odd = torch.arange(odd_prefix, scores.shape[2] + odd_prefix, device=x.device) * 2 + 1
    keep = torch.cat([first, (left + even_prefix) * 2, odd.expand(batch, -1)], 1)
    dst = take(partner, merged) + prefix + left.shape[1]
    return Assignment(
        keep=keep,
        src=(merged + even_prefix) * 2,
        dst=dst,
        weight=state.sizes(x),
    )
