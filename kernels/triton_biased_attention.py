"""Attention whose keys weigh by token size, with the class row as a by-product.

One program computes a block of query rows of one head with an online softmax, so no N x N matrix is
stored. Scores and bias are in powers of two, the bias beforehand and padded with minus infinity:
that hides the keys past the end, whose loads repeat the last key instead of being masked. Where at
most 16 query rows are left for the last program, it takes a quarter of the usual block. Keys that
are not alive are seen by their own query alone. After it the first program of each head walks the
keys again for the class tokens' normalised rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import far_apart, on_device, packed

LOG2E = 1.4426950408889634
PAD = 64
"""Every block of keys divides this."""


@on_device
def biased_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    class_tokens: int = 0,
    alive: Tensor | None = None,
    lse: Tensor | None = None,
    sizes: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `vistoken.kernels.biased_attention.biased_attention`; the row is per head.

    `lse` `[B, H, N]` fp32 contiguous, where given, receives every query's log-sum-exp of scores.
    With `sizes` the bias holds token sizes instead of their logarithms.
    """
    q, k, v = packed(q), packed(k), packed(v)
    alive = None if alive is None else packed(alive)
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    row = q.new_empty((batch, heads, tokens) if class_tokens else (0,), dtype=torch.float32)
    block_m, block_n, warps, stages, peel = config(dim)
    if bias is not None:
        bias = padded_log2(bias, sizes)
    _attention[(triton.cdiv(tokens, block_m) * batch * heads,)](
        q, k, v, row if bias is None else bias, out, row, row if lse is None else lse,
        row if alive is None else alive,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, tokens, scale * LOG2E, 0 if bias is None else bias.stride(0),
        0 if alive is None else alive.stride(0),
        BIASED=bias is not None, CLASS_TOKENS=class_tokens, LSE=lse is not None,
        ALIVE=alive is not None,
        WIDE=far_apart(tokens, q.stride(2), k.stride(2), v.stride(2), out.stride(2)),
        BLOCK_M=block_m, BLOCK_N=block_n, PEEL=peel, D=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, row


def config(dim: int) -> tuple[int, int, int, int, bool]:
    """Query rows, key rows, warps, stages, and whether the last keys have a loop of their own.

    Measured at 197 and 577 tokens: `benchmarks/results/kernels-h100.json`.
    """
    if dim > 64:
        return 64, 64, 4, 2, True
    return 64, 32, 4, 3, False


def padded_log2(bias: Tensor, sizes: bool) -> Tensor:
    """Bias or sizes `[B, N]` in powers of two, `[B, M]` fp32, minus infinity past the end."""
    batch, tokens = bias.shape
    width = triton.cdiv(tokens, PAD) * PAD
    out = torch.empty(batch, width, dtype=torch.float32, device=bias.device)
    bias = packed(bias)
    _log2[(batch,)](
        bias, out, bias.stride(0), tokens, width,
        SIZES=sizes, BLOCK=max(PAD, triton.next_power_of_2(width)), num_warps=1,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["bias_row", "tokens"])
def _log2(bias_ptr, out_ptr, bias_row, tokens, width, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    b, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(bias_ptr + b * bias_row + cols, mask=cols < tokens, other=1.0).to(tl.float32)
    value = tl.log2(value) if SIZES else value * 1.4426950408889634
    value = tl.where(cols < tokens, value, float("-inf"))
    tl.store(out_ptr + b * width + cols, value, mask=cols < width)


@triton.jit
def _rows(base, at, step, dims, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Rows `at` of a `[N, d]` matrix; padding of d is zero."""
    if WIDE:
        at = at.to(tl.int64)
    pointers = base + at[:, None] * step + dims[None, :]
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < D, other=0.0)


@triton.jit
def _keys(
    q, acc, total, top, k_base, v_base, bias_base, alive_base, rows, start, skn, svn, dims, tokens,
    scale2, BIASED: tl.constexpr, ALIVE: tl.constexpr, LAST: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax; only the LAST ones may run past the end."""
    cols = start + tl.arange(0, BLOCK_N)
    at = tl.minimum(cols, tokens - 1) if LAST else cols
    k = _rows(k_base, at, skn, dims, D, BLOCK_D, WIDE)
    score = tl.dot(q, tl.trans(k)) * scale2
    if BIASED:
        score += tl.load(bias_base + cols)[None, :]
    if ALIVE:
        # Finite, so that a block of dead keys gives no NaN; a row's own key wipes what it adds.
        alive = tl.load(alive_base + cols, mask=cols < tokens, other=0) != 0
        score = tl.where(alive[None, :] | (rows[:, None] == cols[None, :]), score, -1e30)
    if LAST and (ALIVE or not BIASED):
        score = tl.where((cols < tokens)[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    p = tl.exp2(score - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, 1)
    v = _rows(v_base, at, svn, dims, D, BLOCK_D, WIDE)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
    return acc, total, new_top


@triton.jit
def _queries(
    first, q_base, k_base, v_base, bias_base, alive_base, out_base, row_base, lse_base,
    sqn, skn, svn, son, tokens, scale2,
    BIASED: tl.constexpr, CLASS_TOKENS: tl.constexpr, LSE: tl.constexpr, ALIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PEEL: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of query rows of one head."""
    rows = first + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q = _rows(q_base, tl.minimum(rows, tokens - 1), sqn, dims, D, BLOCK_D, WIDE)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = tokens // BLOCK_N * BLOCK_N if PEEL else 0
    for start in range(0, whole, BLOCK_N):
        acc, total, top = _keys(
            q, acc, total, top, k_base, v_base, bias_base, alive_base, rows, start, skn, svn, dims,
            tokens, scale2, BIASED, ALIVE, False, BLOCK_N, D, BLOCK_D, WIDE,
        )  # fmt: skip
    STEP: tl.constexpr = 16 if PEEL else BLOCK_N
    for start in range(whole, tokens, STEP):
        acc, total, top = _keys(
            q, acc, total, top, k_base, v_base, bias_base, alive_base, rows, start, skn, svn, dims,
            tokens, scale2, BIASED, ALIVE, True, STEP, D, BLOCK_D, WIDE,
        )  # fmt: skip
    acc = acc / total[:, None]
    norm = top + tl.log2(total)
    if LSE:
        tl.store(lse_base + rows, norm / 1.4426950408889634, mask=rows < tokens)
    far = rows.to(tl.int64) if WIDE else rows
    tl.store(
        out_base + far[:, None] * son + dims[None, :],
        acc.to(out_base.dtype.element_ty), mask=(rows[:, None] < tokens) & (dims[None, :] < D),
    )  # fmt: skip
    if CLASS_TOKENS > 0:  # noqa: SIM102 (a constexpr condition must stand alone)
        if first == 0:
            for start in range(0, tokens, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                at = tl.minimum(cols, tokens - 1)
                k = _rows(k_base, at, skn, dims, D, BLOCK_D, WIDE).to(tl.float32)
                paid = tl.zeros([BLOCK_N], tl.float32)
                q_row_ptr = q_base
                for c in tl.static_range(CLASS_TOKENS):
                    own = tl.sum(tl.where(rows == c, norm, 0.0), 0)
                    q_row = tl.load(q_row_ptr + dims, mask=dims < D, other=0.0)
                    score = tl.sum(k * q_row.to(tl.float32)[None, :], 1) * scale2
                    if BIASED:
                        score += tl.load(bias_base + cols)
                    if ALIVE:
                        alive = tl.load(alive_base + cols, mask=cols < tokens, other=0) != 0
                        score = tl.where(alive | (cols == c), score, -1e30)
                    paid += tl.exp2(score - own)
                    q_row_ptr += sqn
                tl.store(row_base + cols, paid / CLASS_TOKENS, mask=cols < tokens)


@triton.jit(do_not_specialize=["tokens", "alive_row"])
def _attention(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, row_ptr, lse_ptr, alive_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    heads, tokens, scale2, bias_row, alive_row,
    BIASED: tl.constexpr, CLASS_TOKENS: tl.constexpr, LSE: tl.constexpr, ALIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PEEL: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # One axis for all: the others end at 65,535. Neighbors are blocks of one head.
    blocks = tl.cdiv(tokens, BLOCK_M)
    first, bh = tl.program_id(0) % blocks * BLOCK_M, tl.program_id(0) // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    bh = bh.to(tl.int64)
    q_base, out_base = q_ptr + b * sqb + h * sqh, out_ptr + b * sob + h * soh
    k_base, v_base = k_ptr + b * skb + h * skh, v_ptr + b * svb + h * svh
    bias_base, alive_base = bias_ptr + b * bias_row, alive_ptr + b * alive_row
    row_base, lse_base = row_ptr + bh * tokens, lse_ptr + bh * tokens
    if tokens - first > 16:
        _queries(
            first, q_base, k_base, v_base, bias_base, alive_base, out_base, row_base, lse_base,
            sqn, skn, svn, son, tokens, scale2,
            BIASED, CLASS_TOKENS, LSE, ALIVE, BLOCK_M, BLOCK_N, PEEL, D, BLOCK_D, WIDE,
        )  # fmt: skip
    else:
        _queries(
            first, q_base, k_base, v_base, bias_base, alive_base, out_base, row_base, lse_base,
            sqn, skn, svn, son, tokens, scale2,
            BIASED, CLASS_TOKENS, LSE, ALIVE, 16, 64, False, D, BLOCK_D, WIDE,
        )  # fmt: skip
