"""Zero-TPrune, Wang et al., CVPR 2024, arXiv 2305.17328: training-free pruning by page rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from vistoken.flops import Where
from vistoken.kernels.attention import page_rank
from vistoken.kernels.match import best_match
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
from vistoken.methods.evit import prefix_index
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
        first = prefix_index(state, q)
        survivors = self._drop_similar(q, k, features.scale, state, int(removed * self.similar))
        index = torch.cat([first, survivors], 1)
        q, k = _take_heads(q, index), _take_heads(k, index)
        score = self.importance(q, k, features.scale, prefix, self._steps(step))
        best = score[:, prefix:].topk(step.merged - prefix, dim=-1).indices
        chosen = take(survivors, best).sort(-1).values
        return Assignment(keep=torch.cat([first, chosen], 1))

    def _steps(self, step: Step) -> int:
        """Page-rank steps of a block."""
        early, middle, late = self.iterations
        if step.block < 3:
            return early
        return late if step.block >= step.depth - 3 else middle

    def _drop_similar(
        self, q: Tensor, k: Tensor, scale: float, state: TokenState, count: int
    ) -> Tensor:
        """S-stage: patch indices left after dropping `count` near-duplicates, `[B, M]`.

        The less important half of the patches (A) looks for its nearest key in the more important
        half (B); the `count` closest of A go (sequential-U partition, cosine of mean keys).
        """
        score = self.importance(q, k, scale, state.prefix, 1)[:, state.prefix :]
        order = score.argsort(dim=-1, descending=True, stable=True) + state.prefix
        half = -(-order.shape[1] // 2)
        important, other = order[:, :half], order[:, half:]
        count = min(count, other.shape[1])
        if count == 0:
            return order
        key = k.mean(1)
        closeness, _ = best_match(take(key, other), take(key, important))
        left = closeness.argsort(dim=-1, stable=True)[:, : other.shape[1] - count]
        return torch.cat([important, take(other, left)], 1)

    def importance(self, q: Tensor, k: Tensor, scale: float, prefix: int, steps: int) -> Tensor:
        """Importance of every token, `[B, N]`: page rank, head filter, root mean square."""
        tokens = q.shape[2]
        start = torch.ones(q.shape[0], tokens, device=q.device)
        if self.class_weight and prefix:
            start[:, 0] = tokens**0.5
        start = start / start.sum(-1, keepdim=True)
        return self.join_heads(page_rank(q, k, None, scale, start, steps))

    def join_heads(self, score: Tensor) -> Tensor:
        """Root mean square over the heads that pass the variance filter, `[B, H, N] -> [B, N]`."""
        spread = (score * score.shape[-1]).var(-1, unbiased=False)
        low, high = self.variance
        passed = ((spread >= low) & (spread <= high)).to(score.dtype)
        none = passed.sum(1, keepdim=True) == 0
        passed = torch.where(none, torch.ones_like(passed), passed)[..., None]
        return ((score.square() * passed).sum(1) / passed.sum(1)).sqrt()

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
