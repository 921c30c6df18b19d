"""Neighborhood attention (Hassani et al., CVPR 2023) inside pretrained vision transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from vistoken.errors import ScheduleError
from vistoken.flops import count_macs
from vistoken.kernels.neighborhood import na2d
from vistoken.methods.base import is_int, require
from vistoken.methods.sparse import SparseAttention
from vistoken.shape import ModelShape

Axes = tuple[int, int]


@dataclass(frozen=True)
class NeighborhoodAttention(SparseAttention):
    """Every patch attends to the window of patches around it, and to the prefix tokens.

    The window keeps its size at the borders, where it shifts inwards. A window as large as the grid
    is dense attention. Models that were trained with dense attention lose accuracy that grows as
    the window shrinks, most in the last blocks; fine-tuning wins most of it back (ViTDet, ECCV
    2022, keeps four evenly spaced blocks global).

    Args:
        window: patches per axis, one number or (rows, columns).
        dilation: grid cells from one key to the next; a list is repeated over the sparse blocks, so
            `[1, 2]` alternates.
        stride: queries per axis that share one window, one number or (rows, columns).
        blocks: blocks that get neighborhood attention, 0 is the first; None is all of them.
    """

    name: ClassVar[str] = "na"
    paper: ClassVar[str] = "Neighborhood Attention, CVPR 2023"
    guarantees: ClassVar[str] = "no token is removed; a window as large as the grid changes nothing"

    window: int | Sequence[int] = 7
    dilation: int | Sequence[int] = 1
    stride: int | Sequence[int] = 1

    def check(self) -> None:
        """Check sizes; lists become tuples."""
        super().check()
        for field in ("window", "dilation", "stride"):
            value = getattr(self, field)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field, value)
            many = value if isinstance(value, tuple) else (value,)
            ok = bool(many) and all(is_int(n) and n >= 1 for n in many)
            if field == "dilation":
                require(self, field, ok, "an integer >= 1, or a list of them")
            else:
                ok = ok and (len(many) == 2 or not isinstance(value, tuple))
                require(self, field, ok, "an integer >= 1, or two: rows, columns")
        inside = all(s <= w for s, w in zip(both(self.stride), both(self.window), strict=True))
        require(self, "stride", inside, f"at most the window, {self.window}")

    def dilation_of(self, block: int) -> int:
        """Dilation in one block."""
        if is_int(self.dilation):
            return self.dilation  # type: ignore[return-value]
        place = block if self.blocks is None else tuple(self.blocks).index(block)  # type: ignore[arg-type]
        choices = tuple(self.dilation)  # type: ignore[arg-type]
        return int(choices[place % len(choices)])

    def fits(self, grid: Axes, block: int) -> None:
        """Raise `ScheduleError` if the dilated window is larger than the grid."""
        dilation = self.dilation_of(block)
        if all(w * dilation <= length for w, length in zip(both(self.window), grid, strict=True)):
            return
        spans = " x ".join(str(w * dilation) for w in both(self.window))
        lost = "; one row means that the patches' arrangement is not known" if grid[0] == 1 else ""
        raise ScheduleError(
            f"na: window {self.window} with dilation {dilation} in block {block} spans {spans} "
            f"cells, the patch grid has {grid[0]} x {grid[1]}{lost}. Take a smaller window or "
            "dilation, or larger images"
        )

    def pairs(self, grid: Axes, block: int) -> int:
        """Patches times window."""
        rows, columns = both(self.window)
        return grid[0] * grid[1] * rows * columns

    @classmethod
    def at_gflops(cls, shape: ModelShape, gflops: float) -> Self:
        """The widest square window in every block for a cost of at most `gflops` G."""
        widest = range(min(shape.grid), 0, -1)
        found = next((n for n in widest if cls(window=n).cost(shape) <= gflops), None)
        if found is None:
            raise ScheduleError(
                f"a cost of {gflops:.4g} G is out of reach: na goes down to "
                f"{cls(window=1).cost(shape):.4g} G on this model, from "
                f"{count_macs(shape) / 1e9:.4g} G"
            )
        return cls(window=found)

    def attend_grid(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: tuple[Tensor, Tensor] | None,
        block: int,
        scale: float | None,
    ) -> Tensor:
        """Neighborhood attention with the prefix tokens as extra keys."""
        keys, values = extra or (None, None)
        out = na2d(
            q,
            k,
            v,
            both(self.window),
            stride=both(self.stride),
            dilation=(self.dilation_of(block),) * 2,
            scale=scale,
            additional_keys=keys,
            additional_values=values,
        )
        assert isinstance(out, Tensor)
        return out


def both(value: int | Sequence[int]) -> Axes:
    """Rows and columns from one number or two."""
    if isinstance(value, int):
        return value, value
    rows, columns = value
    return rows, columns
