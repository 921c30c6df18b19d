"""Bi-level routing attention (BiFormer, CVPR 2023) inside pretrained vision transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from vistoken.errors import ScheduleError
from vistoken.flops import count_macs
from vistoken.kernels.routing import routed_attention
from vistoken.kernels.routing_regions import count_regions, route
from vistoken.methods.base import is_int, require
from vistoken.methods.sparse import SparseAttention
from vistoken.shape import ModelShape

Axes = tuple[int, int]


@dataclass(frozen=True)
class BiLevelRouting(SparseAttention):
    """Patches attend to the regions whose mean key fits the mean query of their own region best.

    The regions are chosen for every image, without learned parts; prefix tokens are keys of every
    patch. All regions together are dense attention. Models that were trained with dense attention
    lose accuracy that grows as `topk` shrinks.

    Args:
        regions: regions per axis, one number or (rows, columns). Where it does not divide the grid,
            regions are rounded up and the last ones are smaller.
        topk: regions that a region attends to.
        per_head: whether every head chooses its own regions.
        blocks: blocks that get routed attention, 0 is the first; None is all of them.
    """

    name: ClassVar[str] = "bra"
    paper: ClassVar[str] = "BiFormer, CVPR 2023"
    guarantees: ClassVar[str] = "no token is removed; attending all regions changes nothing"

    regions: int | Sequence[int] = 7
    topk: int = 25
    per_head: bool = False

    def check(self) -> None:
        """Check sizes; lists become tuples."""
        super().check()
        if isinstance(self.regions, list):
            object.__setattr__(self, "regions", tuple(self.regions))
        many = self.regions if isinstance(self.regions, tuple) else (self.regions,) * 2
        ok = len(many) == 2 and all(is_int(n) and n >= 1 for n in many)
        require(self, "regions", ok, "an integer >= 1, or two: rows, columns")
        require(self, "topk", is_int(self.topk) and self.topk >= 1, "an integer >= 1")
        require(self, "per_head", isinstance(self.per_head, bool), "True or False")

    def region_size(self, grid: Axes) -> Axes:
        """Rows and columns of a region on a grid of (rows, columns)."""
        many = self.regions if isinstance(self.regions, tuple) else (self.regions,) * 2
        return -(-grid[0] // many[0]), -(-grid[1] // many[1])  # type: ignore[operator]

    def fits(self, grid: Axes, block: int) -> None:
        """Raise `ScheduleError` if the grid has fewer regions than a region attends to."""
        size = self.region_size(grid)
        rows, columns = count_regions(grid, size)
        if self.topk > rows * columns:
            raise ScheduleError(
                f"bra: topk={self.topk} in block {block}, but regions={self.regions} makes "
                f"{rows} x {columns} regions of the patch grid's {grid[0]} x {grid[1]} cells. Take "
                "a smaller topk, or larger images"
            )

    def pairs(self, grid: Axes, block: int) -> int:
        """Patches times the cells they attend to, and the regions' own scores."""
        size = self.region_size(grid)
        rows, columns = count_regions(grid, size)
        cells, count = grid[0] * grid[1], rows * columns
        # The scores of regions are not followed by a weighted sum.
        return cells * min(self.topk * size[0] * size[1], cells) + count * count // 2

    @classmethod
    def at_gflops(cls, shape: ModelShape, gflops: float) -> Self:
        """The most regions in every block for a cost of at most `gflops` G."""
        rows, columns = count_regions(shape.grid, cls().region_size(shape.grid))
        most = range(rows * columns, 0, -1)
        found = next((n for n in most if cls(topk=n).cost(shape) <= gflops), None)
        if found is None:
            raise ScheduleError(
                f"a cost of {gflops:.4g} G is out of reach: bra goes down to "
                f"{cls(topk=1).cost(shape):.4g} G on this model, from "
                f"{count_macs(shape) / 1e9:.4g} G"
            )
        return cls(topk=found)

    def attend_grid(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: tuple[Tensor, Tensor] | None,
        block: int,
        scale: float | None,
    ) -> Tensor:
        """Routed attention with the prefix tokens as extra keys."""
        size = self.region_size((q.shape[1], q.shape[2]))
        index = route(q, k, size, self.topk, self.per_head)
        keys, values = extra or (None, None)
        out = routed_attention(
            q, k, v, index, size, scale, additional_keys=keys, additional_values=values,
            distinct=True,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out
