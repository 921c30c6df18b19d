"""Gradients of the extra tokens, which every query attends.

A program keeps a block of extra tokens of one key head and walks its share of the queries; shares
leave partial sums in float32 that one reduction adds up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import on_device
from vistoken.kernels.triton_neighborhood_geometry import far, load_rows, offsets, store_rows
from vistoken.kernels.triton_neighborhood_launch import (
    LOG2E,
    extras,
    precision,
    rows_packed,
    strides,
    wide,
)

ROWS = 64
"""Queries of one step."""

PROGRAMS = 512
"""About as many programs as fill a large GPU."""


@triton.jit(do_not_specialize=["nx", "ny", "nz", "group", "extra", "shares"])
def _extra(
    q_ptr, grad_ptr, lse_ptr, delta_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr,
    sqb, sqx, sqy, sqz, sqh, sgb, sgx, sgy, sgz, sgh, seb, sen, seh, sfb, sfn, sfh,
    nx, ny, nz, heads, group, extra, shares, scale, scale2,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One axis for all: the others end at 65,535. Neighbors are shares of one block and head.
    blocks = tl.cdiv(extra, BM)
    block, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    entry, entries = block // blocks, tl.num_programs(0) // (shares * blocks)
    first = block % blocks * BM
    key_heads = heads // group
    b, hk = (entry // key_heads).to(tl.int64), entry % key_heads
    dims = tl.arange(0, BLOCK_D)
    own = first + tl.arange(0, BM)
    k = load_rows(k_ptr + b * seb + hk * seh, own * sen, own < extra, dims, D, BLOCK_D)
    v = load_rows(v_ptr + b * sfb + hk * sfh, own * sfn, own < extra, dims, D, BLOCK_D)
    tokens = nx * ny * nz
    dk = tl.zeros([BM, BLOCK_D], tl.float32)
    dv = tl.zeros([BM, BLOCK_D], tl.float32)
    for start in range(share * BN, tokens * group, shares * BN):
        at = start + tl.arange(0, BN)
        inside = at < tokens * group
        h, n = hk * group + at // tokens, at % tokens
        if WIDE:
            h = far(h)
        x, y, z = n // (ny * nz), n // nz % ny, n % nz
        q_at = offsets(x, y, z, sqx, sqy, sqz, RANK, WIDE) + h * sqh
        g_at = offsets(x, y, z, sgx, sgy, sgz, RANK, WIDE) + h * sgh
        q = load_rows(q_ptr + b * sqb, q_at, inside, dims, D, BLOCK_D)
        grad = load_rows(grad_ptr + b * sgb, g_at, inside, dims, D, BLOCK_D)
        row = b * tokens * heads + n * heads + h
        norm = tl.load(lse_ptr + row, mask=inside, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
        p = tl.exp2(tl.where(inside[None, :], score - norm[None, :], float("-inf")))
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    line = ((share * entries + entry).to(tl.int64) * extra + own) * D
    store_rows(dk_ptr, line, own < extra, dims, dk * scale, D, BLOCK_D)
    store_rows(dv_ptr, line, own < extra, dims, dv, D, BLOCK_D)


@on_device
def extra_gradients(
    grad: Tensor,
    q: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    extra_k: Tensor,
    extra_v: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `extra_k` and `extra_v`, each `[B, E, Hk, D]`."""
    batch, *grid, heads, dim = q.shape
    count, key_heads = extra_k.shape[1:3]
    keys, values = rows_packed(extra_k), rows_packed(extra_v)
    block = min(64, max(16, triton.next_power_of_2(count)))
    steps = triton.cdiv(q[0, ..., 0].numel() // key_heads, ROWS)
    programs = batch * key_heads * triton.cdiv(count, block)
    shares = max(1, min(steps, PROGRAMS // programs))
    dk, dv = (
        q.new_empty(shares, batch, key_heads, count, dim, dtype=torch.float32) for _ in range(2)
    )
    nx, ny, nz = (1,) * (3 - len(grid)) + tuple(grid)
    _extra[(shares * programs,)](
        q, grad, lse, delta, keys, values, dk, dv,
        *strides(q), *strides(grad), *extras(keys), *extras(values),
        nx, ny, nz, heads, heads // key_heads, count, shares, scale, scale * LOG2E,
        RANK=len(grid), BM=block, BN=ROWS, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        WIDE=wide(q, grad), PRECISION=precision(q.element_size()), num_warps=4, num_stages=2,
    )  # fmt: skip
    # Sums are contiguous in the order of the inputs: `[B, E, Hk, D]`.
    first, second = (x.sum(0).transpose(1, 2).to(q.dtype).contiguous() for x in (dk, dv))
    return first, second
