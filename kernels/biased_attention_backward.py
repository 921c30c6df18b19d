"""Gradients of biased attention from its output and log-sum-exp, without an N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.attention import CHUNK, own_key, scores_of, wide_type
from vistoken.kernels.dispatch import use_triton

SCHEMA = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alive, Tensor out, "
    "Tensor lse, Tensor? grad_lse, float scale, bool bias_grad, bool alive_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("vistoken::biased_attention_backward", mutates_args=(), schema=SCHEMA)
def biased_attention_backward(
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
) -> Gradients:
    """Gradients of `biased_attention`.

    Args:
        grad: gradient of the output `[B, H, N, d]`.
        q: queries as in the forward pass, likewise k, v, bias, alive and scale.
        k: keys.
        v: values.
        bias: key bias `[B, N]` or None.
        alive: living keys `[B, N]` or None.
        out: the output.
        lse: its log-sum-exp `[B, H, N]`.
        grad_lse: gradient of the log-sum-exp, or None.
        scale: softmax scale.
        bias_grad: whether the bias gets a gradient.
        alive_grad: whether `alive` does: that of a weight on each key's exponential, the query's
            own key exempt.

    Returns:
        Gradients of q, k, v, bias and alive; the last two are empty where not asked for.
    """
    args = (grad, q, k, v, bias, alive, out, lse, grad_lse, scale, bias_grad, alive_grad)
    if not use_triton(q):
        return biased_attention_backward_reference(*args)
    from vistoken.kernels.triton_biased_attention_backward import biased_attention_backward_triton

    return biased_attention_backward_triton(*args)


@biased_attention_backward.register_fake
def _(
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
) -> Gradients:
    batch, _, tokens, _ = q.shape
    dq, dk, dv = map(_heads_last, (q, k, v))
    dbias = lse.new_empty((batch, tokens) if bias_grad else (0,))
    dalive = lse.new_empty((batch, tokens) if alive_grad else (0,))
    return dq, dk, dv, dbias, dalive


def biased_attention_backward_reference(
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
) -> Gradients:
    """`biased_attention_backward` in torch operators, some query rows at a time."""
    wide, (batch, _, tokens, _) = wide_type(q), q.shape
    row_sum = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    if grad_lse is not None:
        row_sum = row_sum - grad_lse[..., None]
    dq, dk, dv = (torch.zeros_like(_heads_last(x), dtype=wide) for x in (q, k, v))
    dbias = lse.new_zeros((batch, tokens) if bias_grad else (0,))
    dalive = lse.new_zeros((batch, tokens) if alive_grad else (0,))
    for start in range(0, tokens, CHUNK):
        at = slice(start, start + CHUNK)
        p = (scores_of(q[:, :, at], k, bias, scale) - lse[:, :, at, None]).clamp(max=55.0).exp()
        change = grad[:, :, at].to(wide) @ v.to(wide).transpose(-2, -1) - row_sum[:, :, at]
        if alive is not None:
            own = own_key(p.shape[2], tokens, start, p.device)
            if alive_grad:
                dalive += (p * change).masked_fill(own, 0.0).sum((1, 2))
            p = p.masked_fill((alive[:, None, None] == 0) & ~own, 0.0)
        dv += p.transpose(-2, -1) @ grad[:, :, at].to(wide)
        ds = p * change
        dq[:, :, at] = ds @ k.to(wide) * scale
        dk += ds.transpose(-2, -1) @ q[:, :, at].to(wide) * scale
        if bias_grad:
            dbias += ds.sum((1, 2))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, dalive


def _heads_last(x: Tensor) -> Tensor:
    """An empty tensor like x `[B, H, N, d]` whose memory is `[B, N, H, d]`."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)
