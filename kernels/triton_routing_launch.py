"""Launches of the routed attention kernels: sizes, strides and compile-time settings."""

from __future__ import annotations

import math
from typing import Any

import triton
from torch import Tensor

from vistoken.kernels.neighborhood_tiles import Pass
from vistoken.kernels.routing_regions import Sides, count_regions
from vistoken.kernels.routing_tiles import Tile, choose, has_room, parts, shared_limit
from vistoken.kernels.triton_neighborhood import extra_block
from vistoken.kernels.triton_neighborhood_launch import precision

SIZES = [
    "nx", "ny", "size_x", "size_y", "tile_x", "tile_y",
    "mx", "my", "part_x", "part_y", "step_x", "step_y",
]  # fmt: skip
"""Grids, regions and tiles of the own and the walked side: one compiled kernel serves them all."""

LISTS = ["listed", "slb", "slh", "heads"]
"""Length of the lists, their strides, and the heads."""


def plan(
    own: Sides, walked: Sides, listed: int, q: Tensor, kind: Pass, tile: Tile | None = None
) -> tuple[Tile, dict[str, Any]]:
    """The tile of a pass, chosen or given, and what its kernel is compiled for."""
    dim, limit = q.shape[-1], shared_limit(q.device)
    return constants_of(own, walked, listed, dim, q.element_size(), kind, tile, limit)


def constants_of(
    own: Sides, walked: Sides, listed: int, dim: int, bytes_: int, kind: Pass,
    tile: Tile | None = None, limit: int | None = None,
) -> tuple[Tile, dict[str, Any]]:  # fmt: skip
    """`plan` by what it depends on; `limit` is the shared memory of a program."""
    tile = tile or choose(own, walked, listed, dim, bytes_, kind, limit)
    return tile, {
        "PER": tile.per, "BM": tile.rows, "BN": tile.columns, "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)), "PRECISION": precision(bytes_),
        "STAGES": tile.stages, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def extra_rows(count: int, q: Tensor, tile: Tile, kind: Pass) -> int:
    """Rows of a block of extra tokens; 16 need no more room than a step of the tile."""
    rows, limit = extra_block(count, q), shared_limit(q.device)
    while rows > 16 and not has_room(tile, rows, q.shape[-1], q.element_size(), kind, limit):
        rows //= 2
    return rows


def programs(x: Tensor, size: Sides, tile: Tile, heads: int) -> tuple[int, int, int]:
    """The grid of programs over the tiles of x `[B, X, Y, H, D]`."""
    regions = math.prod(count_regions((x.shape[1], x.shape[2]), size))
    return regions * math.prod(parts(size, tile.own)), heads, x.shape[0]


def geometry(x: Tensor, size: Sides, tile: Sides) -> tuple[int, ...]:
    """Grid of x `[B, X, Y, H, D]`, region and tile."""
    return x.shape[1], x.shape[2], *size, *tile


def strides(x: Tensor) -> tuple[int, int, int, int]:
    """Strides b, x, y, h of `[B, X, Y, H, D]`."""
    b, x_, y, h, _ = x.stride()
    return b, x_, y, h


def list_strides(index: Tensor) -> tuple[int, int]:
    """Lists from one image and from one head to the next; 0 where all share them."""
    batch, heads = index.shape[:2]
    return (heads if batch > 1 else 0), (1 if heads > 1 else 0)
