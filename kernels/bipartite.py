"""Bipartite matching: which tokens at even positions merge into which at odd positions."""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.dispatch import ANY, as_op, use_triton
from vistoken.kernels.match import unit


def bipartite(
    keys: Tensor, prefix: int, r: int, factor: Tensor | None = None, exponent: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the r even-position tokens with the best-matching odd-position partner into it.

    Pairs are ranked by their cosine (ToMe), or with a factor f by
    `((cosine + 1) / 2)^exponent * f_i * f_j`.

    Slots: prefix tokens, the even-position tokens left over in their order, then all odd-position
    tokens; this order decides who meets whom in the next block.

    Args:
        keys: `[B, H, N, d]`, the last stride 1; similarity is the cosine of their mean over heads.
        prefix: tokens at the start that neither merge nor receive.
        r: tokens to merge.
        factor: `[B, N]` fp32 (fp64 for fp64), at least 0; None ranks by the cosine alone.
        exponent: above 0; of no effect without a factor.

    Returns:
        keep `[B, N - r]`, src `[B, r]` and dst `[B, r]`, int64, as in `Assignment`.
    """
    run = bipartite_op if as_op(keys, ANY) else _bipartite
    keep, src, dst = run(keys, prefix, r, factor, exponent)
    return keep, src, dst


def _bipartite(
    keys: Tensor, prefix: int, r: int, factor: Tensor | None, exponent: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not use_triton(keys, ANY):
        return bipartite_reference(keys, prefix, r, factor, exponent)
    from vistoken.kernels.triton_bipartite import bipartite_triton

    return bipartite_triton(keys, prefix, r, factor, exponent)


bipartite_op = torch.library.custom_op(
    "vistoken::bipartite",
    _bipartite,
    mutates_args=(),
    schema="(Tensor keys, SymInt prefix, SymInt r, Tensor? factor, float exponent)"
    " -> (Tensor, Tensor, Tensor)",
)


@bipartite_op.register_fake
def _(
    keys: Tensor, prefix: int, r: int, factor: Tensor | None, exponent: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, tokens, _ = keys.shape
    keep, src, dst = (
        keys.new_empty(batch, count, dtype=torch.int64) for count in (tokens - r, r, r)
    )
    return keep, src, dst


def bipartite_reference(
    keys: Tensor, prefix: int, r: int, factor: Tensor | None = None, exponent: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`bipartite` in torch operators."""
    score = cosine_scores(head_mean(keys))
    if factor is not None:
        factor = factor.to(score.dtype)
        score = ((score + 1) / 2).clamp_min(0) ** exponent
        score = score * factor[:, None, 1::2] * factor[:, ::2, None]
    return pair_up(score, prefix, r)


def head_mean(keys: Tensor) -> Tensor:
    """Mean over heads `[B, H, N, d] -> [B, N, d]`, in fp32 (fp64 for fp64)."""
    return keys.to(torch.promote_types(keys.dtype, torch.float32)).mean(1)


def cosine_scores(metric: Tensor) -> Tensor:
    """Cosine of the tokens at even positions with those at odd positions.

    Args:
        metric: `[B, N, d]`.

    Returns:
        `[B, ceil(N / 2), floor(N / 2)]`.
    """
    metric = unit(metric)
    return metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)


def pair_up(scores: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """`bipartite` from scores `[B, N_even, N_odd]`, in torch operators.

    Rows and columns of prefix tokens are excluded here.
    """
    batch, odds = scores.shape[0], scores.shape[2]
    even_prefix, odd_prefix = (prefix + 1) // 2, prefix // 2
    best, partner = scores[:, even_prefix:, odd_prefix:].max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, left = order[:, :r], order[:, r:].sort(-1).values
    first = torch.arange(prefix, device=scores.device).expand(batch, -1)
    odd = torch.arange(odd_prefix, odds, device=scores.device).expand(batch, -1) * 2 + 1
    keep = torch.cat([first, (left + even_prefix) * 2, odd], 1)
    dst = partner.gather(1, merged) + prefix + left.shape[1]
    return keep, (merged + even_prefix) * 2, dst
