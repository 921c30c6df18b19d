"""Zero-TPrune, Wang et al., CVPR 2024, arXiv 2305.17328: training-free pruning by page rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from vistoken.flops import Where
from vistoken.kernels.attention import join_heads, page_rank, wide_type
from vistoken.kernels.match import best_match_at
from vistoken.kernels.ranking import rank_tokens
from vistoken.kernels.reduce import take
from vistoken.methods.base import (
    Features,
    Method,
    Need,
    as_blocks,
    at_rate,
    is_int,
    is_rate,
    require,
)
from vistoken.schedule import Schedule, Step
from vistoken.shape import ModelShape
from vistoken.state import Assignment, TokenState


@dataclass(frozen=True)
class ZeroTPrune(Method):
    """Prune after a block: first near-duplicates (S-stage), then the unimportant (I-stage).

    Importance is a weighted page rank on the block's attention graph, `s <- A^T s`, heads joined by
    their root mean square (EIR) without the heads whose scores vary too little or too much (VHF).
    One step of it ranks tokens before the S-stage; the survivors are ranked again with all steps.
    The attention matrix is never stored: each step is one softmax normalisation.

    Where the paper is silent we choose: pruning after blocks 1, 3, 6, 9, 11 (counted from 1), the
    same keep rate at each, half of it per stage, and the variance taken of `N s` (scores that sum
    to 1 could never reach the paper's threshold).

    Args:
        keep_rate: share of the patch tokens kept at each chosen block, in (0, 1].
        at: blocks after which tokens go, 0 is the first.
        similar: share of the removal done by the S-stage, in [0, 1].
        iterations: page-rank steps in the first three blocks, the middle, the last three. The paper
            takes 30 to 50 in the first; the default of 8 is a choice for speed.
        variance: smallest and largest variance of `N s` a head may have.
        class_weight: start the rank with the class token at sqrt(N) times the others; else uniform.
    """

    name: ClassVar[str] = "zero_tprune"
    paper: ClassVar[str] = "Zero-TPrune, CVPR 2024"
    guarantees: ClassVar[str] = "no training; order of tokens does not matter"
    where: ClassVar[Where] = "block"

    keep_rate: float = 0.8
    at: Sequence[int] = (0, 2, 5, 8, 10)
    similar: float = 0.5
    iterations: Sequence[int] = (8, 5, 1)
    variance: Sequence[float] = (0.01, 0.7)
    class_weight: bool = True

    def check(self) -> None:
        """Check rates, blocks, iterations and thresholds."""
        require(self, "keep_rate", is_rate(self.keep_rate), "in (0, 1]")
        as_blocks(self, "at")
        require(self, "similar", 0 <= self.similar <= 1, "in [0, 1]")
        for field in ("iterations", "variance"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        steps = all(is_int(n) and n >= 1 for n in self.iterations) and len(self.iterations) == 3
        require(self, "iterations", steps, "three integers >= 1")
        ok = len(self.variance) == 2 and 0 <= self.variance[0] <= self.variance[1]
        require(self, "variance", ok, "two rising numbers >= 0")

    @property
    def needs(self) -> frozenset[Need]:
        """Queries and keys of all heads."""
        return frozenset({Need.ATTENTION})

    def counts(self, shape: ModelShape) -> Schedule:
        """`keep_rate * patches`, rounded, after each chosen block."""
        return Schedule.pruning(
            shape, lambda block, n: round(self.keep_rate * n) if block in self.at else n
        )

    def assign(self, features: Features, state: TokenState, step: Step) -> Assignment:
        """I' -> S -> I (section 3 of the paper)."""
        q, k = features.query, features.keys
        assert q is not None and k is not None
        prefix, removed = state.prefix, step.tokens - step.merged
        index = self._drop_similar(q, k, features.scale, prefix, int(removed * self.similar))
        q, k = _take_heads(q, index), _take_heads(k, index)
        score = self.importance(q, k, features.scale, prefix, self._steps(step))
        chosen = take(index, rank_tokens(score, prefix)[:, : step.merged])
        # Equal scores keep their order: ranking marks puts the chosen first, by position.
        marks = score.new_zeros(chosen.shape[0], step.tokens).scatter(1, chosen, 1.0)
        return Assignment(keep=rank_tokens(marks, prefix)[:, : step.merged])

    def _steps(self, step: Step) -> int:
        """Page-rank steps of a block."""
        early, middle, late = self.iterations
        if step.block < 3:
            return early
        return late if step.block >= step.depth - 3 else middle

    def _drop_similar(self, q: Tensor, k: Tensor, scale: float, prefix: int, count: int) -> Tensor:
        """S-stage: prefix tokens and patches left without `count` near-duplicates, `[B, M]`.

        The less important half of the patches (A) looks for its nearest key in the more important
        half (B); the `count` closest of A go (sequential-U partition, cosine of mean keys).
        """
        order = rank_tokens(self.importance(q, k, scale, prefix, 1), prefix)
        half = prefix + -(-(order.shape[1] - prefix) // 2)
        important, other = order[:, prefix:half], order[:, half:]
        count = min(count, other.shape[1])
        if count == 0:
            return order
        closeness, _ = best_match_at(k.mean(1), other, important)
        left = rank_tokens(-closeness, 0)[:, : other.shape[1] - count]
        return torch.cat([order[:, :half], take(other, left)], 1)

    def importance(self, q: Tensor, k: Tensor, scale: float, prefix: int, steps: int) -> Tensor:
        """Importance of every token, `[B, N]`: page rank, head filter, root mean square."""
        tokens = q.shape[2]
        first = tokens**0.5 if self.class_weight and prefix else 1.0
        share = 1 / (tokens - 1 + first)
        start = q.new_full((q.shape[0], tokens), share, dtype=wide_type(q))
        if first != 1:
            start[:, 0] = first * share
        return self.join_heads(page_rank(q, k, None, scale, start, steps))

    def join_heads(self, score: Tensor) -> Tensor:
        """Root mean square over the heads that pass the variance filter, `[B, H, N] -> [B, N]`."""
        low, high = self.variance
        return join_heads(score, low, high)

    @classmethod
    def at_gflops(cls, shape: ModelShape, gflops: float) -> Self:
        """The keep rate for a cost of at most `gflops` G."""
        blocks = {0, shape.depth // 6, 5 * shape.depth // 12, 2 * shape.depth // 3}
        at = tuple(sorted(blocks | {max(0, shape.depth - 2)}))
        return cls(keep_rate=at_rate(lambda k: cls(keep_rate=k, at=at), shape, gflops), at=at)


def _take_heads(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of `[B, H, N, d]` at `index [B, M]`."""
    heads, width = x.shape[1], x.shape[3]
    return x.gather(2, index[:, None, :, None].expand(-1, heads, -1, width))
