"""Gradients of attention whose keys weigh by token size, without an N x N matrix.

Probabilities are computed again from the stored log-sum-exp. One kernel walks the keys for a block
of queries (dQ, and the row sums that both kernels need), the other walks the queries for a block of
keys (dK, dV, bias and mask): every sum belongs to one program, so nothing is added atomically and
results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import far_apart, on_device, packed

LOG2E = 1.4426950408889634


@on_device
def biased_attention_backward_triton(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    alive: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    bias_grad: bool,
    alive_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `vistoken.kernels.biased_attention_backward.biased_attention_backward`."""
    batch, heads, tokens, dim = q.shape
    grad, q, k, v, out = packed(grad), packed(q), packed(k), packed(v), packed(out)
    bias = None if bias is None else packed(bias)
    alive = None if alive is None else packed(alive)
    lse = lse.contiguous()
    # An expanded one, such as that of a sum, has a single number in memory.
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    dq, dk, dv = (q.new_empty(batch, tokens, heads, dim).transpose(1, 2) for _ in range(3))
    row_sum = torch.empty_like(lse)
    per_head = (batch, heads, tokens)
    dbias = q.new_empty(per_head if bias_grad else (0,), dtype=torch.float32)
    dalive = q.new_empty(per_head if alive_grad else (0,), dtype=torch.float32)
    given = (lse if bias is None else bias, lse if alive is None else alive)
    rows = (0 if bias is None else bias.stride(0), 0 if alive is None else alive.stride(0))
    outer, inner, warps, stages = config(dim)
    grid = (triton.cdiv(tokens, outer) * batch * heads,)
    apart = far_apart(tokens, *(x.stride(2) for x in (q, k, v, out, grad, dq)))
    shape = {
        "BIASED": bias is not None, "ALIVE": alive is not None, "OUTER": outer, "INNER": inner,
        "D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "WIDE": apart,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    _query_gradient[grid](
        q, k, v, *given, out, grad, lse, lse if grad_lse is None else grad_lse, row_sum, dq,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *grad.stride()[:3],
        *dq.stride()[:3], heads, tokens, scale, *rows, LSE_GRAD=grad_lse is not None, **shape,
    )  # fmt: skip
    _key_gradient[grid](
        q, k, v, *given, grad, lse, row_sum, dk, dv, dbias, dalive,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *dk.stride()[:3],
        heads, tokens, scale, *rows, BIAS_GRAD=bias_grad, ALIVE_GRAD=alive_grad, **shape,
    )  # fmt: skip
    return dq, dk, dv, dbias.sum(1) if bias_grad else dbias, dalive.sum(1) if alive_grad else dalive


def config(dim: int) -> tuple[int, int, int, int]:
    """Rows of a program's own block, rows of a step, warps and stages for a head width."""
    return (64, 32, 4, 2) if dim <= 64 else (64, 32, 8, 1)


@triton.jit
def _rows(base, at, step, dims, tokens, D: tl.constexpr, WIDE: tl.constexpr):
    """Rows `at` of a `[N, d]` matrix; padding is zero."""
    if WIDE:
        at = at.to(tl.int64)
    pointers = base + at[:, None] * step + dims[None, :]
    return tl.load(pointers, mask=(at[:, None] < tokens) & (dims[None, :] < D), other=0.0)


@triton.jit
def _place(tokens, OUTER: tl.constexpr):
    """Batch entry and head, and block of this program: neighbors are blocks of one head."""
    blocks = tl.cdiv(tokens, OUTER)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks


@triton.jit
def _query_gradient(
    q_ptr, k_ptr, v_ptr, bias_ptr, alive_ptr, out_ptr, grad_ptr, lse_ptr, grad_lse_ptr,
    row_sum_ptr, dq_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sgb, sgh, sgn, sdb, sdh, sdn,
    heads, tokens, scale, bias_row, alive_row,
    LSE_GRAD: tl.constexpr, BIASED: tl.constexpr, ALIVE: tl.constexpr, OUTER: tl.constexpr,
    INNER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    bh, block = _place(tokens, OUTER)
    b, h = bh // heads, bh % heads
    rows = block * OUTER + tl.arange(0, OUTER)
    dims = tl.arange(0, BLOCK_D)
    k_base, v_base = k_ptr + b * skb + h * skh, v_ptr + b * svb + h * svh
    q = _rows(q_ptr + b * sqb + h * sqh, rows, sqn, dims, tokens, D, WIDE)
    grad = _rows(grad_ptr + b * sgb + h * sgh, rows, sgn, dims, tokens, D, WIDE)
    out = _rows(out_ptr + b * sob + h * soh, rows, son, dims, tokens, D, WIDE)
    row_sum = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    at = bh * tokens + rows
    if LSE_GRAD:
        row_sum -= tl.load(grad_lse_ptr + at, mask=rows < tokens, other=0.0)
    tl.store(row_sum_ptr + at, row_sum, mask=rows < tokens)
    lse2 = tl.load(lse_ptr + at, mask=rows < tokens, other=float("inf")) * 1.4426950408889634
    scale2 = scale * 1.4426950408889634
    dq = tl.zeros([OUTER, BLOCK_D], tl.float32)
    for start in range(0, tokens, INNER):
        cols = start + tl.arange(0, INNER)
        inside = cols < tokens
        k = _rows(k_base, cols, skn, dims, tokens, D, WIDE)
        v = _rows(v_base, cols, svn, dims, tokens, D, WIDE)
        score = tl.dot(q, tl.trans(k)) * scale2
        if BIASED:
            bias = tl.load(bias_ptr + b * bias_row + cols, mask=inside, other=0.0)
            score += (bias * 1.4426950408889634)[None, :]
        seen = inside[None, :]
        if ALIVE:
            alive = tl.load(alive_ptr + b * alive_row + cols, mask=inside, other=0) != 0
            seen = seen & (alive[None, :] | (rows[:, None] == cols[None, :]))
        p = tl.where(seen, tl.exp2(score - lse2[:, None]), 0.0)
        ds = p * (tl.dot(grad, tl.trans(v)) - row_sum[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    far = rows.to(tl.int64) if WIDE else rows
    tl.store(
        dq_ptr + b * sdb + h * sdh + far[:, None] * sdn + dims[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=(rows[:, None] < tokens) & (dims[None, :] < D),
    )


@triton.jit
def _key_gradient(
    q_ptr, k_ptr, v_ptr, bias_ptr, alive_ptr, grad_ptr, lse_ptr, row_sum_ptr, dk_ptr, dv_ptr,
    dbias_ptr, dalive_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sdb, sdh, sdn,
    heads, tokens, scale, bias_row, alive_row,
    BIAS_GRAD: tl.constexpr, ALIVE_GRAD: tl.constexpr, BIASED: tl.constexpr, ALIVE: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    bh, block = _place(tokens, OUTER)
    b, h = bh // heads, bh % heads
    cols = block * OUTER + tl.arange(0, OUTER)
    inside = cols < tokens
    dims = tl.arange(0, BLOCK_D)
    q_base, grad_base = q_ptr + b * sqb + h * sqh, grad_ptr + b * sgb + h * sgh
    k = _rows(k_ptr + b * skb + h * skh, cols, skn, dims, tokens, D, WIDE)
    v = _rows(v_ptr + b * svb + h * svh, cols, svn, dims, tokens, D, WIDE)
    scale2 = scale * 1.4426950408889634
    bias2 = tl.zeros([OUTER], tl.float32)
    if BIASED:
        bias2 = tl.load(bias_ptr + b * bias_row + cols, mask=inside, other=0.0) * 1.4426950408889634
    if ALIVE:
        alive = tl.load(alive_ptr + b * alive_row + cols, mask=inside, other=0) != 0
    dk = tl.zeros([OUTER, BLOCK_D], tl.float32)
    dv = tl.zeros([OUTER, BLOCK_D], tl.float32)
    dbias = tl.zeros([OUTER], tl.float32)
    dalive = tl.zeros([OUTER], tl.float32)
    for start in range(0, tokens, INNER):
        rows = start + tl.arange(0, INNER)
        at = bh * tokens + rows
        # A padding row has an infinite normaliser, hence no probability.
        lse2 = tl.load(lse_ptr + at, mask=rows < tokens, other=float("inf")) * 1.4426950408889634
        row_sum = tl.load(row_sum_ptr + at, mask=rows < tokens, other=0.0)
        q = _rows(q_base, rows, sqn, dims, tokens, D, WIDE)
        grad = _rows(grad_base, rows, sgn, dims, tokens, D, WIDE)
        power = tl.dot(k, tl.trans(q)) * scale2 + bias2[:, None] - lse2[None, :]
        change = tl.dot(v, tl.trans(grad)) - row_sum[None, :]
        seen = inside[:, None]
        if ALIVE:
            own = cols[:, None] == rows[None, :]
            seen = seen & (alive[:, None] | own)
        p = tl.exp2(tl.minimum(power, 80.0))  # nothing bounds the score of a dead key
        if ALIVE_GRAD:
            dalive += tl.sum(tl.where(own, 0.0, p * change), 1)
        p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv)
        ds = p * change
        if BIAS_GRAD:
            dbias += tl.sum(ds, 1)
        dk = tl.dot(ds.to(q.dtype), q, dk)
    far = cols.to(tl.int64) if WIDE else cols
    to = b * sdb + h * sdh + far[:, None] * sdn + dims[None, :]
    mask = inside[:, None] & (dims[None, :] < D)
    tl.store(dk_ptr + to, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    if BIAS_GRAD:
        tl.store(dbias_ptr + bh * tokens + cols, dbias, mask=inside)
    if ALIVE_GRAD:
        tl.store(dalive_ptr + bh * tokens + cols, dalive, mask=inside)
