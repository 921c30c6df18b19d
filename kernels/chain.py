"""Residual, LayerScale, reduction and the next norm in one operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.dispatch import use_triton
from vistoken.kernels.reduce import add_into, merge, take


@dataclass(frozen=True)
class Slots:
    """Where tokens go, and how members weigh; the tensors of an `Assignment`.

    Attributes:
        keep: `[B, M]` int64.
        src: `[B, S]` int64 or None.
        dst: `[B, S]` int64 or None.
        weight: `[B, N]` fp32 or None.
        gain: `[B, S]` fp32 or None.
        normalize: divide by the slot's total weight.
    """

    keep: Tensor
    src: Tensor | None = None
    dst: Tensor | None = None
    weight: Tensor | None = None
    gain: Tensor | None = None
    normalize: bool = True


Norm = tuple[Tensor, Tensor, float]
"""Weight `[C]`, bias `[C]` and eps of a LayerNorm."""


def add_reduce_norm(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    slots: Slots | None,
    size: Tensor | None,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`y = reduce(x + gamma * branch)`, `LayerNorm(y)` and the slots' sizes.

    Args:
        x: residual stream `[B, N, C]`, contiguous.
        branch: what the branch adds, `[B, N, C]` contiguous, or None.
        gamma: LayerScale `[C]`, or None.
        slots: the reduction; None keeps every token.
        size: token sizes `[B, N]` fp32; None is all ones.
        norm: the LayerNorm that follows.

    Returns:
        y `[B, M, C]`, its norm `[B, M, C]`, sizes `[B, M]` fp32 or None while nothing was merged.
    """
    if use_triton(x):
        from vistoken.kernels.triton_chain import add_reduce_norm_triton

        return add_reduce_norm_triton(x, branch, gamma, slots, size, norm)
    return add_reduce_norm_reference(x, branch, gamma, slots, size, norm)


def add_reduce_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    slots: Slots | None,
    size: Tensor | None,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`add_reduce_norm` in torch operators."""
    if branch is not None:
        x = x + (branch if gamma is None else branch * gamma)
    if slots is not None:
        if slots.src is None or slots.dst is None:
            x, size = take(x, slots.keep), None if size is None else take(size, slots.keep)
        else:
            if size is None:
                size = x.new_ones(x.shape[:2], dtype=torch.float32)
            joined = take(size, slots.src)
            joined = joined if slots.gain is None else joined * slots.gain
            size = add_into(take(size, slots.keep), slots.dst, joined)
            x = merge(x, slots.keep, slots.src, slots.dst, slots.weight, slots.normalize)
    weight, bias, eps = norm
    return x, F.layer_norm(x, (x.shape[-1],), weight, bias, eps), size
