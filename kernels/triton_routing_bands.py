"""Fused routed attention of small maps: a program walks all keys, bits of a word tell which count.

Regions of a list are distinct here, so a list is one word with a bit for each region. A step takes
bands, whole rows of regions: which bit belongs to a column is the same in every step, and a query's
bits of the step are a shift of its word. No mask is ever stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import on_device
from vistoken.kernels.routing_bands import BandTile, choose_bands
from vistoken.kernels.routing_reference import Grads
from vistoken.kernels.routing_regions import Sides
from vistoken.kernels.triton_neighborhood import add_keys, extra_block
from vistoken.kernels.triton_neighborhood_geometry import far, load_rows, store_rows
from vistoken.kernels.triton_neighborhood_launch import (
    LOG2E,
    extras,
    precision,
    rows_packed,
    wide,
)
from vistoken.kernels.triton_routing_geometry import place
from vistoken.kernels.triton_routing_launch import LISTS, list_strides, strides

SIZES = ["nx", "ny", "size_x", "size_y", "tokens", "band"]
"""Grid, regions, queries of a program and rows of the grid of a step."""


@triton.jit
def words(list_ptr, listed, regions, region, inside, LISTED: tl.constexpr):
    """A bit for each region that a row's region lists; numbers that are no region have none."""
    nth = tl.arange(0, LISTED)
    there = inside[:, None] & (nth < listed)[None, :]
    ids = tl.load(list_ptr + region[:, None] * listed + nth[None, :], mask=there, other=-1)
    known = (ids >= 0) & (ids < regions)
    bits = tl.full(ids.shape, 1, tl.int64) << tl.where(known, ids, 0).to(tl.int64)
    return tl.sum(tl.where(known, bits, 0), 1)


@triton.jit
def columns(ny, size_x, size_y, across, band, BLOCK: tl.constexpr):
    """Place of a step's columns, and the bit of each; columns beyond the band have none."""
    lane = tl.arange(0, BLOCK)
    x = lane // ny
    y = lane - x * ny
    nth = tl.minimum(x // size_x * across + y // size_y, 31)
    bits = tl.full([BLOCK], 1, tl.int32) << nth
    return x, y, tl.where(x < band, bits, 0)


@triton.jit(do_not_specialize=[*SIZES, *LISTS, "extra", "group"])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, list_ptr, extra_k_ptr, extra_v_ptr,
    sqb, sqx, sqy, sqh, skb, skx, sky, skh, svb, svx, svy, svh, seb, sen, seh, sfb, sfn, sfh,
    nx, ny, size_x, size_y, tokens, band, listed, slb, slh, heads, group, extra, scale2,
    LISTED: tl.constexpr, EXTRA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if WIDE:
        h = h.to(tl.int64)
    across = tl.cdiv(ny, size_y)
    regions = tl.cdiv(nx, size_x) * across
    lane = tl.arange(0, BM)
    nth = tl.program_id(0) * tokens + lane
    inside = (lane < tokens) & (nth < nx * ny)
    px = nth // ny
    py = nth - px * ny
    region = px // size_x * across + py // size_y
    word = words(list_ptr + (b * slb + h * slh) * regions * listed, listed, regions, region,
                 inside, LISTED)  # fmt: skip

    dims = tl.arange(0, BLOCK_D)
    hk = h // group
    own = place(px, py, sqx, sqy, WIDE)
    q = load_rows(q_ptr + b * sqb + h * sqh, own, inside, dims, D, BLOCK_D)
    k_ptr += b * skb + hk * skh
    v_ptr += b * svb + hk * svh
    cx, cy, bits = columns(ny, size_x, size_y, across, band, BN)
    k_offset, v_offset = place(cx, cy, skx, sky, WIDE), place(cx, cy, svx, svy, WIDE)

    top = tl.full([BM], -1.0e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    if EXTRA > 0:
        extra_k_ptr += b * seb + hk * seh
        extra_v_ptr += b * sfb + hk * sfh
        for start in range(0, extra, EXTRA):
            at = start + tl.arange(0, EXTRA)
            k = load_rows(extra_k_ptr, at * sen, at < extra, dims, D, BLOCK_D)
            v = load_rows(extra_v_ptr, at * sfn, at < extra, dims, D, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            score = tl.where((at < extra)[None, :], score, float("-inf"))
            top, total, acc = add_keys(score, top, total, acc, v, scale2, False, PRECISION)
    shift = band // size_x * across
    for t in tl.range(0, tl.cdiv(nx, band), num_stages=STAGES):
        first = t * band
        there = (cx < band) & (cx < nx - first)
        if WIDE:
            first = far(first)
        k = load_rows(k_ptr + first * skx, k_offset, there, dims, D, BLOCK_D)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        near = (word >> (t * shift)).to(tl.int32)
        seen = (near[:, None] & tl.where(there, bits, 0)[None, :]) != 0
        score = tl.where(seen, score, float("-inf"))
        v = load_rows(v_ptr + first * svx, v_offset, there, dims, D, BLOCK_D)
        top, total, acc = add_keys(score, top, total, acc, v, scale2, False, PRECISION)

    row = place(px, py, ny * heads, heads, WIDE) + h
    entry = b * (nx * ny) * heads
    some = total > 0.0
    acc = acc * (1.0 / tl.where(some, total, 1.0))[:, None]
    norm = top * scale2 + tl.log2(tl.where(some, total, 1.0))
    norm = tl.where(some, norm * 0.6931471805599453, float("-inf"))
    store_rows(out_ptr + entry * D, row * D, inside, dims, acc, D, BLOCK_D)
    tl.store(lse_ptr + entry + row, norm, mask=inside)


@triton.jit(do_not_specialize=[*SIZES, *LISTS, "extra"])
def _backward(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, dq_ptr, dk_ptr,
    dv_ptr, list_ptr, extra_k_ptr, extra_v_ptr,
    sqb, sqx, sqy, sqh, skb, skx, sky, skh, svb, svx, svy, svh, sgb, sgx, sgy, sgh,
    seb, sen, seh, sfb, sfn, sfh,
    nx, ny, size_x, size_y, tokens, band, listed, slb, slh, heads, extra, scale, scale2,
    LISTED: tl.constexpr, EXTRA: tl.constexpr, GRAD_LSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All queries of a head are here, so the sums of a band's keys are whole after its step."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if WIDE:
        h = h.to(tl.int64)
    across = tl.cdiv(ny, size_y)
    regions = tl.cdiv(nx, size_x) * across
    nth = tl.arange(0, BM)
    inside = nth < tokens
    px = nth // ny
    py = nth - px * ny
    region = px // size_x * across + py // size_y
    word = words(list_ptr + (b * slb + h * slh) * regions * listed, listed, regions, region,
                 inside, LISTED)  # fmt: skip

    dims = tl.arange(0, BLOCK_D)
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
    norm = tl.load(lse_ptr + entry + row, mask=inside, other=0.0) * 1.4426950408889634
    k_ptr += b * skb + h * skh
    v_ptr += b * svb + h * svh
    dk_ptr += entry * D
    dv_ptr += entry * D
    cx, cy, bits = columns(ny, size_x, size_y, across, band, BN)
    k_offset, v_offset = place(cx, cy, skx, sky, WIDE), place(cx, cy, svx, svy, WIDE)
    key_row = place(cx, cy, ny * heads, heads, WIDE) + h

    dq = tl.zeros([BM, BLOCK_D], tl.float32)
    if EXTRA > 0:
        tl.store(delta_ptr + entry + row, delta, mask=inside)
        extra_k_ptr += b * seb + h * seh
        extra_v_ptr += b * sfb + h * sfh
        for start in range(0, extra, EXTRA):
            at = start + tl.arange(0, EXTRA)
            k = load_rows(extra_k_ptr, at * sen, at < extra, dims, D, BLOCK_D)
            v = load_rows(extra_v_ptr, at * sfn, at < extra, dims, D, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - norm[:, None]
            p = tl.exp2(tl.where((at < extra)[None, :], score, float("-inf")))
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = (p * (dp - delta[:, None])).to(k.dtype)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    shift = band // size_x * across
    for t in tl.range(0, tl.cdiv(nx, band), num_stages=STAGES):
        first = t * band
        there = (cx < band) & (cx < nx - first)
        if WIDE:
            first = far(first)
        k = load_rows(k_ptr + first * skx, k_offset, there, dims, D, BLOCK_D)
        v = load_rows(v_ptr + first * svx, v_offset, there, dims, D, BLOCK_D)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - norm[:, None]
        near = (word >> (t * shift)).to(tl.int32)
        seen = (near[:, None] & tl.where(there, bits, 0)[None, :]) != 0
        p = tl.exp2(tl.where(seen, score, float("-inf")))
        dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        at = first * (ny * heads) + key_row
        store_rows(dk_ptr, at * D, there, dims, dk, D, BLOCK_D)
        store_rows(dv_ptr, at * D, there, dims, dv, D, BLOCK_D)
    store_rows(dq_ptr + entry * D, row * D, inside, dims, dq * scale, D, BLOCK_D)


@on_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    size: Sides,
    scale: float,
    tile: BandTile | None = None,
) -> tuple[Tensor, Tensor]:
    """`vistoken.kernels.routing_reference.forward` where `bands_fit`, for lists without repeats."""
    q, k, v = rows_packed(q), rows_packed(k), rows_packed(v)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    extra_k = None if extra_k is None else rows_packed(extra_k)
    extra_v = None if extra_v is None else rows_packed(extra_v)
    count = 0 if extra_k is None else extra_k.shape[1]
    heads, grid = q.shape[-2], (q.shape[1], q.shape[2])
    tile = tile or choose_bands(grid, size, q.shape[-1], "forward")
    constants = constants_of(tile, index.shape[-1], q.shape[-1], q.element_size())
    _forward[-(-grid[0] * grid[1] // tile.own), heads, q.shape[0]](
        q, k, v, out, lse, index,
        q if extra_k is None else extra_k, q if extra_v is None else extra_v,
        *strides(q), *strides(k), *strides(v), *extras(extra_k), *extras(extra_v),
        *grid, *size, tile.own, tile.bands * size[0], index.shape[-1], *list_strides(index),
        heads, heads // k.shape[-2], count, scale * LOG2E,
        EXTRA=extra_block(count, q), WIDE=wide(q, k, v), **constants,
    )  # fmt: skip
    return out, lse


@on_device
def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    size: Sides,
    scale: float,
    tile: BandTile | None = None,
) -> Grads:
    """`vistoken.kernels.routing_reference.backward`, as `forward`."""
    grad, q, k, v = rows_packed(grad), rows_packed(q), rows_packed(k), rows_packed(v)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    extra_k = None if extra_k is None else rows_packed(extra_k)
    extra_v = None if extra_v is None else rows_packed(extra_v)
    count = 0 if extra_k is None else extra_k.shape[1]
    delta = lse if extra_k is None else torch.empty_like(lse)
    heads, grid = q.shape[-2], (q.shape[1], q.shape[2])
    tile = tile or choose_bands(grid, size, q.shape[-1], "backward")
    constants = constants_of(tile, index.shape[-1], q.shape[-1], q.element_size())
    _backward[1, heads, q.shape[0]](
        q, k, v, grad, out, lse, lse if grad_lse is None else grad_lse.contiguous(), delta,
        dq, dk, dv, index, q if extra_k is None else extra_k, q if extra_v is None else extra_v,
        *strides(q), *strides(k), *strides(v), *strides(grad), *extras(extra_k), *extras(extra_v),
        *grid, *size, tile.own, tile.bands * size[0], index.shape[-1], *list_strides(index),
        heads, count, scale, scale * LOG2E, EXTRA=extra_block(count, q),
        GRAD_LSE=grad_lse is not None, WIDE=wide(q, k, v, grad), **constants,
    )  # fmt: skip
    if extra_k is None or extra_v is None:
        return dq, dk, dv, None, None
    from vistoken.kernels.triton_neighborhood_extra import extra_gradients

    return dq, dk, dv, *extra_gradients(grad, q, lse, delta, scale, extra_k, extra_v)


def constants_of(tile: BandTile, listed: int, dim: int, bytes_: int) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "LISTED": triton.next_power_of_2(listed), "BM": tile.rows, "BN": tile.columns, "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)), "PRECISION": precision(bytes_),
        "STAGES": tile.stages, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
