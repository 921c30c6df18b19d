"""Gradients of routed attention: two passes, each sums its own rows, so no atomics.

The first keeps a tile of queries, walks their list as the forward pass does, and leaves `delta`,
the row sums of `grad * out` less the gradient of lse. The second keeps a tile of keys and walks the
inverse list, the query regions that list the region of these keys. Every sum has a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vistoken.kernels.triton_neighborhood_geometry import load_rows, reciprocal, store_rows
from vistoken.kernels.triton_routing_geometry import (
    count_steps,
    own_tile,
    place,
    walk_lanes,
    walk_step,
)
from vistoken.kernels.triton_routing_launch import LISTS, SIZES


@triton.jit(do_not_specialize=[*SIZES, *LISTS, "extra", "group", "shift"])
def _query(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, dq_ptr,
    list_ptr, count_ptr, extra_k_ptr, extra_v_ptr,
    sqb, sqx, sqy, sqh, skb, skx, sky, skh, svb, svx, svy, svh, sgb, sgx, sgy, sgh,
    seb, sen, seh, sfb, sfn, sfh,
    nx, ny, size_x, size_y, tile_x, tile_y, mx, my, part_x, part_y, step_x, step_y,
    listed, slb, slh, heads, group, extra, shift, scale, scale2,
    COUNTED: tl.constexpr, CAUSAL: tl.constexpr, EXTRA: tl.constexpr, GRAD_LSE: tl.constexpr,
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
    own_q = place(px, py, sqx, sqy, WIDE)
    q = load_rows(q_ptr + b * sqb + h * sqh, own_q, inside, dims, D, BLOCK_D)
    own_grad = place(px, py, sgx, sgy, WIDE)
    grad = load_rows(grad_ptr + b * sgb + h * sgh, own_grad, inside, dims, D, BLOCK_D)
    row = place(px, py, ny * heads, heads, WIDE) + h
    entry = b * (nx * ny) * heads
    out = load_rows(out_ptr + entry * D, row * D, inside, dims, D, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + entry + row, mask=inside, other=0.0)
    tl.store(delta_ptr + entry + row, delta, mask=inside)
    norm = tl.load(lse_ptr + entry + row, mask=inside, other=0.0) * 1.4426950408889634
    k_ptr += b * skb + hk * skh
    v_ptr += b * svb + hk * svh
    slot, cx, cy = walk_lanes(part_x, part_y, step_x, step_y, PER, BN)
    k_offset, v_offset = place(cx, cy, skx, sky, WIDE), place(cx, cy, svx, svy, WIDE)

    dq = tl.zeros([BM, BLOCK_D], tl.float32)
    if EXTRA > 0:
        extra_k_ptr += b * seb + hk * seh
        extra_v_ptr += b * sfb + hk * sfh
        for start in range(0, extra, EXTRA):
            nth = start + tl.arange(0, EXTRA)
            k = load_rows(extra_k_ptr, nth * sen, nth < extra, dims, D, BLOCK_D)
            v = load_rows(extra_v_ptr, nth * sfn, nth < extra, dims, D, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - norm[:, None]
            p = tl.exp2(tl.where((nth < extra)[None, :], score, float("-inf")))
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = (p * (dp - delta[:, None])).to(k.dtype)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    steps = count_steps(0, end, parts, PER)
    for t in tl.range(0, steps, num_stages=STAGES):
        ox, oy, _, there = walk_step(
            t, list_ptr, 0, end, slot, cx, cy, mx, my, part_x, part_y, step_x, step_y, across,
            total, parts, parts_y, inverse_across, inverse_parts, inverse_parts_y, PER, WIDE,
        )  # fmt: skip
        k = load_rows(k_ptr, ox * skx + oy * sky + k_offset, there, dims, D, BLOCK_D)
        v = load_rows(v_ptr, ox * svx + oy * svy + v_offset, there, dims, D, BLOCK_D)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - norm[:, None]
        # Keys that ragged regions are filled up with are zeros and add nothing to the gradient.
        seen = there[None, :]
        if CAUSAL:
            seen = seen & ((oy + cy)[None, :] <= (py + shift)[:, None])
        p = tl.exp2(tl.where(seen, score, float("-inf")))
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    store_rows(dq_ptr + entry * D, row * D, inside, dims, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=[*SIZES, *LISTS, "group", "shift"])
def _key(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, list_ptr, start_ptr,
    sqb, sqx, sqy, sqh, skb, skx, sky, skh, svb, svx, svy, svh, sgb, sgx, sgy, sgh,
    nx, ny, size_x, size_y, tile_x, tile_y, mx, my, part_x, part_y, step_x, step_y,
    listed, slb, slh, heads, group, shift, scale, scale2,
    CAUSAL: tl.constexpr, GROUPED: tl.constexpr,
    PER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    hk, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if WIDE:
        hk = hk.to(tl.int64)
    region, px, py, inside = own_tile(nx, ny, size_x, size_y, tile_x, tile_y, BM)
    regions = tl.cdiv(nx, size_x) * tl.cdiv(ny, size_y)
    across, parts_y = tl.cdiv(my, part_y), tl.cdiv(part_y, step_y)
    total, parts = tl.cdiv(mx, part_x) * across, tl.cdiv(part_x, step_x) * parts_y
    inverse_across, inverse_parts = reciprocal(across), reciprocal(parts)
    inverse_parts_y = reciprocal(parts_y)

    dims = tl.arange(0, BLOCK_D)
    own_k = place(px, py, skx, sky, WIDE)
    k = load_rows(k_ptr + b * skb + hk * skh, own_k, inside, dims, D, BLOCK_D)
    own_v = place(px, py, svx, svy, WIDE)
    v = load_rows(v_ptr + b * svb + hk * svh, own_v, inside, dims, D, BLOCK_D)
    slot, cx, cy = walk_lanes(part_x, part_y, step_x, step_y, PER, BN)
    q_offset, g_offset = place(cx, cy, sqx, sqy, WIDE), place(cx, cy, sgx, sgy, WIDE)
    r_offset = place(cx, cy, my * heads, heads, WIDE)
    q_ptr += b * sqb
    grad_ptr += b * sgb
    lse_ptr += b * (mx * my) * heads
    delta_ptr += b * (mx * my) * heads

    dk = tl.zeros([BM, BLOCK_D], tl.float32)
    dv = tl.zeros([BM, BLOCK_D], tl.float32)
    members = 1
    if GROUPED:
        members = group
    for member in range(0, members):
        h = hk * group + member
        line = b * slb + h * slh
        first = tl.load(start_ptr + line * (regions + 1) + region)
        end = tl.load(start_ptr + line * (regions + 1) + region + 1)
        lists = list_ptr + line * listed
        steps = count_steps(first, end, parts, PER)
        # Naming the stages makes the small loads of lse and delta run ahead like the large ones.
        for t in tl.range(0, steps, num_stages=STAGES):
            ox, oy, _, there = walk_step(
                t, lists, first, end, slot, cx, cy, mx, my, part_x, part_y, step_x, step_y, across,
                total, parts, parts_y, inverse_across, inverse_parts, inverse_parts_y, PER, WIDE,
            )  # fmt: skip
            at_q, at_g = ox * sqx + oy * sqy + q_offset, ox * sgx + oy * sgy + g_offset
            q = load_rows(q_ptr + h * sqh, at_q, there, dims, D, BLOCK_D)
            grad = load_rows(grad_ptr + h * sgh, at_g, there, dims, D, BLOCK_D)
            at = ox * (my * heads) + oy * heads + r_offset + h
            norm = tl.load(lse_ptr + at, mask=there, other=0.0) * 1.4426950408889634
            delta = tl.load(delta_ptr + at, mask=there, other=0.0)
            score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2 - norm[None, :]
            seen = there[None, :]
            if CAUSAL:
                seen = seen & (py[:, None] <= (oy + cy + shift)[None, :])
            p = tl.exp2(tl.where(seen, score, float("-inf")))
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    key_heads = tl.num_programs(1)
    row = place(px, py, ny * key_heads, key_heads, WIDE) + hk
    entry = b * (nx * ny) * key_heads
    store_rows(dk_ptr + entry * D, row * D, inside, dims, dk * scale, D, BLOCK_D)
    store_rows(dv_ptr + entry * D, row * D, inside, dims, dv, D, BLOCK_D)
