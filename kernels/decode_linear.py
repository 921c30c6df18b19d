"""Linear maps of one decoding step: RMS norm before, SiLU gate or residual after, in one pass.

With a handful of rows a step is bound by reading the weights, so each weight is read once and
everything around the product rides along.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.dispatch import use_triton

MAX_ROWS = 16
"""Rows up to which the kernel runs; larger products are bound by arithmetic and go to torch."""

RMS = tuple[Tensor, float]
"""Weight `[K]` and epsilon of an RMS norm."""


def decode_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    norm: RMS | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`residual + [W0 h, W1 h, ...]` or `silu(W0 h) * (W1 h)`, where h is x or its RMS norm.

    Args:
        x: `[B, K]`, contiguous.
        weights: one to three `[N_i, K]`, contiguous; their results are concatenated.
        biases: one `[N_i]` per weight, or None.
        norm: the RMS norm of x that comes first, or None.
        residual: `[B, N]`, added to the result of a single weight, or None.
        gated: two weights of one shape are gate and value of a SiLU-gated layer.

    Returns:
        `[B, sum N_i]`, or `[B, N]` if gated, in x's dtype.
    """
    if use_triton(x) and x.shape[0] <= MAX_ROWS:
        from vistoken.kernels.triton_decode_linear import decode_linear_triton, fits

        if fits(x, weights, gated):
            return decode_linear_triton(x, weights, biases, norm, residual, gated)
    return decode_linear_reference(x, weights, biases, norm, residual, gated)


def decode_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    norm: RMS | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`decode_linear` in torch operators."""
    h = x if norm is None else F.rms_norm(x, (x.shape[-1],), norm[0], norm[1])
    parts = [
        F.linear(h, weight, None if biases is None else biases[i])
        for i, weight in enumerate(weights)
    ]
    if gated:
        return F.silu(parts[0]) * parts[1]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if residual is None else residual + y
