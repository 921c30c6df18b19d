"""Row normalisers and column sums of attention, joined heads, best partners of chosen tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import far_apart, on_device, packed

LOG2E = 1.4426950408889634


@on_device
def log_normalizer_triton(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """See `vistoken.kernels.attention.log_normalizer`."""
    q, k = packed(q), packed(k)
    bias = None if bias is None else packed(bias)
    batch, heads, rows, dim = q.shape
    out = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    per_head = bias is not None and bias.dim() == 3
    bias_rows = (0, 0) if bias is None else bias.stride()[:2] if per_head else (bias.stride(0), 0)
    _normalizer[(triton.cdiv(rows, 64) * batch * heads,)](
        q, k, out if bias is None else bias, out, *q.stride()[:3], *k.stride()[:3], *bias_rows,
        heads, rows, k.shape[2], scale * LOG2E, BIASED=bias is not None,
        BLOCK_M=64, BLOCK_N=64, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        WIDE=far_apart(max(rows, k.shape[2]), q.stride(2), k.stride(2)),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "keys", "sbb", "sbh"])
def _normalizer(
    q_ptr, k_ptr, bias_ptr, out_ptr, sqb, sqh, sqn, skb, skh, skn, sbb, sbh,
    heads, rows, keys, scale2,
    BIASED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, BLOCK_M)
    bh = tl.program_id(0) // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    far = at.to(tl.int64) if WIDE else at
    dims = tl.arange(0, BLOCK_D)
    in_d = dims[None, :] < D
    q = tl.load(
        q_ptr + b * sqb + h * sqh + far[:, None] * sqn + dims[None, :],
        mask=(at[:, None] < rows) & in_d, other=0.0,
    )  # fmt: skip
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = cols < keys
        away = cols.to(tl.int64) if WIDE else cols
        k = tl.load(
            k_ptr + b * skb + h * skh + away[:, None] * skn + dims[None, :],
            mask=inside[:, None] & in_d, other=0.0,
        )  # fmt: skip
        score = tl.dot(q, tl.trans(k)) * scale2
        if BIASED:
            bias = tl.load(bias_ptr + b * sbb + h * sbh + cols, mask=inside, other=0.0)
            score += (bias * 1.4426950408889634)[None, :]
        score = tl.where(inside[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(score - new_top[:, None]), 1)
        top = new_top
    value = (top + tl.log2(total)) / 1.4426950408889634
    tl.store(out_ptr + bh.to(tl.int64) * rows + at, value, mask=at < rows)


@on_device
def column_sums_triton(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, lse: Tensor, weight: Tensor
) -> Tensor:
    """See `vistoken.kernels.attention.column_sums`."""
    q, k, lse, weight = packed(q), packed(k), packed(lse), packed(weight)
    added = lse if bias is None else packed(bias)
    batch, heads, keys, dim = k.shape
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    _columns[(triton.cdiv(keys, 64) * batch * heads,)](
        q, k, added, lse, weight, out, *q.stride()[:3], *k.stride()[:3], added.stride(0),
        *lse.stride()[:2], *weight.stride()[:2], heads, q.shape[2], keys, scale * LOG2E,
        BIASED=bias is not None,
        BLOCK_M=64, BLOCK_N=64, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        WIDE=far_apart(max(q.shape[2], keys), q.stride(2), k.stride(2)),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "keys", "sbb", "slb", "slh", "swb", "swh"])
def _columns(
    q_ptr, k_ptr, bias_ptr, lse_ptr, weight_ptr, out_ptr, sqb, sqh, sqn, skb, skh, skn, sbb,
    slb, slh, swb, swh, heads, rows, keys, scale2,
    BIASED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK_N)
    bh = tl.program_id(0) // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < keys
    away = cols.to(tl.int64) if WIDE else cols
    dims = tl.arange(0, BLOCK_D)
    in_d = dims[None, :] < D
    k = tl.load(
        k_ptr + b * skb + h * skh + away[:, None] * skn + dims[None, :],
        mask=inside[:, None] & in_d, other=0.0,
    )  # fmt: skip
    bias = tl.zeros([BLOCK_N], tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + b * sbb + cols, mask=inside, other=0.0).to(tl.float32)
        bias *= 1.4426950408889634
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        within = at < rows
        far = at.to(tl.int64) if WIDE else at
        q = tl.load(
            q_ptr + b * sqb + h * sqh + far[:, None] * sqn + dims[None, :],
            mask=within[:, None] & in_d, other=0.0,
        )  # fmt: skip
        lse = tl.load(lse_ptr + b * slb + h * slh + at, mask=within, other=float("inf"))
        weight = tl.load(weight_ptr + b * swb + h * swh + at, mask=within, other=0.0)
        # No entry exceeds one, so that no maximum is needed; rows beyond the last give zeros.
        score = (
            tl.dot(k, tl.trans(q)) * scale2 + bias[:, None] - (lse * 1.4426950408889634)[None, :]
        )
        total += tl.sum(tl.exp2(score) * weight[None, :], 1)
    tl.store(out_ptr + bh.to(tl.int64) * keys + cols, total, mask=inside)


@on_device
def join_heads_triton(score: Tensor, low: float, high: float) -> Tensor:
    """See `vistoken.kernels.attention.join_heads`."""
    score = score.contiguous()
    batch, heads, tokens = score.shape
    out = torch.empty(batch, tokens, dtype=score.dtype, device=score.device)
    _join[(batch,)](
        score, out, heads, tokens, float(low), float(high),
        BLOCK=max(16, triton.next_power_of_2(tokens)), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["heads", "tokens", "low", "high"])
def _join(score_ptr, out_ptr, heads, tokens, low, high, BLOCK: tl.constexpr):
    b, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = n < tokens
    chosen, every = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    count = 0
    for h in range(heads):
        at = (b * heads + h) * tokens + n
        score = tl.load(score_ptr + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, score - tl.sum(score, 0) / tokens, 0.0)
        spread = tl.sum(centred * centred, 0) * tokens  # the variance of N times the score
        passes = (spread >= low) & (spread <= high)
        every += score * score
        chosen += tl.where(passes, score * score, 0.0)
        count += passes.to(tl.int32)
    joined = tl.where(count > 0, chosen / tl.maximum(count, 1), every / heads)
    tl.store(out_ptr + b * tokens + n, tl.sqrt(joined).to(out_ptr.dtype.element_ty), mask=inside)


@on_device
def best_match_at_triton(x: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """See `vistoken.kernels.match.best_match_at`."""
    x, src, dst = packed(x), packed(src), packed(dst)
    batch, sources = src.shape
    value = torch.empty(batch, sources, dtype=torch.float32, device=x.device)
    index = torch.empty(batch, sources, dtype=torch.int64, device=x.device)
    rows = 16 if sources <= 16 else 32
    _partner[(triton.cdiv(sources, rows), batch)](
        x, src, dst, value, index, *x.stride()[:2], src.stride(0), dst.stride(0),
        sources, dst.shape[1], x.shape[2],
        ROWS=rows, CHUNK=64, BLOCK_C=64, num_warps=4, num_stages=2,
    )  # fmt: skip
    return value, index


@triton.jit(
    do_not_specialize=["sources", "targets", "src_row", "dst_row"],
    do_not_specialize_on_alignment=["src_ptr", "dst_ptr"],
)
def _partner(
    x_ptr, src_ptr, dst_ptr, value_ptr, index_ptr, sxb, sxn, src_row, dst_row,
    sources, targets, width, ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    token = tl.load(src_ptr + b * src_row + s, mask=s < sources, other=0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    partner = tl.zeros([ROWS], tl.int32)
    for start in range(0, targets, CHUNK):
        t = start + tl.arange(0, CHUNK)
        other = tl.load(dst_ptr + b * dst_row + t, mask=t < targets, other=0)
        score = tl.zeros([ROWS, CHUNK], tl.float32)
        own = tl.zeros([ROWS], tl.float32)
        theirs = tl.zeros([CHUNK], tl.float32)
        for at in range(0, width, BLOCK_C):
            inside = (at + c < width)[None, :]
            x = tl.load(
                x_ptr + b * sxb + token[:, None] * sxn + at + c[None, :], mask=inside, other=0.0
            )
            y = tl.load(
                x_ptr + b * sxb + other[:, None] * sxn + at + c[None, :], mask=inside, other=0.0
            )
            score = tl.dot(x, tl.trans(y), score)
            own += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
            theirs += tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
        length = (
            tl.maximum(tl.sqrt(own), 1e-12)[:, None] * tl.maximum(tl.sqrt(theirs), 1e-12)[None, :]
        )
        score = tl.where((t < targets)[None, :], score / length, float("-inf"))
        here, found = tl.max(score, 1, return_indices=True)
        better = here > best
        partner = tl.where(better, found + start, partner)
        best = tl.where(better, here, best)
    tl.store(value_ptr + b * sources + s, best, mask=s < sources)
    tl.store(index_ptr + b * sources + s, partner.to(tl.int64), mask=s < sources)
