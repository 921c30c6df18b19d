"""Sorting tokens by a score: prefix first, then patches from the highest score down."""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.dispatch import ANY, use_triton


def rank_tokens(score: Tensor, prefix: int) -> Tensor:
    """Token indices in falling order of score, prefix tokens in front.

    Equal scores keep their order.

    Args:
        score: `[B, N]`.
        prefix: tokens at the start that keep their place.

    Returns:
        `[B, N]` int64.
    """
    if use_triton(score, ANY) and not torch.compiler.is_compiling():
        from vistoken.kernels.triton_ranking import rank_tokens_triton

        return rank_tokens_triton(score, prefix)
    return rank_tokens_reference(score, prefix)


def rank_tokens_reference(score: Tensor, prefix: int) -> Tensor:
    """`rank_tokens` in torch operators."""
    first = torch.arange(prefix, device=score.device).expand(score.shape[0], -1)
    order = score[:, prefix:].argsort(dim=-1, descending=True, stable=True) + prefix
    return torch.cat([first, order], 1)
