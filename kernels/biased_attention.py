"""Attention whose keys weigh by token size, with the class tokens' row as a by-product."""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.attention import (
    CHUNK,
    among_living,
    class_row,
    log_normalizer_reference,
    scores_of,
    wide_type,
)
from vistoken.kernels.biased_attention_backward import biased_attention_backward
from vistoken.kernels.dispatch import as_op, trains, use_triton

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, int class_tokens, Tensor? alive, "
    "bool return_lse) -> (Tensor, Tensor, Tensor)"
)


@overload
def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    class_tokens: int = 0,
    *,
    alive: Tensor | None = None,
    size: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> tuple[Tensor, Tensor | None]: ...


@overload
def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    class_tokens: int = 0,
    *,
    alive: Tensor | None = None,
    size: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor | None, Tensor]: ...


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    class_tokens: int = 0,
    *,
    alive: Tensor | None = None,
    size: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Proportional attention `softmax(scale q k^T + bias) v` (ToMe, section 3).

    Args:
        q: queries `[B, H, N, d]`, any strides with the last one 1.
        k: keys, likewise.
        v: values, likewise.
        bias: additive key bias `[B, N]` fp32, the log of the token sizes, or None.
        scale: softmax scale.
        class_tokens: how many of the first queries give the class row; 0 gives none.
        alive: `[B, N]` bool, or float zeros and ones: a query sees living keys and its own. A float
            one gets the gradient of a weight on each key's exponential, own keys exempt (DiffRate,
            section 3.3).
        size: token sizes `[B, N]`, in place of the bias that is their logarithm.
        return_lse: return the log-sum-exp of every query's scores too; `received` takes it.

    Returns:
        Output as a `[B, H, N, d]` view of contiguous `[B, N, H, d]`, the class tokens' attention
        averaged over them and the heads, `[B, N]` fp32 (None for 0 class tokens), and on demand
        the log-sum-exp `[B, H, N]` fp32. All have gradients.
    """
    if bias is not None and size is not None:
        raise ValueError("bias and size were both given: one of them weighs the keys")
    row: Tensor | None
    lse: Tensor | None
    direct = use_triton(q) and not as_op(q) and not trains(q, k, v, bias, alive, size)
    if size is not None and not direct:
        bias = size.log()
    # Without a bias the library's kernel is the fastest there is.
    plain = bias is None and size is None and class_tokens == 0 and alive is None and not return_lse
    if plain or not use_triton(q):
        out, row, lse = biased_attention_reference(
            q, k, v, bias, scale, class_tokens, alive, return_lse
        )
    elif trains(q, k, v, bias, alive):
        out, _, lse = biased_attention_op(q, k, v, bias, scale, 0, alive, True)
        row = class_row(q[:, :, :class_tokens], k, bias, scale, alive) if class_tokens else None
    elif direct:
        keys, sized = (bias, False) if size is None else (size, True)
        out, row, lse = _biased_attention(
            q, k, v, keys, scale, class_tokens, alive, return_lse, sized
        )
    else:
        out, row, lse = biased_attention_op(q, k, v, bias, scale, class_tokens, alive, return_lse)
    row = row if class_tokens else None
    return (out, row, cast(Tensor, lse)) if return_lse else (out, row)


def _biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    class_tokens: int,
    alive: Tensor | None,
    return_lse: bool,
    sized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel, or its reference; class row and log-sum-exp are empty where not asked for."""
    wide = wide_type(q)
    if not use_triton(q):
        out, row, norm = biased_attention_reference(
            q, k, v, bias, scale, class_tokens, alive, return_lse
        )
        row = q.new_empty(0, dtype=wide) if row is None else row
        norm = norm if return_lse and norm is not None else q.new_empty(0, dtype=wide)
        return out.transpose(1, 2).contiguous().transpose(1, 2), row, norm
    from vistoken.kernels.triton_biased_attention import biased_attention_triton

    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=wide)
    asked = lse if return_lse else None
    out, rows = biased_attention_triton(q, k, v, bias, scale, class_tokens, alive, asked, sized)
    return out, rows.mean(1) if class_tokens else rows, lse


biased_attention_op = torch.library.custom_op(
    "vistoken::biased_attention", _biased_attention, mutates_args=(), schema=SCHEMA
)


@biased_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    class_tokens: int,
    alive: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    row = q.new_empty((batch, tokens) if class_tokens else (0,), dtype=wide_type(q))
    lse = q.new_empty((batch, heads, tokens) if return_lse else (0,), dtype=wide_type(q))
    return out, row, lse


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, bias, scale, class_tokens, alive, return_lse = inputs
    if not return_lse or class_tokens:
        raise RuntimeError("vistoken::biased_attention needs its log-sum-exp for a gradient")
    out, _, lse = output
    ctx.save_for_backward(q, k, v, bias, alive, out, lse)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad: Tensor | None, _: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, bias, alive, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    wants = ctx.needs_input_grad
    dq, dk, dv, dbias, dalive = biased_attention_backward(
        grad, q, k, v, bias, alive, out, lse, grad_lse, ctx.scale, wants[3], wants[6]
    )
    to_bias = dbias.to(bias.dtype) if wants[3] else None
    return dq, dk, dv, to_bias, None, None, dalive.to(alive.dtype) if wants[6] else None, None


biased_attention_op.register_autograd(_gradients, setup_context=_remember)


def biased_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    class_tokens: int = 0,
    alive: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`biased_attention` in torch operators; always three values."""
    lse: Tensor | None = None
    if alive is None:
        mask = None if bias is None else bias[:, None, None].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        lse = log_normalizer_reference(q, k, bias, scale) if return_lse else None
    else:
        out, lse = _among_the_living(q, k, v, bias, scale, alive)
    if class_tokens == 0:
        return out, None, lse
    return out, class_row(q[:, :, :class_tokens], k, bias, scale, alive), lse


def _among_the_living(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, alive: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp where every query sees living keys and its own, rows by rows."""
    outs, norms = [], []
    for index, part in enumerate(q.split(CHUNK, dim=2)):
        scores = scores_of(part, k, bias, scale)
        attention, norm = among_living(scores, alive, index * CHUNK)
        outs.append(attention.to(v.dtype) @ v)
        norms.append(norm)
    return torch.cat(outs, 2), torch.cat(norms, 2)
