"""Attention signals that a method can read beside a fused kernel, without an N x N matrix.

All functions take q, k `[B, H, N, d]` after the model's own norms and rotary embedding, an optional
additive key bias `[B, N]` (the logarithm of the token sizes) and the softmax scale. They return
fp32 (fp64 for fp64 inputs) and never hold more than `chunk` rows of the attention matrix at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.dispatch import use_triton

CHUNK = 64
"""Rows of the attention matrix held at once."""


def class_row(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention that the class tokens pay to every token, averaged over heads and class tokens.

    Args:
        q: queries of the class tokens only, `[B, H, P, d]`.
        k: keys of all tokens, `[B, H, N, d]`.
        bias: additive key bias `[B, N]` or None.
        scale: softmax scale.

    Returns:
        `[B, N]`, each row sums to 1.
    """
    scores = _scores(q, k, bias, scale)
    return scores.softmax(-1).mean((1, 2))


def log_normalizer(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Log-sum-exp over keys of every query's biased scores, `[B, H, N_q]`.

    Args:
        q: queries `[B, H, N_q, d]`.
        k: keys `[B, H, N_k, d]`.
        bias: additive key bias, `[B, N_k]` or `[B, H, N_k]`, or None.
        scale: softmax scale.
    """
    if use_triton(q) and not torch.compiler.is_compiling():
        from vistoken.kernels.triton_signals import log_normalizer_triton

        return log_normalizer_triton(q, k, bias, scale)
    rows = [_scores(part, k, bias, scale).logsumexp(-1) for part in q.split(CHUNK, dim=2)]
    return torch.cat(rows, dim=2)


def page_rank(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, start: Tensor, steps: int
) -> Tensor:
    """`steps` power iterations `s <- A^T s` on the attention graph of every head.

    With `z` the row normalisers, one step is
    `log s_j <- bias_j + LSE_i(scale q_i.k_j + log s_i - z_i)`: a normaliser again, with queries and
    keys exchanged, so A is never stored.

    Args:
        q: queries `[B, H, N, d]`.
        k: keys `[B, H, N, d]`.
        bias: additive key bias `[B, N]` or None.
        scale: softmax scale.
        start: positive scores to start from, `[B, N]` or `[B, H, N]`; their sum is conserved.
        steps: iterations.

    Returns:
        Scores `[B, H, N]` (Zero-TPrune, Wang et al., CVPR 2024, algorithm 1).
    """
    rows = log_normalizer(q, k, bias, scale)
    if start.dim() == 2:
        start = start[:, None]
    log_score = start.to(rows.dtype).log().expand_as(rows)
    for _ in range(steps):
        log_score = log_normalizer(k, q, log_score - rows, scale)
        if bias is not None:
            log_score = log_score + bias[:, None].to(rows.dtype)
    return log_score.exp()


def received(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention every token receives, averaged over queries and heads (column mean), `[B, N]`."""
    batch, tokens = q.shape[0], q.shape[2]
    start = q.new_full((batch, tokens), 1.0 / tokens, dtype=_wide(q))
    return page_rank(q, k, bias, scale, start, 1).mean(1)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Biased scores `[B, H, N_q, N_k]` in the wide type."""
    scores = (q @ k.transpose(-2, -1)).to(_wide(q)) * scale
    if bias is None:
        return scores
    bias = bias.to(scores.dtype)
    return scores + (bias[:, None, None] if bias.dim() == 2 else bias[:, :, None])


def _wide(x: Tensor) -> torch.dtype:
    """The type sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
