"""EViT, Liang et al., ICLR 2022, arXiv 2202.07800."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from vistoken.kernels.ranking import rank_tokens
from vistoken.kernels.reduce import take
from vistoken.methods.base import (
    Features,
    Method,
    Need,
    as_blocks,
    at_rate,
    is_rate,
    require,
)
from vistoken.schedule import Schedule, Step
from vistoken.shape import ModelShape
from vistoken.state import Assignment, TokenState


@dataclass(frozen=True)
class EViT(Method):
    """Keep the patches that the class token attends to, fuse the others into one token.

    Candidates are the patch tokens only: class, distillation and register tokens stay. The fused
    token is `sum a_j x_j` over the dropped tokens, with their attention as is (not renormalised).

    Args:
        keep_rate: share of the patch tokens kept at each chosen block, in (0, 1].
        at: blocks that reduce, 0 is the first (the paper's 4, 7, 10 are 3, 6, 9 here).
        fuse: append the fused token.
    """

    name: ClassVar[str] = "evit"
    paper: ClassVar[str] = "EViT, ICLR 2022"
    guarantees: ClassVar[str] = "the most attended patches stay; order of tokens does not matter"

    keep_rate: float = 0.7
    at: Sequence[int] = (3, 6, 9)
    fuse: bool = True

    def check(self) -> None:
        """Check the rate and the blocks."""
        require(self, "keep_rate", is_rate(self.keep_rate), "in (0, 1]")
        as_blocks(self, "at")

    @property
    def needs(self) -> frozenset[Need]:
        """The class tokens' attention."""
        return frozenset({Need.CLASS_ROW})

    def counts(self, shape: ModelShape) -> Schedule:
        """`ceil(keep_rate * patches)` at each chosen block, and the fused token."""

        def kept(block: int, patches: int) -> int:
            if block not in self.at:
                return patches
            return math.ceil(self.keep_rate * patches - 1e-9) + int(self.fuse)

        return Schedule.pruning(shape, kept)

    def assign(self, features: Features, state: TokenState, step: Step) -> Assignment:
        """Sort patches by the class tokens' attention; fuse the tail."""
        assert features.class_row is not None
        order = rank_tokens(features.class_row, state.prefix)
        keep, tail = order[:, : step.merged], order[:, step.merged :]
        if not self.fuse:
            return Assignment(keep=keep)
        weight = torch.ones_like(features.class_row)
        members = order[:, step.merged - 1 :]
        weight = weight.scatter(1, members, take(features.class_row, members))
        dst = torch.full_like(tail, step.merged - 1)
        return Assignment(keep=keep, src=tail, dst=dst, weight=weight, rule="sum")

    @classmethod
    def at_gflops(cls, shape: ModelShape, gflops: float) -> Self:
        """The keep rate for a cost of at most `gflops` G, at a quarter, half and three quarters."""
        at = quarters(shape.depth)
        return cls(keep_rate=at_rate(lambda k: cls(keep_rate=k, at=at), shape, gflops), at=at)


def prefix_index(state: TokenState, like: Tensor) -> Tensor:
    """Indices of the prefix tokens, `[B, P]`."""
    return torch.arange(state.prefix, device=like.device).expand(like.shape[0], -1)


def quarters(depth: int) -> tuple[int, ...]:
    """Blocks at a quarter, half and three quarters of the depth; 3, 6, 9 of 12."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
