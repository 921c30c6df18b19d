"""Attention signals that a method can read beside a fused kernel, without an N x N matrix.

All functions take q, k `[B, H, N, d]` after the model's own norms and rotary embedding, an optional
additive key bias `[B, N]` (the logarithm of the token sizes) and the softmax scale. They return
fp32 (fp64 for fp64 inputs) and never hold more than `chunk` rows of the attention matrix at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.dispatch import ANY, as_given, as_op, trains, use_triton

CHUNK = 64
"""Rows of the attention matrix held at once."""


def class_row(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, alive: Tensor | None = None
) -> Tensor:
    """Attention that the class tokens pay to every token, averaged over heads and class tokens.

    Args:
        q: queries of the class tokens only, `[B, H, P, d]`.
        k: keys of all tokens, `[B, H, N, d]`.
        bias: additive key bias `[B, N]` or None.
        scale: softmax scale.
        alive: living keys `[B, N]`, as in `biased_attention`, or None.

    Returns:
        `[B, N]`, each row sums to 1.
    """
    scores = scores_of(q, k, bias, scale)
    attention = scores.softmax(-1) if alive is None else among_living(scores, alive, 0)[0]
    return attention.mean((1, 2))


def log_normalizer(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Log-sum-exp over keys of every query's biased scores, `[B, H, N_q]`.

    Args:
        q: queries `[B, H, N_q, d]`.
        k: keys `[B, H, N_k, d]`.
        bias: additive key bias, `[B, N_k]` or `[B, H, N_k]`, or None.
        scale: softmax scale.
    """
    if trains(q, k, bias):
        return log_normalizer_reference(q, k, bias, scale)
    run = log_normalizer_op if as_op(q) else _log_normalizer
    rows: Tensor = run(q, k, bias, scale)
    return rows


def _log_normalizer(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    if not use_triton(q):
        return log_normalizer_reference(q, k, bias, scale)
    from vistoken.kernels.triton_signals import log_normalizer_triton

    return log_normalizer_triton(q, k, bias, scale)


log_normalizer_op = torch.library.custom_op(
    "vistoken::log_normalizer",
    _log_normalizer,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor? bias, float scale) -> Tensor",
)


@log_normalizer_op.register_fake
def _(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=wide_type(q))


def log_normalizer_reference(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`log_normalizer` in torch operators."""
    rows = [scores_of(part, k, bias, scale).logsumexp(-1) for part in q.split(CHUNK, dim=2)]
    return torch.cat(rows, dim=2)


def page_rank(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    start: Tensor,
    steps: int,
    lse: Tensor | None = None,
) -> Tensor:
    """`steps` power iterations `s <- A^T s` on the attention graph of every head.

    A is never stored: each step makes its entries anew from the row normalisers.

    Args:
        q: queries `[B, H, N, d]`.
        k: keys `[B, H, N, d]`.
        bias: additive key bias `[B, N]` or None.
        scale: softmax scale.
        start: positive scores to start from, `[B, N]` or `[B, H, N]`; their sum is conserved.
        steps: iterations.
        lse: the row normalisers `[B, H, N]` where known, from the attention itself for example.

    Returns:
        Scores `[B, H, N]` (Zero-TPrune, Wang et al., CVPR 2024, algorithm 1).
    """
    rows = log_normalizer(q, k, bias, scale) if lse is None else lse
    if start.dim() == 2:
        start = start[:, None]
    score = start.to(rows.dtype).expand_as(rows)
    for _ in range(steps):
        score = column_sums(q, k, bias, scale, rows, score)
    return score


def column_sums(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, lse: Tensor, weight: Tensor
) -> Tensor:
    """Sums of the attention's columns with weighted rows, `A^T weight` of every head, `[B, H, N]`.

    Args:
        q: queries `[B, H, N, d]`.
        k: keys `[B, H, N, d]`.
        bias: additive key bias `[B, N]` or None.
        scale: softmax scale.
        lse: the row normalisers `[B, H, N]`.
        weight: positive weights of the rows, `[B, H, N]`.
    """
    if trains(q, k, bias, lse, weight):
        return column_sums_reference(q, k, bias, scale, lse, weight)
    run = column_sums_op if as_op(q) else _column_sums
    sums: Tensor = run(q, k, bias, scale, lse, weight)
    return sums


def _column_sums(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, lse: Tensor, weight: Tensor
) -> Tensor:
    if not use_triton(q):
        return column_sums_reference(q, k, bias, scale, lse, weight)
    from vistoken.kernels.triton_signals import column_sums_triton

    return column_sums_triton(q, k, bias, scale, lse, weight)


column_sums_op = torch.library.custom_op(
    "vistoken::column_sums",
    _column_sums,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor? bias, float scale, Tensor lse, Tensor weight) -> Tensor",
)


@column_sums_op.register_fake
def _(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, lse: Tensor, weight: Tensor
) -> Tensor:
    return lse.new_empty(lse.shape)


def column_sums_reference(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, lse: Tensor, weight: Tensor
) -> Tensor:
    """`column_sums` in torch operators.

    `log sum_j = bias_j + LSE_i(scale q_i.k_j + log weight_i - lse_i)`: a normaliser, with queries
    and keys exchanged.
    """
    sums = log_normalizer_reference(k, q, weight.log() - lse, scale)
    return (sums if bias is None else sums + bias[:, None].to(sums.dtype)).exp()


def join_heads(score: Tensor, low: float, high: float) -> Tensor:
    """Root mean square over the heads whose scores vary neither too little nor too much.

    Args:
        score: `[B, H, N]`.
        low: least variance of `N score` over the tokens (Zero-TPrune, Wang et al., CVPR 2024).
        high: largest one; where no head lies between, all of them count.

    Returns:
        `[B, N]`.
    """
    if trains(score):
        return join_heads_reference(score, low, high)
    joined: Tensor = (join_heads_op if as_op(score, ANY) else _join_heads)(score, low, high)
    return joined


def _join_heads(score: Tensor, low: float, high: float) -> Tensor:
    if not use_triton(score, ANY):
        return join_heads_reference(score, low, high)
    from vistoken.kernels.triton_signals import join_heads_triton

    return join_heads_triton(score, low, high)


join_heads_op = torch.library.custom_op(
    "vistoken::join_heads",
    _join_heads,
    mutates_args=(),
    schema="(Tensor score, float low, float high) -> Tensor",
)


@join_heads_op.register_fake
def _(score: Tensor, low: float, high: float) -> Tensor:
    return score.new_empty(score.shape[0], score.shape[2])


def join_heads_reference(score: Tensor, low: float, high: float) -> Tensor:
    """`join_heads` in torch operators."""
    spread = (score * score.shape[-1]).var(-1, unbiased=False)
    passed = (spread >= low) & (spread <= high)
    passed |= ~passed.any(1, keepdim=True)
    share = passed.to(score.dtype)
    share = (share / share.sum(1, keepdim=True)).sqrt()
    joined: Tensor = torch.linalg.vector_norm(score * share[..., None], dim=1)
    return joined


def received(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    lse: Tensor | None = None,
    alive: Tensor | None = None,
) -> Tensor:
    """Attention every token receives, averaged over queries and heads (column mean), `[B, N]`.

    Args:
        q: queries `[B, H, N, d]`.
        k: keys `[B, H, N, d]`.
        bias: additive key bias `[B, N]` or None.
        scale: softmax scale.
        lse: the row normalisers `[B, H, N]`; saves one of two passes.
        alive: living keys `[B, N]`, as in `biased_attention`, or None; needs its lse.
    """
    if alive is not None and lse is None:
        raise ValueError("received: alive is given without lse; pass biased_attention's")
    batch, tokens = q.shape[0], q.shape[2]
    start = q.new_full((batch, tokens), 1.0 / tokens, dtype=wide_type(q))
    columns = page_rank(q, k, bias, scale, start, 1, lse)
    if alive is not None and lse is not None:
        own = (q.to(lse.dtype) * k.to(lse.dtype)).sum(-1) * scale - lse
        own = own if bias is None else own + bias[:, None]
        columns = torch.where(alive[:, None] != 0, columns, own.exp() / tokens)
    return columns.mean(1)


def scores_of(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Biased scores `[B, H, N_q, N_k]` in the wide type: fp16 cannot hold every product."""
    wide = wide_type(q)
    with as_given(q.device.type):
        scores = (q.to(wide) * scale) @ k.to(wide).transpose(-2, -1)
    if bias is None:
        return scores
    bias = bias.to(scores.dtype)
    return scores + (bias[:, None, None] if bias.dim() == 2 else bias[:, :, None])


def wide_type(x: Tensor) -> torch.dtype:
    """The type sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def own_key(rows: int, keys: int, first: int, device: torch.device) -> Tensor:
    """Where query `first + i` meets its own key, `[rows, keys]`."""
    query = torch.arange(first, first + rows, device=device)
    return query[:, None] == torch.arange(keys, device=device)


def among_living(scores: Tensor, alive: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Attention `[B, H, R, N]` and log-sum-exp `[B, H, R]` where queries see living and own keys.

    Args:
        scores: biased scores `[B, H, R, N]` of the queries from `first` on.
        alive: living keys `[B, N]`, bool, or float zeros and ones with a gradient.
        first: position of the first query.
    """
    own = own_key(scores.shape[2], scores.shape[3], first, scores.device)
    living = alive[:, None, None]
    top = scores.detach().masked_fill((living == 0) & ~own, float("-inf")).amax(-1, True)
    # Nothing bounds the score of a dead key, whose exponential the gradient of alive contains.
    weight = torch.where(own, 1.0, living.to(scores.dtype))
    power = (scores - top).clamp(max=55.0).exp() * weight
    total = power.sum(-1, keepdim=True)
    return power / total, (total.log() + top).squeeze(-1)
