"""Triton kernel of `decode_attention`: keys of a head are split over programs, one launch in all.

Every program leaves a partial softmax; the one that arrives last at the head's counter puts them
together and sets the counter back to zero for the next launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vistoken.kernels.dispatch import on_device

BLOCK = 64
"""Keys per step."""

PROGRAMS = 512
"""Programs that fill a large GPU; a head's keys are split until there are about as many."""

MAX_SPLITS = 16


@triton.jit
def _rotated(ptr, d, mask, partner, sign, cos, sin):
    """Heads at `ptr + d` after rotary embedding, fp32."""
    x = tl.load(ptr + d, mask=mask, other=0.0).to(tl.float32)
    turned = tl.load(ptr + partner, mask=mask, other=0.0).to(tl.float32) * sign
    return x * cos + turned * sin


@triton.jit
def _decode_attention(
    qkv_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, length_ptr, part_ptr, peak_ptr, sum_ptr,
    count_ptr, out_ptr, capacity, scale2,
    GROUPS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One share of the keys of one key head; SHARE query heads read it."""
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = pair // GROUPS
    g = pair % GROUPS
    HEADS: tl.constexpr = GROUPS * SHARE
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, ROWS)
    partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
    sign = tl.where(d < D // 2, -1.0, 1.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(length_ptr + b).to(tl.int32)
    per = tl.cdiv(tl.cdiv(length + 1, SPLITS), BLOCK) * BLOCK
    begin = split * per
    end = tl.minimum(begin + per, length)
    cos = tl.load(cos_ptr + b * D + d, mask=d < D, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + b * D + d, mask=d < D, other=0.0).to(tl.float32)
    row_ptr = qkv_ptr + b * (HEADS + 2 * GROUPS) * D
    heads = (g * SHARE + r)[:, None] * D
    real = (r < SHARE)[:, None] & (d < D)[None, :]
    q = _rotated(
        row_ptr, heads + d[None, :], real, heads + partner[None, :], sign[None, :], cos[None, :],
        sin[None, :],
    )  # fmt: skip
    dtype = key_ptr.dtype.element_ty
    q = q.to(dtype)
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    base = pair.to(tl.int64) * capacity * D
    j = tl.arange(0, BLOCK)
    if (begin <= length) & (length < begin + per):
        # The new token: into the cache, and into the softmax from registers.
        k = _rotated(
            row_ptr + (HEADS + g) * D, d, d < D, partner, sign, cos, sin,
        ).to(dtype)  # fmt: skip
        v = tl.load(row_ptr + (HEADS + GROUPS + g) * D + d, mask=d < D, other=0.0)
        tl.store(key_ptr + base + length * D + d, k, mask=d < D)
        tl.store(value_ptr + base + length * D + d, v, mask=d < D)
        peak = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale2
        total = tl.full([ROWS], 1.0, tl.float32)
        acc += v.to(tl.float32)[None, :]
    for at in range(begin, end, BLOCK):
        here = at + j < end
        cells = base + (at + j)[:, None] * D + d[None, :]
        mask = here[:, None] & (d < D)[None, :]
        k = tl.load(key_ptr + cells, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        s = tl.where(here[None, :], s, -1e30)
        new = tl.maximum(peak, tl.max(s, 1))
        fade = tl.exp2(peak - new)
        p = tl.exp2(s - new[:, None])
        v = tl.load(value_ptr + cells, mask=mask, other=0.0)
        acc = tl.dot(p.to(dtype), v, acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        peak = new
    slot = (pair * SPLITS + split) * SHARE + r
    tl.store(part_ptr + slot[:, None] * D + d[None, :], acc, mask=real)
    tl.store(peak_ptr + slot, peak, mask=r < SHARE)
    tl.store(sum_ptr + slot, total, mask=r < SHARE)
    # All stores of the program come before its arrival at the counter.
    tl.debug_barrier()
    if tl.atomic_add(count_ptr + pair, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        s = tl.arange(0, SPLITS)
        for i in tl.static_range(SHARE):
            cell = (pair * SPLITS + s) * SHARE + i
            peaks = tl.load(peak_ptr + cell, cache_modifier=".cg")
            factor = tl.exp2(peaks - tl.max(peaks, 0))
            mass = tl.sum(factor * tl.load(sum_ptr + cell, cache_modifier=".cg"), 0)
            grid = cell[:, None] * D + d[None, :]
            some = (s >= 0)[:, None] & (d < D)[None, :]
            part = tl.load(part_ptr + grid, mask=some, other=0.0, cache_modifier=".cg")
            y = tl.sum(part * factor[:, None], 0) / mass
            result = out_ptr + (b * HEADS + g * SHARE + i) * D + d
            tl.store(result, y.to(out_ptr.dtype.element_ty), mask=d < D)
        tl.store(count_ptr + pair, 0)


def splits_of(pairs: int, capacity: int) -> int:
    """Shares per key head, a power of two: enough programs, few without a block of keys."""
    wanted = min(MAX_SPLITS, PROGRAMS // pairs, -(-capacity // BLOCK))
    return 1 << max(0, wanted - 1).bit_length()


@on_device
def decode_attention_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    arrivals: Tensor,
    scale: float,
    early: bool = False,
) -> Tensor:
    """`decode_attention` in one launch; see there."""
    batch, groups, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * groups
    share, pairs = heads // groups, batch * groups
    splits = splits_of(pairs, capacity)
    part = torch.empty(pairs, splits, share, dim, device=qkv.device)
    peak, total = torch.empty(2, pairs, splits, share, device=qkv.device)
    out = qkv.new_empty(batch, heads * dim)
    _decode_attention[(pairs, splits)](
        qkv, cos, sin, keys, values, lengths, part, peak, total, arrivals, out,
        capacity, scale * 1.4426950408889634, GROUPS=groups, SHARE=share, D=dim,
        BLOCK_D=triton.next_power_of_2(dim), SPLITS=splits, BLOCK=BLOCK,
        ROWS=max(16, triton.next_power_of_2(share)), PDL=early, num_warps=4, num_stages=2,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
