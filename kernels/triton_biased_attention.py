"""Attention whose keys weigh by token size, with the class row as a by-product.

One program computes a block of query rows of one head with an online softmax, so no N x N matrix is
stored. The bias joins the scaled score in powers of two. Only the last key block is masked.
Keys that are not alive are seen by their own query alone.
After it the first program of each head walks the keys again for the class tokens' normalised rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


def biased_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    class_tokens: int = 0,
    alive: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `vistoken.kernels.biased_attention.biased_attention`; the row is per head.

    `lse` `[B, H, N]` fp32 contiguous, where given, receives every query's log-sum-exp of scores.
    """
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    row = q.new_empty((batch, heads, tokens) if class_tokens else (0,), dtype=torch.float32)
    block_m, block_n, warps, stages = config(tokens, dim)
    _attention[(triton.cdiv(tokens, block_m), batch * heads)](
        q, k, v, row if bias is None else bias, out, row, row if lse is None else lse,
        row if alive is None else alive,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, tokens, scale * LOG2E, 0 if bias is None else bias.stride(0),
        0 if alive is None else alive.stride(0),
        BIASED=bias is not None, CLASS_TOKENS=class_tokens, LSE=lse is not None,
        ALIVE=alive is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, row


def config(tokens: int, dim: int) -> tuple[int, int, int, int]:
    """Query rows, key rows, warps and stages for a length and head width."""
    if dim > 64 or tokens > 256:
        return 64, 64, 4, 2
    return 64, 32, 4, 3


@triton.jit
def _rows(
    base, at, step, dims, tokens, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows `at` of a `[N, d]` matrix; padding is zero."""
    pointers = base + at[:, None] * step + dims[None, :]
    if MASKED:
        return tl.load(pointers, mask=(at[:, None] < tokens) & (dims[None, :] < D), other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < D, other=0.0)


@triton.jit
def _keys(
    q, acc, total, top, k_base, v_base, bias_base, alive_base, rows, start, skn, svn, dims, tokens,
    scale2, BIASED: tl.constexpr, ALIVE: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax."""
    cols = start + tl.arange(0, BLOCK_N)
    k = _rows(k_base, cols, skn, dims, tokens, MASKED, D, BLOCK_D)
    score = tl.dot(q, tl.trans(k)) * scale2
    if BIASED:
        if MASKED:
            bias = tl.load(bias_base + cols, mask=cols < tokens, other=0.0)
        else:
            bias = tl.load(bias_base + cols)
        score += (bias * 1.4426950408889634)[None, :]
    if ALIVE:
        # Finite, so that a block of dead keys gives no NaN; a row's own key wipes what it adds.
        alive = tl.load(alive_base + cols, mask=cols < tokens, other=0) != 0
        score = tl.where(alive[None, :] | (rows[:, None] == cols[None, :]), score, -1e30)
    if MASKED:
        score = tl.where((cols < tokens)[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    p = tl.exp2(score - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, 1)
    v = _rows(v_base, cols, svn, dims, tokens, MASKED, D, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
    return acc, total, new_top


@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, row_ptr, lse_ptr, alive_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    heads, tokens, scale2, bias_row, alive_row,
    BIASED: tl.constexpr, CLASS_TOKENS: tl.constexpr, LSE: tl.constexpr, ALIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q_base = q_ptr + b * sqb + h * sqh
    k_base, v_base = k_ptr + b * skb + h * skh, v_ptr + b * svb + h * svh
    bias_base, alive_base = bias_ptr + b * bias_row, alive_ptr + b * alive_row
    q = _rows(q_base, rows, sqn, dims, tokens, True, D, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = tokens // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc, total, top = _keys(
            q, acc, total, top, k_base, v_base, bias_base, alive_base, rows, start, skn, svn, dims,
            tokens, scale2, BIASED, ALIVE, False, BLOCK_N, D, BLOCK_D,
        )  # fmt: skip
    if whole < tokens:
        acc, total, top = _keys(
            q, acc, total, top, k_base, v_base, bias_base, alive_base, rows, whole, skn, svn, dims,
            tokens, scale2, BIASED, ALIVE, True, BLOCK_N, D, BLOCK_D,
        )  # fmt: skip
    acc = acc / total[:, None]
    if LSE:
        norm = (top + tl.log2(total)) / 1.4426950408889634
        tl.store(lse_ptr + bh.to(tl.int64) * tokens + rows, norm, mask=rows < tokens)
    tl.store(
        out_ptr + b * sob + h * soh + rows[:, None] * son + dims[None, :],
        acc.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < tokens) & (dims[None, :] < D),
    )  # fmt: skip
    if CLASS_TOKENS > 0:  # noqa: SIM102 (a constexpr condition must stand alone)
        if block == 0:
            norm = top + tl.log2(total)
            for start in range(0, tokens, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                inside = cols < tokens
                k = _rows(k_base, cols, skn, dims, tokens, True, D, BLOCK_D).to(tl.float32)
                paid = tl.zeros([BLOCK_N], tl.float32)
                for c in tl.static_range(CLASS_TOKENS):
                    own = tl.sum(tl.where(rows == c, norm, 0.0), 0)
                    q_row = tl.load(q_base + c * sqn + dims, mask=dims < D, other=0.0)
                    score = tl.sum(k * q_row.to(tl.float32)[None, :], 1) * scale2
                    if BIASED:
                        bias = tl.load(bias_base + cols, mask=inside, other=0.0)
                        score += bias * 1.4426950408889634
                    if ALIVE:
                        alive = tl.load(alive_base + cols, mask=inside, other=0) != 0
                        score = tl.where(alive | (cols == c), score, -1e30)
                    paid += tl.exp2(score - own)
                tl.store(
                    row_ptr + bh.to(tl.int64) * tokens + cols, paid / CLASS_TOKENS, mask=inside
                )
