"""ToMe's matching: the best partner of every token, ranks and slots, without storing scores.

Keys are averaged over heads and normalised on the fly. Up to 256 tokens one program does all of an
image in one launch, for at small batches the launches are what costs. Longer ones take two: blocks
of even-position tokens walk the odd ones in chunks, then one program per image ranks and places.
So do keys too wide to be held at once, the residual stream for example, and scores with a factor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import HALF, far_apart, on_device, packed

ONE_PROGRAM = 256
"""Tokens up to which one program takes a whole image."""

WIDEST = 128
"""Values of a key up to which it is held at once."""


@on_device
def bipartite_triton(
    keys: Tensor,
    prefix: int,
    r: int,
    factor: Tensor | None = None,
    exponent: float = 1.0,
    warps: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `vistoken.kernels.bipartite.bipartite`."""
    keys = packed(keys)
    batch, heads, tokens, dim = keys.shape
    evens = (tokens + 1) // 2
    keep = torch.empty(batch, tokens - r, dtype=torch.int64, device=keys.device)
    src = torch.empty(batch, r, dtype=torch.int64, device=keys.device)
    dst = torch.empty(batch, r, dtype=torch.int64, device=keys.device)
    block = max(16, triton.next_power_of_2(max(evens, prefix)))
    block_d = max(16, triton.next_power_of_2(dim))
    apart = far_apart(max(tokens, heads), keys.stride(1), keys.stride(2))
    tiled = factor is not None or dim > WIDEST
    if tokens <= ONE_PROGRAM and not tiled:
        _match_and_place[(batch,)](
            keys, keep, src, dst, *keys.stride()[:3], tokens, prefix, r,
            HEADS=heads, BLOCK=block, D=dim, BLOCK_D=block_d, WIDE=apart, num_warps=warps,
        )  # fmt: skip
        return keep, src, dst
    best = torch.empty(batch, evens, dtype=torch.float32, device=keys.device)
    partner = torch.empty(batch, evens, dtype=torch.int32, device=keys.device)
    grid = (triton.cdiv(evens, 64), batch)
    if tiled:
        rows = keys if factor is None else packed(factor)
        half = heads == 1 and keys.dtype in HALF  # else products are taken in fp32, in registers
        _match_tiled[grid](
            keys, rows, best, partner, *keys.stride()[:3], rows.stride(0), tokens, prefix,
            float(exponent), HEADS=heads, ROWS=64, CHUNK=128 if half and tokens > 128 else 64,
            D=dim, BLOCK_D=min(64 if half else 32, block_d), SCORED=factor is not None,
            LINEAR=exponent == 1, WIDE=apart, num_warps=4, num_stages=3 if half else 1,
        )  # fmt: skip
    else:
        _match[grid](
            keys, best, partner, *keys.stride()[:3], tokens, prefix,
            HEADS=heads, ROWS=64, CHUNK=64, D=dim, BLOCK_D=block_d, WIDE=apart,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    _place_all[(batch,)](
        best, partner, keep, src, dst, tokens, prefix, r,
        BLOCK=block, CHUNK=max(4, min(block, 16384 // block)), num_warps=warps,
    )  # fmt: skip
    return keep, src, dst


@triton.jit
def _metric(
    base, positions, valid, sh, sn, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Unit-length head means of the keys at `positions`."""
    dims = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (dims[None, :] < D)
    total = tl.zeros([positions.shape[0], BLOCK_D], tl.float32)
    if WIDE:
        positions = positions.to(tl.int64)
    for _ in tl.static_range(HEADS):
        at = base + positions[:, None] * sn + dims[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        base += sh
    length = tl.sqrt(tl.sum(total * total, 1))
    return total / tl.maximum(length, 1e-12)[:, None]


@triton.jit
def _cosine(a, b):
    """`a b^T` of unit rows, each split in two fp16 numbers: as exact as fp32, at the speed of half.

    Entries lie within one, so that fp16 keeps 11 bits of them and the rest keeps 11 more.
    """
    a_high, b_high = a.to(tl.float16), b.to(tl.float16)
    a_low = (a - a_high.to(tl.float32)).to(tl.float16)
    b_low = (b - b_high.to(tl.float32)).to(tl.float16)
    score = tl.dot(a_low, tl.trans(b_high))
    score = tl.dot(a_high, tl.trans(b_low), score)
    return tl.dot(a_high, tl.trans(b_high), score)


@triton.jit
def _usable(score, columns, first, end):
    """Scores with unusable columns out of reach; a NaN loses, but leaves every index valid."""
    score = tl.where(score == score, score, -2.0)
    return tl.where(((columns >= first) & (columns < end))[None, :], score, float("-inf"))


COUNTS = ["tokens", "prefix", "r"]


@triton.jit(do_not_specialize=COUNTS)
def _match_and_place(
    key_ptr, keep_ptr, src_ptr, dst_ptr, sb, sh, sn, tokens, prefix, r,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The whole matching of one image."""
    b = tl.program_id(0).to(tl.int64)
    base = key_ptr + b * sb
    evens, odds = (tokens + 1) // 2, tokens // 2
    a = tl.arange(0, BLOCK)
    metric = _metric(base, a * 2, a < evens, sh, sn, HEADS, D, BLOCK_D, WIDE)
    other = _metric(base, a * 2 + 1, a < odds, sh, sn, HEADS, D, BLOCK_D, WIDE)
    score = _usable(_cosine(metric, other), a, prefix // 2, odds)
    best, partner = tl.max(score, 1, return_indices=True)
    # Prefix rows and padding rank behind every candidate, so they never merge.
    best = tl.where((a >= (prefix + 1) // 2) & (a < evens), best, float("-inf"))
    rank = tl.sum(_outranks(best, a, best, a), 1)
    _place(b, a, rank, partner, keep_ptr, src_ptr, dst_ptr, tokens, prefix, r)


@triton.jit(do_not_specialize=["tokens", "prefix"])
def _match(
    key_ptr, best_ptr, partner_ptr, sb, sh, sn, tokens, prefix,
    HEADS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    base = key_ptr + b * sb
    odd_prefix = prefix // 2
    evens, odds = (tokens + 1) // 2, tokens // 2
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    metric = _metric(base, a * 2, a < evens, sh, sn, HEADS, D, BLOCK_D, WIDE)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    partner = tl.zeros([ROWS], tl.int32) + odd_prefix
    for start in range(0, odds, CHUNK):
        o = start + tl.arange(0, CHUNK)
        other = _metric(base, o * 2 + 1, o < odds, sh, sn, HEADS, D, BLOCK_D, WIDE)
        score = _usable(_cosine(metric, other), o, odd_prefix, odds)
        here, index = tl.max(score, 1, return_indices=True)
        better = here > best
        partner = tl.where(better, index + start, partner)
        best = tl.where(better, here, best)
    best = tl.where(a >= (prefix + 1) // 2, best, float("-inf"))
    tl.store(best_ptr + b * evens + a, best, mask=a < evens)
    tl.store(partner_ptr + b * evens + a, partner, mask=a < evens)


@triton.jit
def _tile(
    base, positions, valid, dims, sh, sn, HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr
):
    """Sums over heads of the keys' values `dims` at `positions`; of one head as they are."""
    mask = valid[:, None] & (dims[None, :] < D)
    at = (positions.to(tl.int64) if WIDE else positions)[:, None] * sn + dims[None, :]
    tile = tl.load(base + at, mask=mask, other=0.0)
    if HEADS > 1:
        tile = tile.to(tl.float32)
        for _ in tl.static_range(HEADS - 1):
            base += sh
            tile += tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    return tile


@triton.jit(do_not_specialize=["tokens", "prefix", "factor_row"])
def _match_tiled(
    key_ptr, factor_ptr, best_ptr, partner_ptr, sb, sh, sn, factor_row, tokens, prefix, exponent,
    HEADS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SCORED: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`_match` for keys of any width, which are read in tiles, and for scores with a factor."""
    b = tl.program_id(1).to(tl.int64)
    base, factor_ptr = key_ptr + b * sb, factor_ptr + b * factor_row
    odd_prefix = prefix // 2
    evens, odds = (tokens + 1) // 2, tokens // 2
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    partner = tl.zeros([ROWS], tl.int32) + odd_prefix
    for start in range(0, odds, CHUNK):
        o = start + tl.arange(0, CHUNK)
        score = tl.zeros([ROWS, CHUNK], tl.float32)
        own = tl.zeros([ROWS], tl.float32)
        theirs = tl.zeros([CHUNK], tl.float32)
        for first in range(0, D, BLOCK_D):
            dims = first + tl.arange(0, BLOCK_D)
            x = _tile(base, a * 2, a < evens, dims, sh, sn, HEADS, D, WIDE)
            y = _tile(base, o * 2 + 1, o < odds, dims, sh, sn, HEADS, D, WIDE)
            score = tl.dot(x, tl.trans(y), score, input_precision="ieee")
            own += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
            theirs += tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
        score /= tl.maximum(tl.sqrt(own), 1e-12)[:, None]
        score /= tl.maximum(tl.sqrt(theirs), 1e-12)[None, :]
        if SCORED:
            score = tl.maximum((score + 1) / 2, 0.0)
            if not LINEAR:
                score = tl.exp2(exponent * tl.log2(score))
            score *= tl.load(factor_ptr + o * 2 + 1, mask=o < odds, other=0.0)[None, :]
        score = _usable(score, o, odd_prefix, odds)
        here, index = tl.max(score, 1, return_indices=True)
        better = here > best
        partner = tl.where(better, index + start, partner)
        best = tl.where(better, here, best)
    if SCORED:
        best *= tl.load(factor_ptr + a * 2, mask=a < evens, other=0.0)
        best = tl.where(best == best, best, -2.0)
    best = tl.where(a >= (prefix + 1) // 2, best, float("-inf"))
    tl.store(best_ptr + b * evens + a, best, mask=a < evens)
    tl.store(partner_ptr + b * evens + a, partner, mask=a < evens)


@triton.jit(do_not_specialize=COUNTS)
def _place_all(
    best_ptr, partner_ptr, keep_ptr, src_ptr, dst_ptr, tokens, prefix, r,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Ranks and slots of one image."""
    b = tl.program_id(0).to(tl.int64)
    evens = (tokens + 1) // 2
    a = tl.arange(0, BLOCK)
    best = tl.load(best_ptr + b * evens + a, mask=a < evens, other=float("-inf"))
    partner = tl.load(partner_ptr + b * evens + a, mask=a < evens, other=0)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, evens, CHUNK):
        j = start + tl.arange(0, CHUNK)
        value = tl.load(best_ptr + b * evens + j, mask=j < evens, other=float("-inf"))
        rank += tl.sum(_outranks(value, j, best, a), 1)
    _place(b, a, rank, partner, keep_ptr, src_ptr, dst_ptr, tokens, prefix, r)


@triton.jit
def _outranks(value, j, best, a):
    """Whether rival j with `value` comes before token a with `best`; ties go to the first."""
    above = (value[None, :] > best[:, None]) | (
        (value[None, :] == best[:, None]) & (j[None, :] < a[:, None])
    )
    return above.to(tl.int32)


@triton.jit
def _place(b, a, rank, partner, keep_ptr, src_ptr, dst_ptr, tokens, prefix, r):
    """Write the slots: prefix, even ones left over in their order, odd ones."""
    even_prefix, odd_prefix = (prefix + 1) // 2, prefix // 2
    evens, odds = (tokens + 1) // 2, tokens // 2
    candidate = (a >= even_prefix) & (a < evens)
    merged = candidate & (rank < r)
    # A token that stays moves up by the number of merged ones before it.
    place = a - even_prefix - tl.cumsum(merged.to(tl.int32), 0)
    lefts = evens - even_prefix - r
    keep_row, src_row, dst_row = keep_ptr + b * (tokens - r), src_ptr + b * r, dst_ptr + b * r
    tl.store(keep_row + a, a.to(tl.int64), mask=a < prefix)
    left = candidate & (rank >= r)
    tl.store(keep_row + prefix + place, (a * 2).to(tl.int64), mask=left)
    odd = (a >= odd_prefix) & (a < odds)
    tl.store(keep_row + prefix + lefts + a - odd_prefix, (a * 2 + 1).to(tl.int64), mask=odd)
    tl.store(src_row + rank, (a * 2).to(tl.int64), mask=merged)
    tl.store(dst_row + rank, (partner - odd_prefix + prefix + lefts).to(tl.int64), mask=merged)
