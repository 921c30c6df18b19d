"""Merging that keeps every token in its place, so that counts and partners can have gradients.

A source with weight w joins its partner: `out_j = (s_j x_j + sum_i w_i s_i x_i) / (s_j + sum_i w_i
s_i)` with sizes s, or all ones for a plain mean. Weights are zeros and ones, and what is no partner
stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vistoken.kernels.attention import CHUNK, own_key, wide_type
from vistoken.kernels.match import unit
from vistoken.kernels.reduce import add_into, take


class MaskedMerge(torch.autograd.Function):
    """`merge_in_place`, with the gradient of weights, shares and sizes, one partner at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, share: Tensor, partners: Tensor, size: Tensor
    ) -> Tensor:
        wide = wide_type(x)
        weight, size = weight.to(wide), size.to(wide)
        own = torch.arange(x.shape[1], device=x.device).expand_as(weight)
        # What does not move adds its zero to itself: no two threads meet there.
        slot = torch.where(weight > 0, partners[..., 0], own)
        mass = weight * size
        total = add_into(size, slot, mass)
        out = add_into(x.to(wide) * size[..., None], slot, x.to(wide) * mass[..., None])
        out = (out / total[..., None]).to(x.dtype)
        ctx.save_for_backward(x, weight, size, partners, total, out)
        ctx.shared = share.requires_grad
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, size, partners, total, out = ctx.saved_tensors
        spread = grad.to(total.dtype) / total[..., None]
        to_x: Tensor | None = None
        pulls = []
        for rank in range(partners.shape[-1] if ctx.shared else 1):
            there = take(spread, partners[..., rank])
            if rank == 0 and ctx.needs_input_grad[0]:
                own = spread * size[..., None]
                to_x = torch.addcmul(own, there, (weight * size)[..., None]).to(x.dtype)
            pulls.append((there * (x - take(out, partners[..., rank]))).sum(-1))
        to_share = to_size = None
        if ctx.shared:
            to_share = torch.stack(pulls, -1) * (weight * size)[..., None]
        if ctx.needs_input_grad[4]:
            to_size = (spread * (x - out)).sum(-1) + pulls[0] * weight
        return to_x, (pulls[0] * size).to(weight.dtype), to_share, None, to_size


def merge_in_place(
    x: Tensor, weight: Tensor, share: Tensor, partners: Tensor, size: Tensor | None = None
) -> Tensor:
    """Each token becomes the mean of itself and of the sources that join it.

    Args:
        x: tokens `[B, N, C]`.
        weight: `[B, N]` ones for sources, zeros for all others; its gradient is that of a weight in
            the mean. A source must not receive.
        share: `[B, N, K]` how a source divides over its partners: one for the first, zero for the
            others; the gradient is that of soft shares.
        partners: `[B, N, K]` int64, the best first.
        size: `[B, N]` what tokens weigh in the mean, positive; None weighs all alike.

    Returns:
        `[B, N, C]` in the dtype of x.
    """
    if size is None:
        size = torch.ones(x.shape[:2], dtype=wide_type(x), device=x.device)
    merged: Tensor = MaskedMerge.apply(x, weight, share, partners, size)
    return merged


def best_partners(metric: Tensor, receives: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """For every token the most similar others among those that receive, some rows at a time.

    Args:
        metric: features `[B, N, d]`; similarity is the cosine.
        receives: `[B, N]` bool.
        count: partners K to find.

    Returns:
        Cosines `[B, N, K]` and indices `[B, N, K]`, the best first; cosine 0 and the token itself
        where there is none.
    """
    metric = unit(metric)
    tokens = metric.shape[1]
    columns = metric.transpose(1, 2)
    closed = ~receives[:, None]
    values, indices = [], []
    for first in range(0, tokens, CHUNK):
        rows = metric[:, first : first + CHUNK]
        own = own_key(rows.shape[1], tokens, first, metric.device)
        scores = (rows @ columns).masked_fill(closed | own, float("-inf"))
        found = scores.max(-1, keepdim=True) if count == 1 else scores.topk(count, -1)
        values.append(found[0])
        indices.append(found[1])
    value, index = torch.cat(values, 1), torch.cat(indices, 1)
    none = value == float("-inf")
    itself = torch.arange(tokens, device=metric.device)[:, None]
    return value.masked_fill(none, 0.0), torch.where(none, itself, index)


def hard_shares(cosine: Tensor, temperature: float) -> Tensor:
    """All to the first partner, with the gradient of a softmax over the cosines `[B, N, K]`."""
    soft = (cosine / temperature).softmax(-1)
    first = torch.zeros_like(soft)
    first[..., 0] = 1.0
    return first + (soft - soft.detach())
