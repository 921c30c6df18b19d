"""Best partner of every token of one set in another, by cosine similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.dispatch import as_op, trains, use_triton
from vistoken.kernels.reduce import take


def unit(x: Tensor) -> Tensor:
    """Features `[..., d]` scaled to unit length in fp32 (fp64 for fp64); zero vectors stay zero."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.normalize(x.to(wide), dim=-1, eps=1e-12)


def best_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For every row of a the most similar row of b.

    Args:
        a: features `[B, S, d]`.
        b: features `[B, D, d]`.

    Returns:
        Cosine `[B, S]` and index into b `[B, S]` (the first of equals).
    """
    value, index = (unit(a) @ unit(b).transpose(1, 2)).max(-1)
    return value, index


def best_match_at(x: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """For every token in `src` the most similar token in `dst`.

    Args:
        x: features of all tokens `[B, N, C]`.
        src: token indices `[B, S]`.
        dst: token indices `[B, D]`.

    Returns:
        Cosine `[B, S]` and position in `dst` `[B, S]` (the first of equals).
    """
    if trains(x):
        return best_match(take(x, src), take(x, dst))
    value, index = (best_match_at_op if as_op(x) else _best_match_at)(x, src, dst)
    return value, index


def _best_match_at(x: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    if not use_triton(x):
        return best_match(take(x, src), take(x, dst))
    from vistoken.kernels.triton_signals import best_match_at_triton

    return best_match_at_triton(x, src, dst)


best_match_at_op = torch.library.custom_op(
    "vistoken::best_match_at",
    _best_match_at,
    mutates_args=(),
    schema="(Tensor x, Tensor src, Tensor dst) -> (Tensor, Tensor)",
)


@best_match_at_op.register_fake
def _(x: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(src.shape, dtype=wide), src.new_empty(src.shape)
