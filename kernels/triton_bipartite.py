"""ToMe's matching in two launches: the best partner of every token, then ranks and slots.

The first kernel averages keys over heads, normalises them and walks the odd-position tokens in
chunks, keeping the best partner of each even-position token; scores are never stored. The second
ranks the even ones by counting how many score higher, and writes slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def bipartite_triton(keys: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `vistoken.kernels.bipartite.bipartite`."""
    batch, heads, tokens, dim = keys.shape
    evens = (tokens + 1) // 2
    best = torch.empty(batch, evens, dtype=torch.float32, device=keys.device)
    partner = torch.empty(batch, evens, dtype=torch.int32, device=keys.device)
    keep = torch.empty(batch, tokens - r, dtype=torch.int64, device=keys.device)
    src = torch.empty(batch, r, dtype=torch.int64, device=keys.device)
    dst = torch.empty(batch, r, dtype=torch.int64, device=keys.device)
    rows = 64 if batch > 32 else 32
    _match[(triton.cdiv(evens, rows), batch)](
        keys, best, partner, *keys.stride()[:3], tokens, prefix,
        HEADS=heads, ROWS=rows, CHUNK=64, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    _slots[(triton.cdiv(evens, rows), batch)](
        best, partner, keep, src, dst, tokens, prefix, r,
        BLOCK=max(16, triton.next_power_of_2(evens)), ROWS=rows, num_warps=4,
    )  # fmt: skip
    return keep, src, dst


@triton.jit
def _metric(
    base, positions, valid, sh, sn, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Unit-length head means of the keys at `positions`."""
    dims = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (dims[None, :] < D)
    total = tl.zeros([positions.shape[0], BLOCK_D], tl.float32)
    for head in tl.static_range(HEADS):
        at = base + head * sh + positions[:, None] * sn + dims[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(total * total, 1))
    return total / tl.maximum(length, 1e-12)[:, None]


@triton.jit
def _match(
    key_ptr, best_ptr, partner_ptr, sb, sh, sn, tokens, prefix,
    HEADS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    base = key_ptr + b * sb
    odd_prefix = prefix // 2
    evens, odds = (tokens + 1) // 2, tokens // 2
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    metric = _metric(base, a * 2, a < evens, sh, sn, HEADS, D, BLOCK_D)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    partner = tl.zeros([ROWS], tl.int32) + odd_prefix
    for start in range(0, odds, CHUNK):
        o = start + tl.arange(0, CHUNK)
        other = _metric(base, o * 2 + 1, o < odds, sh, sn, HEADS, D, BLOCK_D)
        score = tl.dot(metric, tl.trans(other), input_precision="tf32x3")
        usable = (o >= odd_prefix) & (o < odds)
        score = tl.where(usable[None, :], score, float("-inf"))
        here, index = tl.max(score, 1, return_indices=True)
        better = here > best
        partner = tl.where(better, index + start, partner)
        best = tl.where(better, here, best)
    # Prefix rows rank behind every candidate, so they never merge.
    best = tl.where(a >= (prefix + 1) // 2, best, float("-inf"))
    tl.store(best_ptr + b * evens + a, best, mask=a < evens)
    tl.store(partner_ptr + b * evens + a, partner, mask=a < evens)


@triton.jit
def _slots(
    best_ptr, partner_ptr, keep_ptr, src_ptr, dst_ptr, tokens, prefix, r,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    even_prefix, odd_prefix = (prefix + 1) // 2, prefix // 2
    evens, odds = (tokens + 1) // 2, tokens // 2
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    candidate = (a >= even_prefix) & (a < evens)
    best = tl.load(best_ptr + b * evens + a, mask=candidate, other=float("-inf"))
    partner = tl.load(partner_ptr + b * evens + a, mask=candidate, other=0)
    rank = tl.zeros([ROWS], tl.int32)
    for start in range(0, BLOCK, 64):
        j = start + tl.arange(0, 64)
        rival = (j >= even_prefix) & (j < evens)
        value = tl.load(best_ptr + b * evens + j, mask=rival, other=float("-inf"))
        above = (value[None, :] > best[:, None]) | (
            (value[None, :] == best[:, None]) & (j[None, :] < a[:, None])
        )
        rank += tl.sum((above & rival[None, :]).to(tl.int32), 1)
    merged = candidate & (rank < r)
    left = candidate & (rank >= r)
    # A token that stays moves up by the number of merged ones before it.
    before = tl.zeros([ROWS], tl.int32)
    for start in range(0, BLOCK, 64):
        j = start + tl.arange(0, 64)
        rival = (j >= even_prefix) & (j < evens)
        value = tl.load(best_ptr + b * evens + j, mask=rival, other=float("-inf"))
        ahead = tl.zeros([64], tl.int32)
        for other in range(0, BLOCK, 64):
            i = other + tl.arange(0, 64)
            counted = (i >= even_prefix) & (i < evens)
            score = tl.load(best_ptr + b * evens + i, mask=counted, other=float("-inf"))
            above = (score[None, :] > value[:, None]) | (
                (score[None, :] == value[:, None]) & (i[None, :] < j[:, None])
            )
            ahead += tl.sum((above & counted[None, :]).to(tl.int32), 1)
        goes = rival & (ahead < r)
        before += tl.sum((goes[None, :] & (j[None, :] < a[:, None])).to(tl.int32), 1)
    place = a - even_prefix - before
    lefts = evens - even_prefix - r
    keep_row, src_row, dst_row = keep_ptr + b * (tokens - r), src_ptr + b * r, dst_ptr + b * r
    tl.store(keep_row + a, a.to(tl.int64), mask=a < prefix)
    tl.store(keep_row + prefix + place, (a * 2).to(tl.int64), mask=left)
    odd = (a >= odd_prefix) & (a < odds)
    tl.store(keep_row + prefix + lefts + a - odd_prefix, (a * 2 + 1).to(tl.int64), mask=odd)
    tl.store(src_row + rank, (a * 2).to(tl.int64), mask=merged)
    tl.store(dst_row + rank, (partner - odd_prefix + prefix + lefts).to(tl.int64), mask=merged)
