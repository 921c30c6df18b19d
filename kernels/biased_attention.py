"""Attention whose keys weigh by token size, with the class tokens' row as a by-product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.attention import class_row
from vistoken.kernels.dispatch import use_triton


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, class_tokens: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Proportional attention `softmax(scale q k^T + bias) v` (ToMe, section 3).

    Args:
        q: queries `[B, H, N, d]`, any strides with the last one 1.
        k: keys, likewise.
        v: values, likewise.
        bias: additive key bias `[B, N]` fp32, the log of the token sizes, or None.
        scale: softmax scale.
        class_tokens: how many of the first queries give the class row; 0 gives none.

    Returns:
        Output as a `[B, H, N, d]` view of contiguous `[B, N, H, d]`, and the class tokens'
        attention averaged over them and the heads, `[B, N]` fp32 (None for 0 class tokens).
    """
    # Without a bias the library's kernel is the fastest there is.
    plain = bias is None and class_tokens == 0
    if use_triton(q) and not plain and not torch.compiler.is_compiling():
        from vistoken.kernels.triton_biased_attention import biased_attention_triton

        out, row = biased_attention_triton(q, k, v, bias, scale, class_tokens)
        return out, row.mean(1) if class_tokens else None
    return biased_attention_reference(q, k, v, bias, scale, class_tokens)


def biased_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, class_tokens: int = 0
) -> tuple[Tensor, Tensor | None]:
    """`biased_attention` in torch operators."""
    mask = None if bias is None else bias[:, None, None].to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if class_tokens == 0:
        return out, None
    return out, class_row(q[:, :, :class_tokens], k, bias, scale)
