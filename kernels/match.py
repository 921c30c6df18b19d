"""Best partner of every token of one set in another, by cosine similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.dispatch import use_triton
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
    if use_triton(x) and not torch.compiler.is_compiling():
        from vistoken.kernels.triton_signals import best_match_at_triton

        return best_match_at_triton(x, src, dst)
    return best_match(take(x, src), take(x, dst))
