"""Launches of the neighborhood kernels: tensors and a plan of sizes, made once per problem."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from vistoken.kernels.dispatch import packed
from vistoken.kernels.neighborhood_tiles import Pass, Tile, choose, shape_of
from vistoken.kernels.neighborhood_windows import Neighborhood, group_length

LOG2E = 1.4426950408889634

rows_packed = packed

MAX_PROGRAMS = 65535
"""Programs along the second and third axis of a launch."""

SIZES = ["nx", "ny", "nz", "wx", "wy", "wz", "jx", "jy", "jz", "dx", "dy", "dz", "tx", "ty", "tz"]
"""Sizes of grid, window, stride (`j`), dilation and tiles: one compiled kernel serves them all."""


@dataclass(frozen=True)
class Plan:
    """What a launch needs besides its tensors."""

    tiles: int
    """Programs of one batch entry, head and dilation group."""
    groups: int
    head_first: bool
    steps: int
    """Tiles that a program walks at most."""
    sizes: tuple[int, ...]
    """Grid, window, stride, dilation and tiles, three axes each."""
    constants: dict[str, Any]

    def programs(self, batch: int, heads: int) -> tuple[int, int, int]:
        """The grid of programs: neighboring tiles, or heads, run side by side."""
        first = (heads, self.tiles) if self.head_first else (self.tiles, heads)
        return *first, batch * self.groups


def plan(q: Tensor, hood: Neighborhood, kind: Pass, tile: Tile | None = None) -> Plan:
    """The plan of one pass over q `[B, *grid, H, D]`, with the chosen or a given tile."""
    return plan_of(
        tuple(q.shape[1:-2]), hood, q.shape[-1], q.element_size(), kind, tile,
        q.device.index or 0 if q.is_cuda else None,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def plan_of(
    grid: tuple[int, ...],
    hood: Neighborhood,
    dim: int,
    bytes_: int,
    kind: Pass,
    tile: Tile | None = None,
    device: int | None = None,
) -> Plan:
    """`plan` by what it depends on; `device` is the number of a CUDA device."""
    shape = shape_of(grid, hood, dim, bytes_)
    capability = None if device is None else torch.cuda.get_device_capability(device)
    tile = tile or choose(shape, kind, capability)
    lengths = [group_length(n, d, 0) for n, d in zip(shape.lengths, shape.dilation, strict=True)]
    tiles = [-(-n // t) for n, t in zip(lengths, tile.own, strict=True)]
    box = shape.box(tile.own, kind == "key")
    head_first = tile.head_first and math.prod(tiles) <= MAX_PROGRAMS
    causal = dict(zip(("CX", "CY", "CZ"), shape.causal, strict=True))
    own = dict(zip(("TX", "TY", "TZ"), tile.own, strict=True))
    walk = dict(zip(("KX", "KY", "KZ"), tile.walk, strict=True))
    constants = {
        "RANK": shape.rank, **causal, "STRIDED": max(shape.stride) > 1,
        "DILATED": max(shape.dilation) > 1, **own, "BM": tile.rows, **walk, "BN": tile.columns,
        "D": shape.dim, "BLOCK_D": max(16, triton.next_power_of_2(shape.dim)),
        "ONE_BAND": box[2] <= tile.walk[2], "HEAD_FIRST": head_first,
        "PRECISION": precision(shape.bytes), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if kind == "key":
        constants["STAGES"] = tile.stages
    if tile.registers is not None:
        constants["maxnreg"] = tile.registers
    sizes = *shape.lengths, *shape.window, *shape.stride, *shape.dilation, *tiles
    steps = math.prod(-(-side // t) for side, t in zip(box, tile.walk, strict=True))
    groups = math.prod(shape.dilation)
    return Plan(math.prod(tiles), groups, head_first, steps, sizes, constants)


def precision(bytes_: int) -> str:
    """How float32 is multiplied; half types have one way only."""
    exact = bytes_ == 4 and not torch.backends.cuda.matmul.allow_tf32
    return "tf32x3" if exact else "tf32"


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides b, x, y, z, h of `[B, *grid, H, D]`, zero on unused axes."""
    first, *grid, heads, _ = x.stride()
    return first, *(0,) * (3 - len(grid)), *grid, heads


def wide(*tensors: Tensor) -> bool:
    """Whether offsets inside one batch entry need 64 bits."""
    return any(
        max(
            sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)),
            math.prod(x.shape[1:]),
        )
        >= 2**31
        for x in tensors
    )


def extras(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of extra tokens `[B, E, Hk, D]`."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))
