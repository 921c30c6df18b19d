"""Tiles of the routed attention kernels: how a program splits its region and walks the lists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from vistoken.kernels.neighborhood_tiles import Pass
from vistoken.kernels.routing_regions import Sides

MEASURED = 227 * 1024
"""Shared memory of a program on the GPU where the choices were measured; all of them fit."""


@dataclass(frozen=True)
class Tile:
    """Sides of a program's own tile and of the tiles it walks, each inside one region.

    Attributes:
        own: rows and columns of the own tile.
        walk: rows and columns of a walked tile.
        per: whole regions that one step walks; 0 where a region takes several steps.
        rows: rows of the block that holds the own tile, a power of two.
        columns: rows of the block that a step walks.
        warps: of a program.
        stages: steps whose loads run ahead.
    """

    own: Sides
    walk: Sides
    per: int
    rows: int
    columns: int
    warps: int = 4
    stages: int = 3


def block(count: int) -> int:
    """The power of two, 16 at least, that holds so many rows."""
    return max(16, 1 << (count - 1).bit_length())


def split(size: Sides, limit: int) -> Sides:
    """Equal parts of a region, at most `limit` tokens each, as few as possible."""
    columns = -(-size[1] // -(-size[1] // limit))
    rows = min(size[0], limit // columns)
    return -(-size[0] // -(-size[0] // rows)), columns


def parts(size: Sides, tile: Sides) -> Sides:
    """Tiles of a region along each axis."""
    return -(-size[0] // tile[0]), -(-size[1] // tile[1])


@lru_cache(maxsize=1024)
def choose(
    own: Sides, walked: Sides, listed: int, dim: int, bytes_: int, kind: Pass,
    limit: int | None = None,
) -> Tile:  # fmt: skip
    """The tile of a pass by the work it pads, small enough to stay in registers.

    Args:
        own: rows and columns of the regions that programs own.
        walked: rows and columns of the regions that they walk.
        listed: length of the lists, or its mean.
        dim: width of a head.
        bytes_: bytes of an element.
        kind: which pass.
        limit: bytes of shared memory that a program may have; None stands for enough.
    """
    tiles = list(_smaller(_cheapest(own, walked, listed, dim, bytes_, kind), own, walked, listed))
    fitting = (t for t in tiles if has_room(t, t.columns, dim, bytes_, kind, limit))
    return next(fitting, tiles[-1])


def _cheapest(
    own: Sides, walked: Sides, listed: int, dim: int, bytes_: int, kind: Pass
) -> Tile:  # fmt: skip
    most = 64 if bytes_ == 2 else 32
    side = min((most // 2, most), key=lambda limit: _own_cost(own, limit))
    mine = split(own, side)
    rows = block(math.prod(mine))
    if bytes_ == 2 and dim <= 32 and math.prod(walked) > most // 2:
        # As measured: of narrow heads a warp holds many rows, and walks two rows of a region.
        two = min(most // 2, max(16, 2 * walked[1]))
        walk, per, columns = _walk(walked, listed, most if kind == "key" else two)
        warps = max(1, rows // (32 if kind == "key" else 64))
        return Tile(mine, walk, per, rows, columns, warps, 2 if per else 3)
    # A pass holds two products of its own rows with a step's rows, the gradients of keys and values
    # two sums more.
    roomy = dim <= {"forward": 64, "query": 32, "key": 0}[kind]
    limits = (most // 2, most) if roomy else (most // 2,)
    walk, per, columns = min(
        (_walk(walked, listed, limit) for limit in limits),
        key=lambda found: _walk_cost(walked, *found),
    )
    warps = max(1, rows // 16) * (1 if dim <= 64 else 2)
    return Tile(mine, walk, per, rows, columns, warps, 3 if dim <= 128 else 2)


def _smaller(tile: Tile, own: Sides, walked: Sides, listed: int) -> Iterator[Tile]:
    """The tile, then tiles that need less and less shared memory."""
    yield tile
    tile = replace(tile, stages=min(tile.stages, 2))
    yield tile
    for limit in (32, 16):
        if limit < tile.columns:
            walk, per, columns = _walk(walked, listed, limit)
            tile = replace(tile, walk=walk, per=per, columns=columns)
            yield tile
    for limit in (32, 16):
        if limit < tile.rows:
            mine = split(own, limit)
            rows = block(math.prod(mine))
            tile = replace(tile, own=mine, rows=rows, warps=max(1, tile.warps * rows // tile.rows))
            yield tile
    yield replace(tile, stages=1)


def has_room(
    tile: Tile, columns: int, dim: int, bytes_: int, kind: Pass, limit: int | None
) -> bool:
    """Whether a pass that holds so many rows of a step, or of extra tokens, fits into `limit`."""
    return limit is None or limit >= MEASURED or shared(tile, columns, dim, bytes_, kind) <= limit


def shared(tile: Tile, columns: int, dim: int, bytes_: int, kind: Pass) -> int:
    """Bytes of shared memory of a pass, at most, by what compiled kernels take."""
    row = block(dim) * bytes_
    own, step = tile.rows * row * (1 if kind == "forward" else 2), 2 * columns * row
    walking = own + tile.stages * step
    scratch = 512  # barriers
    if bytes_ == 4:
        # Products of float32 are several of half the bits, whose operands are apart.
        walking += step // 2
        scratch += 2 * tile.rows * columns * bytes_
    # Gradients leave their rows in a layout of their own, or hold a second copy to multiply with.
    return max(walking, 0 if kind == "forward" else 2 * own + step) + scratch


def shared_limit(device: torch.device) -> int | None:
    """Bytes of shared memory that a program may have on a device; None where it does not tell."""
    return _limit(device.index or 0) if device.type == "cuda" else None


@lru_cache
def _limit(index: int) -> int | None:
    told = getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", 0)
    return told or None


def _own_cost(size: Sides, limit: int) -> int:
    tile = split(size, limit)
    return math.prod(parts(size, tile)) * (block(math.prod(tile)) + 16)


def _walk(size: Sides, listed: int, limit: int) -> tuple[Sides, int, int]:
    count = math.prod(size)
    if count > limit:
        tile = split(size, limit)
        return tile, 0, block(math.prod(tile))
    per = min(limit // count, listed)
    return size, per, block(per * count)


def _walk_cost(size: Sides, tile: Sides, per: int, columns: int) -> float:
    """Work of one region; a step has a fixed part."""
    return (columns + 8) * (1 / per if per else math.prod(parts(size, tile)))
