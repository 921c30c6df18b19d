"""Sorting tokens by a score: prefix first, then patches from the highest score down."""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.dispatch import ANY, as_op, use_triton


def rank_tokens(score: Tensor, prefix: int) -> Tensor:
    """Token indices in falling order of score, prefix tokens in front.

    Equal scores keep their order.

    Args:
        score: `[B, N]`.
        prefix: tokens at the start that keep their place.

    Returns:
        `[B, N]` int64.
    """
    run = rank_tokens_op if as_op(score, ANY) else _rank_tokens
    order: Tensor = run(score, prefix)
    return order


def _rank_tokens(score: Tensor, prefix: int) -> Tensor:
    if not use_triton(score, ANY):
        return rank_tokens_reference(score, prefix)
    from vistoken.kernels.triton_ranking import rank_tokens_triton

    return rank_tokens_triton(score, prefix)


rank_tokens_op = torch.library.custom_op(
    "vistoken::rank_tokens",
    _rank_tokens,
    mutates_args=(),
    schema="(Tensor score, SymInt prefix) -> Tensor",
)


@rank_tokens_op.register_fake
def _(score: Tensor, prefix: int) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.int64)


def rank_tokens_reference(score: Tensor, prefix: int) -> Tensor:
    """`rank_tokens` in torch operators."""
    first = torch.arange(prefix, device=score.device).expand(score.shape[0], -1)
    order = score[:, prefix:].argsort(dim=-1, descending=True, stable=True) + prefix
    return torch.cat([first, order], 1)
