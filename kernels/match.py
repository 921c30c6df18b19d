"""Best partner of every token of one set in another, by cosine similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
