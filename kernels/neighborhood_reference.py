"""Neighborhood attention in torch operators, one box of queries after the other.

The windows of a box of queries lie in a box of keys, so a step is a small masked attention between
two slices of the tensors: no gather, no N x N matrix. Sums run in float32, or float64 for float64
inputs, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from vistoken.kernels.neighborhood_windows import Neighborhood, group_length, window_bounds

MAX_SCORES = 2**23
"""Scores of all heads that one step may hold."""


@dataclass(frozen=True)
class Step:
    """Queries and keys of one step as slices of the grid, and how they relate on every axis."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    allowed: tuple[Tensor, ...]
    """`[queries, keys]` bool of every axis."""
    offset: tuple[Tensor, ...]
    """`[queries, keys]` of every axis: key minus query, counted from the lowest, 0 to 2w - 2."""

    def mask(self) -> Tensor:
        """`[queries, keys]` of the whole step."""
        rank = len(self.allowed)
        whole = torch.ones((), dtype=torch.bool, device=self.allowed[0].device)
        for axis, allowed in enumerate(self.allowed):
            whole = whole & _spread(allowed, axis, rank)
        return whole.reshape(math.prod(whole.shape[:rank]), -1)

    def bias(self, rpb: Tensor) -> Tensor:
        """`[H, queries, keys]` entries of the table `[H, 2w - 1, ...]`."""
        rank = len(self.offset)
        heads = torch.arange(len(rpb), device=rpb.device).view(-1, *[1] * (2 * rank))
        index = [_spread(offset, axis, rank) for axis, offset in enumerate(self.offset)]
        bias = rpb[(heads, *index)]
        return bias.reshape(len(rpb), math.prod(bias.shape[1 : 1 + rank]), -1)

    def bias_gradient(self, grad: Tensor, rpb: Tensor) -> Tensor:
        """The table's gradient from `[H, queries, keys]`, by products with one-hot matrices."""
        rank = len(self.offset)
        sides = [o.shape[0] for o in self.offset] + [o.shape[1] for o in self.offset]
        grad = grad.reshape(len(grad), *sides)
        for axis, offset in enumerate(self.offset):
            hot = torch.nn.functional.one_hot(offset, rpb.shape[1 + axis]).to(grad.dtype)
            # Query and key sides of the axes still open are dims 1 and 1 + open; the sum is last.
            grad = torch.tensordot(grad, hot, dims=([1, 1 + rank - axis], [0, 1]))
        return grad


def _spread(pairs: Tensor, axis: int, rank: int) -> Tensor:
    shape = [1] * (2 * rank)
    shape[axis], shape[rank + axis] = pairs.shape
    return pairs.view(shape)


def _sides(grid: tuple[int, ...], hood: Neighborhood, heads: int) -> list[int]:
    """Query box: as large as memory allows, because larger boxes waste fewer keys."""
    lengths = [group_length(n, d, 0) for n, d in zip(grid, hood.dilation, strict=True)]
    sides = [min(n, max(2 * w, 8)) for n, w in zip(lengths, hood.window, strict=True)]

    def scores() -> int:
        keys = [
            min(n, t + w + s)
            for n, t, w, s in zip(lengths, sides, hood.window, hood.stride, strict=True)
        ]
        return heads * math.prod(sides) * math.prod(keys)

    while scores() > MAX_SCORES and max(sides) > 1:
        axis = sides.index(max(sides))
        sides[axis] = (sides[axis] + 1) // 2
    return sides


def _pieces(
    length: int, first: int, side: int, axis: int, hood: Neighborhood, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """One axis of the steps of one dilation group."""
    d, w = hood.dilation[axis], hood.window[axis]
    members = group_length(length, d, first)
    low, high = window_bounds(members, w, hood.stride[axis], hood.causal[axis])
    for q0 in range(0, members, side):
        q1 = min(q0 + side, members)
        k0, k1 = low[q0], high[q1 - 1]
        keys = torch.arange(k0, k1, device=device)
        start = torch.tensor(low[q0:q1], device=device)[:, None]
        end = torch.tensor(high[q0:q1], device=device)[:, None]
        own = torch.arange(q0, q1, device=device)[:, None]
        yield (
            slice(first + d * q0, first + d * (q1 - 1) + 1, d),
            slice(first + d * k0, first + d * (k1 - 1) + 1, d),
            (keys >= start) & (keys < end),
            (keys - own + w - 1).clamp(0, 2 * w - 2),
        )


def steps(
    grid: tuple[int, ...], hood: Neighborhood, heads: int, device: torch.device
) -> Iterator[Step]:
    """Steps that cover every query once."""
    sides = _sides(grid, hood, heads)
    for group in hood.groups():
        axes = [
            list(_pieces(grid[a], group[a], sides[a], a, hood, device)) for a in range(len(grid))
        ]
        for pieces in product(*axes):
            queries, keys, allowed, offset = zip(*pieces, strict=True)
            yield Step(queries, keys, allowed, offset)


def _take(x: Tensor, at: tuple[slice, ...], wide: torch.dtype) -> Tensor:
    """Slices of `[B, *grid, H, D]` as `[B, H, n, D]`."""
    return x[(slice(None), *at)].flatten(1, -3).transpose(1, 2).to(wide)


def _put(x: Tensor, at: tuple[slice, ...], values: Tensor) -> None:
    """Add `[B, H, n, D]` to slices of `[B, *grid, H, D]`."""
    part = x[(slice(None), *at)]
    part += values.transpose(1, 2).reshape(part.shape)


def _with_extra(keys: Tensor, extra: Tensor | None, heads: int) -> Tensor:
    """Keys of a step followed by the extra tokens, one head for every query head."""
    if extra is not None:
        keys = torch.cat([keys, extra.transpose(1, 2).to(keys.dtype)], 2)
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], 1)


def _scores(
    q: Tensor, k: Tensor, step: Step, scale: float, rpb: Tensor | None, extra: int
) -> Tensor:
    """Scaled, biased and masked scores `[B, H, queries, keys + extra]`."""
    score = (q @ k.transpose(-1, -2)) * scale
    near = score[..., : score.shape[-1] - extra]
    if rpb is not None:
        near += step.bias(rpb.to(score.dtype))
    near.masked_fill_(~step.mask(), float("-inf"))
    return score


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type that sums run in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hood: Neighborhood,
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    rpb: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *grid, H, Dv]` and the natural logarithm of the softmax sums `[B, *grid, H]`."""
    batch, *grid, heads, _ = q.shape
    wide = wide_type(q.dtype)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_zeros(*q.shape[:-1], 1, dtype=wide)
    extra = 0 if extra_k is None else extra_k.shape[1]
    for step in steps(tuple(grid), hood, batch * heads, q.device):
        own = _take(q, step.queries, wide)
        keys = _with_extra(_take(k, step.keys, wide), extra_k, heads)
        values = _with_extra(_take(v, step.keys, wide), extra_v, heads)
        score = _scores(own, keys, step, scale, rpb, extra)
        norm = score.logsumexp(-1, keepdim=True)
        _put(out, step.queries, ((score - norm).exp_() @ values).to(out.dtype))
        _put(lse, step.queries, norm)
    return out, lse.squeeze(-1)


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    hood: Neighborhood,
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    rpb: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, extra_k, extra_v and rpb."""
    batch, *grid, heads, _ = q.shape
    wide = wide_type(q.dtype)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (q, k, v))
    dek, dev, drpb = (
        None if x is None else x.new_zeros(x.shape, dtype=wide) for x in (extra_k, extra_v, rpb)
    )
    extra = 0 if extra_k is None else extra_k.shape[1]
    delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide)[..., None]
    for step in steps(tuple(grid), hood, batch * heads, q.device):
        own, up = _take(q, step.queries, wide), _take(grad, step.queries, wide)
        keys = _with_extra(_take(k, step.keys, wide), extra_k, heads)
        values = _with_extra(_take(v, step.keys, wide), extra_v, heads)
        p = _scores(own, keys, step, scale, rpb, extra)
        p = p.sub_(_take(lse[..., None], step.queries, wide)).exp_()
        ds = p * (up @ values.transpose(-1, -2) - _take(delta, step.queries, wide))
        _put(dq, step.queries, ds @ keys * scale)
        for grads, extras, weight, rows in (
            (dk, dek, ds, own * scale),
            (dv, dev, p, up),
        ):
            part = weight.transpose(-1, -2) @ rows
            part = part.unflatten(1, (k.shape[-2], -1)).sum(2)
            near = part.shape[2] - extra
            _put(grads, step.keys, part[:, :, :near])
            if extras is not None:
                extras += part[:, :, near:].transpose(1, 2)
        if rpb is not None and drpb is not None:
            drpb += step.bias_gradient(ds[..., : ds.shape[-1] - extra].sum(0), rpb)
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        None if dek is None else dek.to(k.dtype),
        None if dev is None else dev.to(v.dtype),
        None if drpb is None or rpb is None else drpb.to(rpb.dtype),
    )
