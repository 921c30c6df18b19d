"""Small maps: when routed attention walks the whole map, and tells regions apart by bits.

Where regions have a handful of tokens, a program for each wastes most of a matrix unit and reads
keys again for every region. On a small map a program takes many queries instead and walks bands,
the keys of whole rows of regions; a query's list is one word of 64 bits, a bit for each region.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from vistoken.kernels.routing_regions import Routing, Sides, count_regions
from vistoken.kernels.routing_tiles import MEASURED, block, choose, parts

MAX_REGIONS = 64
"""Bits of a query's word."""

MAX_TOKENS = 256
"""Queries whose gradients one program holds."""

MAX_DIM = 64
"""Widest head for which it does."""

MAX_BITS = 32
"""Regions of a step: bits of a column's word."""

ADVANTAGE = 2.0
"""How much faster a score of full blocks is than one of a region's own block."""

BandPass = Literal["forward", "backward"]


@dataclass(frozen=True)
class BandTile:
    """Queries of a program, and rows of regions of a step.

    Attributes:
        own: queries of a program, one after the other in row-major order.
        bands: rows of regions whose keys a step walks.
        rows: rows of the block that holds the queries, a power of two.
        columns: rows of the block that holds a step's keys.
        warps: of a program.
        stages: steps whose loads run ahead.
    """

    own: int
    bands: int
    rows: int
    columns: int
    warps: int = 4
    stages: int = 2


def band_tile(
    grid: Sides, size: Sides, rows: int, columns: int, warps: int, stages: int
) -> BandTile | None:
    """The tile of so many rows and columns at most, with equal shares; None if no band fits."""
    tokens, across = math.prod(grid), count_regions(grid, size)[1]
    band = size[0] * grid[1]
    most = min(columns // band, MAX_BITS // across, count_regions(grid, size)[0])
    if most < 1:
        return None
    own = -(-tokens // -(-tokens // rows))
    return BandTile(own, most, block(own), block(most * band), warps, stages)


def bands_fit(grid: Sides, routing: Routing, dim: int, bytes_: int, group: int) -> bool:
    """Whether a problem with lists of distinct regions can be walked in bands."""
    size = routing.q_size
    ragged = any(n % side for n, side in zip(grid, size, strict=True))
    return (
        size == routing.k_size
        and not routing.causal
        and not (routing.pads and ragged)
        and group == 1
        and bytes_ == 2
        and dim <= MAX_DIM
        and math.prod(grid) <= MAX_TOKENS
        and math.prod(count_regions(grid, size)) <= MAX_REGIONS
        and band_tile(grid, size, 64, 128, 4, 2) is not None
    )


@lru_cache(maxsize=1024)
def choose_bands(grid: Sides, size: Sides, dim: int, kind: BandPass) -> BandTile:
    """The tile of a pass; the backward pass holds all queries at once."""
    band = size[0] * grid[1]
    if kind == "forward":
        tile = band_tile(grid, size, 64, max(32, block(band)), 4, 2)
    else:
        # Columns of 64 where registers allow: their products need the wide matrix instructions.
        columns = 64 if dim <= 32 else 32
        rows = block(math.prod(grid))
        tile = band_tile(grid, size, rows, max(columns, block(band)), max(4, rows // 32), 2)
    if tile is None:
        raise AssertionError("asked only where bands fit")
    return tile


def bands_have_room(grid: Sides, size: Sides, dim: int, kind: BandPass, limit: int | None) -> bool:
    """Whether a pass fits into so many bytes of shared memory; None stands for enough."""
    if limit is None or limit >= MEASURED:
        return True
    tile, row = choose_bands(grid, size, dim, kind), 2 * block(dim)
    step = tile.stages * 2 * tile.columns * row
    if kind == "forward":
        return max(step, 2 * tile.stages * 64 * row) + tile.rows * row <= limit
    # By what compiled kernels take: products of fewer columns hold queries and gradients twice.
    own = 2 * tile.rows * row * (1 if tile.columns >= 64 else 2)
    return own + 2 * tile.rows * tile.columns + step <= limit


@lru_cache(maxsize=1024)
def bands_win(grid: Sides, size: Sides, listed: int, dim: int) -> bool:
    """Whether walking all keys in full blocks is less work than a block for every region."""
    tile = choose_bands(grid, size, dim, "forward")
    steps = -(-count_regions(grid, size)[0] // tile.bands)
    whole = -(-math.prod(grid) // tile.own) * tile.rows * steps * tile.columns
    own = choose(size, size, listed, dim, 2, "forward")
    if own.per:
        walked = -(-listed // own.per) * own.columns
    else:
        walked = listed * math.prod(parts(size, own.walk)) * own.columns
    regions = math.prod(count_regions(grid, size)) * math.prod(parts(size, own.own))
    return whole <= ADVANTAGE * regions * own.rows * walked
