"""Fused routed attention: a program keeps a tile of a region's queries and walks its list.

Keys and values are read where they lie, by the numbers in the list; nothing is gathered. Softmax
runs online in powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import on_device
from vistoken.kernels.routing_regions import Routing
from vistoken.kernels.routing_tiles import Tile
from vistoken.kernels.triton_neighborhood import add_keys
from vistoken.kernels.triton_neighborhood_geometry import load_rows, reciprocal, store_rows
from vistoken.kernels.triton_neighborhood_launch import LOG2E, extras, rows_packed, wide
from vistoken.kernels.triton_routing_geometry import (
    count_steps,
    own_tile,
    place,
    walk_lanes,
    walk_step,
)
from vistoken.kernels.triton_routing_launch import (
    LISTS,
    SIZES,
    extra_rows,
    geometry,
    list_strides,
    plan,
    programs,
    strides,
)


@triton.jit(do_not_specialize=[*SIZES, *LISTS, "extra", "group", "shift"])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, list_ptr, count_ptr, extra_k_ptr, extra_v_ptr,
    sqb, sqx, sqy, sqh, skb, skx, sky, skh, svb, svx, svy, svh, seb, sen, seh, sfb, sfn, sfh,
    nx, ny, size_x, size_y, tile_x, tile_y, mx, my, part_x, part_y, step_x, step_y,
    listed, slb, slh, heads, group, extra, shift, scale2,
    COUNTED: tl.constexpr, PADS: tl.constexpr, CAUSAL: tl.constexpr, EXTRA: tl.constexpr,
    PER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if WIDE:
        h = h.to(tl.int64)
    region, px, py, inside = own_tile(nx, ny, size_x, size_y, tile_x, tile_y, BM)
    regions = tl.cdiv(nx, size_x) * tl.cdiv(ny, size_y)
    across, parts_y = tl.cdiv(my, part_y), tl.cdiv(part_y, step_y)
    total, parts = tl.cdiv(mx, part_x) * across, tl.cdiv(part_x, step_x) * parts_y
    inverse_across, inverse_parts = reciprocal(across), reciprocal(parts)
    inverse_parts_y = reciprocal(parts_y)
    line = (b * slb + h * slh) * regions + region
    list_ptr += line * listed
    end = listed
    if COUNTED:
        end = tl.minimum(tl.load(count_ptr + line), listed)

    dims = tl.arange(0, BLOCK_D)
    hk = h // group
    own = place(px, py, sqx, sqy, WIDE)
    q = load_rows(q_ptr + b * sqb + h * sqh, own, inside, dims, D, BLOCK_D)
    k_ptr += b * skb + hk * skh
    v_ptr += b * svb + hk * svh
    slot, cx, cy = walk_lanes(part_x, part_y, step_x, step_y, PER, BN)
    k_offset, v_offset = place(cx, cy, skx, sky, WIDE), place(cx, cy, svx, svy, WIDE)

    top = tl.full([BM], -1.0e30, tl.float32)
    total_mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    if EXTRA > 0:
        extra_k_ptr += b * seb + hk * seh
        extra_v_ptr += b * sfb + hk * sfh
        for start in range(0, extra, EXTRA):
            nth = start + tl.arange(0, EXTRA)
            k = load_rows(extra_k_ptr, nth * sen, nth < extra, dims, D, BLOCK_D)
            v = load_rows(extra_v_ptr, nth * sfn, nth < extra, dims, D, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            score = tl.where((nth < extra)[None, :], score, float("-inf"))
            top, total_mass, acc = add_keys(score, top, total_mass, acc, v, scale2, False,
                                            PRECISION)  # fmt: skip
    steps = count_steps(0, end, parts, PER)
    for t in tl.range(0, steps, num_stages=STAGES):
        ox, oy, ok, there = walk_step(
            t, list_ptr, 0, end, slot, cx, cy, mx, my, part_x, part_y, step_x, step_y, across,
            total, parts, parts_y, inverse_across, inverse_parts, inverse_parts_y, PER, WIDE,
        )  # fmt: skip
        k = load_rows(k_ptr, ox * skx + oy * sky + k_offset, there, dims, D, BLOCK_D)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        seen = there[None, :]
        if PADS:
            seen = ok[None, :]
        if CAUSAL:
            seen = seen & ((oy + cy)[None, :] <= (py + shift)[:, None])
        score = tl.where(seen, score, float("-inf"))
        v = load_rows(v_ptr, ox * svx + oy * svy + v_offset, there, dims, D, BLOCK_D)
        top, total_mass, acc = add_keys(score, top, total_mass, acc, v, scale2, False, PRECISION)

    row = place(px, py, ny * heads, heads, WIDE) + h
    entry = b * (nx * ny) * heads
    some = total_mass > 0.0
    acc = acc * (1.0 / tl.where(some, total_mass, 1.0))[:, None]
    norm = top * scale2 + tl.log2(tl.where(some, total_mass, 1.0))
    norm = tl.where(some, norm * 0.6931471805599453, float("-inf"))
    store_rows(out_ptr + entry * D, row * D, inside, dims, acc, D, BLOCK_D)
    tl.store(lse_ptr + entry + row, norm, mask=inside)


@on_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    counts: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    routing: Routing,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See `vistoken.kernels.routing_reference.forward`; `tile` overrides the choice."""
    q, k, v = rows_packed(q), rows_packed(k), rows_packed(v)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    extra_k = None if extra_k is None else rows_packed(extra_k)
    extra_v = None if extra_v is None else rows_packed(extra_v)
    count = 0 if extra_k is None else extra_k.shape[1]
    heads = q.shape[-2]
    tile, constants = plan(routing.q_size, routing.k_size, index.shape[-1], q, "forward", tile)
    _forward[programs(q, routing.q_size, tile, heads)](
        q, k, v, out, lse, index, index if counts is None else counts.contiguous(),
        q if extra_k is None else extra_k, q if extra_v is None else extra_v,
        *strides(q), *strides(k), *strides(v), *extras(extra_k), *extras(extra_v),
        *geometry(q, routing.q_size, tile.own), *geometry(k, routing.k_size, tile.walk),
        index.shape[-1], *list_strides(index), heads, heads // k.shape[-2], count,
        k.shape[2] - q.shape[2], scale * LOG2E,
        COUNTED=counts is not None, PADS=routing.pads, CAUSAL=routing.causal,
        EXTRA=extra_rows(count, q, tile, "forward"), WIDE=wide(q, k, v), **constants,
    )  # fmt: skip
    return out, lse
