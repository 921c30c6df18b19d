"""Device functions of the routed attention kernels: own tiles, lists, and the steps along them.

A program owns a tile of one region and walks the regions of a list. A step takes several whole
small regions, whose corners are a vector, or a part of a large one, whose corner is a scalar; where
a row lies inside its region does not change from step to step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vistoken.kernels.triton_neighborhood_geometry import divide


@triton.jit
def own_tile(nx, ny, size_x, size_y, tile_x, tile_y, BLOCK: tl.constexpr):
    """Region of this program, coordinates of its rows, and which of them exist."""
    parts_y = tl.cdiv(size_y, tile_y)
    parts = tl.cdiv(size_x, tile_x) * parts_y
    across = tl.cdiv(ny, size_y)
    region = tl.program_id(0) // parts
    part = tl.program_id(0) - region * parts
    lane = tl.arange(0, BLOCK)
    row = lane // tile_y
    x = part // parts_y * tile_x + row
    y = part % parts_y * tile_y + lane - row * tile_y
    inside = (row < tile_x) & (x < size_x) & (y < size_y)
    x += region // across * size_x
    y += region % across * size_y
    return region, x, y, inside & (x < nx) & (y < ny)


@triton.jit
def walk_lanes(size_x, size_y, tile_x, tile_y, PER: tl.constexpr, BLOCK: tl.constexpr):
    """Place of a step's rows: which region of the step, and where in its tile.

    Rows that a step has no use for are in a region behind the last.
    """
    lane = tl.arange(0, BLOCK)
    slot = lane * 0
    if PER > 0:
        slot = lane // (size_x * size_y)
        lane = lane - slot * (size_x * size_y)
    x = lane // tile_y
    y = lane - x * tile_y
    if PER == 0:
        slot = tl.where(x < tile_x, 0, 1)
    return slot, x, y


@triton.jit
def count_steps(first, end, parts, PER: tl.constexpr):
    """Steps along the entries `[first, end)` of a list."""
    if PER > 0:
        return tl.cdiv(end - first, PER)
    return (end - first) * parts


@triton.jit
def walk_step(
    t, list_ptr, first, end, slot, x, y, nx, ny, size_x, size_y, tile_x, tile_y,
    across, total, parts, parts_y, inverse_across, inverse_parts, inverse_parts_y,
    PER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Corner of step t, which of its rows are listed, and which of those are on the grid."""
    if PER > 0:
        at = first + t * PER + slot
        listed = (slot < PER) & (at < end)
        region = tl.load(list_ptr + at, mask=listed, other=0)
        inner_x, inner_y = 0, 0
    else:
        nth = divide(t, parts, inverse_parts)
        part = t - nth * parts
        part_x = divide(part, parts_y, inverse_parts_y)
        inner_x = part_x * tile_x
        inner_y = (part - part_x * parts_y) * tile_y
        region = tl.load(list_ptr + first + nth)
        listed = (slot == 0) & (x < size_x - inner_x) & (y < size_y - inner_y)
    known = (region >= 0) & (region < total)
    listed &= known
    region = tl.where(known, region, 0)
    line = divide(region, across, inverse_across)
    corner_x = line * size_x + inner_x
    corner_y = (region - line * across) * size_y + inner_y
    inside = listed & (x < nx - corner_x) & (y < ny - corner_y)
    if WIDE:
        corner_x, corner_y = corner_x.to(tl.int64), corner_y.to(tl.int64)
    return corner_x, corner_y, listed, inside


@triton.jit
def place(x, y, sx, sy, WIDE: tl.constexpr):
    """Where rows lie from the start of their batch entry."""
    if WIDE:
        x, y = x.to(tl.int64), y.to(tl.int64)
    return x * sx + y * sy
