"""The two baselines that every reduction has to beat: dropping at random, and pooling the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from vistoken.errors import ScheduleError
from vistoken.methods.base import Features, Method, as_blocks, at_rate, is_int, is_rate, require
from vistoken.methods.evit import prefix_index, quarters
from vistoken.schedule import Schedule, Step
from vistoken.shape import ModelShape
from vistoken.state import Assignment, TokenState


@dataclass(frozen=True)
class RandomDrop(Method):
    """Keep a random subset of the patches, drawn per image from torch's global generator.

    Args:
        keep_rate: share of the patch tokens kept at each chosen block, in (0, 1].
        at: blocks that reduce, 0 is the first.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline"
    guarantees: ClassVar[str] = "reads nothing; same counts for every image"

    keep_rate: float = 0.7
    at: Sequence[int] = (3, 6, 9)

    def check(self) -> None:
        """Check the rate and the blocks."""
        require(self, "keep_rate", is_rate(self.keep_rate), "in (0, 1]")
        as_blocks(self, "at")

    def counts(self, shape: ModelShape) -> Schedule:
        """`ceil(keep_rate * patches)` at each chosen block."""
        return Schedule.pruning(
            shape,
            lambda block, n: math.ceil(self.keep_rate * n - 1e-9) if block in self.at else n,
        )

    def assign(self, features: Features, state: TokenState, step: Step) -> Assignment:
        """A random choice, in raster order."""
        x = features.x
        noise = torch.rand(x.shape[0], step.tokens - state.prefix, device=x.device)
        chosen = noise.argsort(-1)[:, : step.merged - state.prefix].sort(-1).values
        return Assignment(keep=torch.cat([prefix_index(state, x), chosen + state.prefix], 1))

    @classmethod
    def at_gflops(cls, shape: ModelShape, gflops: float) -> Self:
        """The keep rate for a cost of at most `gflops` G, at a quarter, half and three quarters."""
        at = quarters(shape.depth)
        return cls(keep_rate=at_rate(lambda k: cls(keep_rate=k, at=at), shape, gflops), at=at)


@dataclass(frozen=True)
class Pool(Method):
    """Average stride x stride cells of the patch grid; border cells average what there is.

    Args:
        stride: side of a cell in patches.
        at: blocks that pool, 0 is the first; each pools the grid the last one left.
        proportional: add log(size) to every attention score.
    """

    name: ClassVar[str] = "pool"
    paper: ClassVar[str] = "baseline"
    guarantees: ClassVar[str] = "sizes sum to N0; content plays no part"

    stride: int = 2
    at: Sequence[int] = (4,)
    proportional: bool = True

    def check(self) -> None:
        """Check the stride and the blocks."""
        require(self, "stride", is_int(self.stride) and self.stride >= 2, "an integer >= 2")
        as_blocks(self, "at")
        require(self, "round_to", self.round_to == 1, "1: grid cells cannot be rounded")

    def counts(self, shape: ModelShape) -> Schedule:
        """`ceil(h / stride) * ceil(w / stride)` patches after each chosen block."""
        if max(self.at) >= shape.depth:
            raise ScheduleError(f"at={self.at}: the model has blocks 0 to {shape.depth - 1}")
        before, counts = shape.tokens, []
        for block in range(shape.depth):
            rows, cols = self._grid(shape.grid, block)
            after = shape.prefix + rows * cols
            counts.append((before, after))
            before = after
        return Schedule(shape.tokens, shape.prefix, tuple(counts))

    def _grid(self, grid: tuple[int, int], block: int) -> tuple[int, int]:
        """The patch grid that leaves `block`."""
        rows, cols = grid
        for _ in range(sum(at <= block for at in self.at)):
            rows, cols = -(-rows // self.stride), -(-cols // self.stride)
        return rows, cols

    def assign(self, features: Features, state: TokenState, step: Step) -> Assignment:
        """The first patch of each cell takes in the others."""
        x, prefix = features.x, state.prefix
        _, width = self._grid(state.grid, step.block - 1)
        _, cells = self._grid(state.grid, step.block)
        index = torch.arange(step.tokens - prefix, device=x.device)
        row, col = index // width, index % width
        cell = (row // self.stride) * cells + col // self.stride
        joins = (row % self.stride + col % self.stride).clamp_max(1)
        order = joins.argsort(dim=-1, stable=True).expand(x.shape[0], -1)
        slots = step.merged - prefix
        keep = torch.cat([prefix_index(state, x), order[:, :slots] + prefix], 1)
        src = order[:, slots:]
        return Assignment(
            keep=keep,
            src=src + prefix,
            dst=cell.expand(x.shape[0], -1).gather(1, src) + prefix,
            weight=state.sizes(x),
        )

    @classmethod
    def at_gflops(cls, shape: ModelShape, gflops: float) -> Self:
        """Pool 2 x 2 at the last block that still meets the cost; else at two blocks."""
        for first in range(shape.depth - 1, -1, -1):
            if cls(at=(first,)).cost(shape) <= gflops:
                return cls(at=(first,))
        for second in range(shape.depth - 1, 0, -1):
            if cls(at=(0, second)).cost(shape) <= gflops:
                return cls(at=(0, second))
        lowest = cls(at=(0, 1)).cost(shape) if shape.depth > 1 else cls(at=(0,)).cost(shape)
        raise ScheduleError(f"{gflops} G is out of reach: pooling goes down to {lowest:.4g} G")
