"""Routed attention in torch operators: it gathers what the Triton kernels walk in place.

A step takes a few query regions, so that the gathered keys stay small. Sums run in float32, or
float64 for float64 inputs, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vistoken.kernels.neighborhood_reference import wide_type
from vistoken.kernels.routing_regions import (
    Routing,
    inside,
    merge,
    partition,
    valid_lists,
)

MAX_GATHERED = 2**24
"""Elements of gathered keys, or scores, that one step may hold."""

Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass
class Problem:
    """Inputs by region: `[B, H, R, n, D]`, every query head with its own keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    """`[B, H, R, K]` legal region numbers."""
    mask: Tensor
    """`[B, H, R, K]`: which entries count."""
    keys_inside: Tensor
    extra_k: Tensor | None
    extra_v: Tensor | None
    grids: tuple[tuple[int, int], tuple[int, int]]
    routing: Routing
    scale: float

    def steps(self) -> Iterator[slice]:
        """Query regions of each step."""
        b, h, regions, n, d = self.q.shape
        keys = self.ids.shape[-1] * self.k.shape[3]
        side = max(1, MAX_GATHERED // max(1, b * h * keys * max(n, d)))
        for first in range(0, max(1, regions), side):
            yield slice(first, first + side)

    def gather(self, step: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Keys and values `[B, H, r, K * n, D]` of a step, and where they came from."""
        b, h = self.q.shape[:2]
        device = self.q.device
        at = (
            torch.arange(b, device=device).view(-1, 1, 1, 1),
            torch.arange(h, device=device).view(-1, 1, 1),
            self.ids[:, :, step],
        )
        return self.k[at].flatten(3, 4), self.v[at].flatten(3, 4), at

    def scores(self, step: slice, keys: Tensor) -> Tensor:
        """Scaled scores `[B, H, r, n, K * n + extra]`, minus infinity where masked."""
        ok = self.mask[:, :, step, :, None]
        if self.routing.pads:
            ok = ok.expand(*ok.shape[:-1], self.k.shape[3])
        else:
            ok = ok & self.keys_inside[self.ids[:, :, step]]
        ok = ok.flatten(3)[..., None, :]
        if self.routing.causal:
            regions, n = self.q.shape[2:4]
            device = ok.device
            own = torch.arange(regions * n, device=device).view(regions, n)[step]
            place = torch.arange(self.k.shape[3], device=device)
            at = (self.ids[:, :, step, :, None] * len(place) + place).flatten(3)
            shift = self.grids[1][1] - self.grids[0][1]
            ok = ok & (at[..., None, :] <= own[..., None] + shift)
        score = self.q[:, :, step] @ keys.transpose(-1, -2) * self.scale
        score = score.masked_fill(~ok, float("-inf"))
        if self.extra_k is not None:
            more = self.q[:, :, step] @ self.extra_k[:, :, None].transpose(-1, -2) * self.scale
            score = torch.cat([score, more], -1)
        return score


def pose(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, counts: Tensor | None,
    extra_k: Tensor | None, extra_v: Tensor | None, routing: Routing, scale: float,
) -> Problem:  # fmt: skip
    """The inputs of an operator call by region."""
    wide, heads = wide_type(q.dtype), q.shape[3]

    def each(x: Tensor) -> Tensor:
        return x.to(wide).repeat_interleave(heads // x.shape[1], 1)

    grids = (q.shape[1], q.shape[2]), (k.shape[1], k.shape[2])
    keys_inside = inside(grids[1], routing.k_size, q.device)
    ids, ok = valid_lists(index.long(), counts, len(keys_inside))
    shape = q.shape[0], heads, *index.shape[2:]
    return Problem(
        partition(q, routing.q_size).to(wide),
        each(partition(k, routing.k_size)),
        each(partition(v, routing.k_size)),
        ids.expand(shape),
        ok.expand(shape),
        keys_inside,
        None if extra_k is None else each(extra_k.transpose(1, 2)),
        None if extra_v is None else each(extra_v.transpose(1, 2)),
        grids,
        routing,
        scale,
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, counts: Tensor | None,
    extra_k: Tensor | None, extra_v: Tensor | None, routing: Routing, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `[B, X, Y, H, Dv]` and the natural logarithm of the softmax sums `[B, X, Y, H]`.

    Differentiable. `index [B or 1, H or 1, R, K]` and `counts [.., R]` as in
    `vistoken.kernels.routing.block_list_attention`; queries without keys give zeros and minus
    infinity.
    """
    problem = pose(q, k, v, index, counts, extra_k, extra_v, routing, scale)
    outs, norms = [], []
    for step in problem.steps():
        keys, values, _ = problem.gather(step)
        score = problem.scores(step, keys)
        norm = score.logsumexp(-1, keepdim=True)
        p = (score - norm.masked_fill(norm == float("-inf"), 0.0)).exp()
        near = p[..., : values.shape[3]]
        out = near @ values
        if problem.extra_v is not None:
            out = out + p[..., values.shape[3] :] @ problem.extra_v[:, :, None]
        outs.append(out)
        norms.append(norm)
    grid = problem.grids[0]
    out = merge(torch.cat(outs, 2), grid, routing.q_size).to(q.dtype)
    return out, merge(torch.cat(norms, 2), grid, routing.q_size).squeeze(-1)


def backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, index: Tensor, counts: Tensor | None, extra_k: Tensor | None,
    extra_v: Tensor | None, routing: Routing, scale: float,
) -> Grads:  # fmt: skip
    """Gradients of q, k, v, extra_k and extra_v."""
    problem = pose(q, k, v, index, counts, extra_k, extra_v, routing, scale)
    wide = problem.q.dtype
    delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide)[..., None]
    norm = partition(lse[..., None].to(wide), routing.q_size)
    norm = norm.masked_fill(norm == float("-inf"), 0.0)
    up, delta = partition(grad, routing.q_size).to(wide), partition(delta, routing.q_size)
    dq, dk, dv = (torch.zeros_like(x) for x in (problem.q, problem.k, problem.v))
    extras = (problem.extra_k, problem.extra_v)
    dek, dev = (None if x is None else torch.zeros_like(x) for x in extras)
    for step in problem.steps():
        keys, values, at = problem.gather(step)
        near = keys.shape[3]
        p = (problem.scores(step, keys) - norm[:, :, step]).exp()
        dp = up[:, :, step] @ values.transpose(-1, -2)
        if problem.extra_v is not None:
            dp = torch.cat([dp, up[:, :, step] @ problem.extra_v[:, :, None].mT], -1)
        ds = p * (dp - delta[:, :, step]) * scale
        dq[:, :, step] = ds[..., :near] @ keys
        rows = problem.q[:, :, step]
        for total, weight, from_ in ((dk, ds, rows), (dv, p, up[:, :, step])):
            part = (weight[..., :near].mT @ from_).unflatten(3, (-1, total.shape[3]))
            total.index_put_(at, part, accumulate=True)
        if problem.extra_k is not None and dek is not None and dev is not None:
            dq[:, :, step] += ds[..., near:] @ problem.extra_k[:, :, None]
            dek += (ds[..., near:].mT @ rows).sum(2)
            dev += (p[..., near:].mT @ up[:, :, step]).sum(2)

    def whole(x: Tensor, like: Tensor) -> Tensor:
        x = x.unflatten(1, (like.shape[3], -1)).sum(2)
        return merge(x, problem.grids[1], routing.k_size).to(like.dtype)

    def tokens(x: Tensor | None, like: Tensor | None) -> Tensor | None:
        if x is None or like is None:
            return None
        x = x.unflatten(1, (like.shape[2], -1)).sum(2)
        return x.transpose(1, 2).to(like.dtype).contiguous()

    dq = merge(dq, problem.grids[0], routing.q_size).to(q.dtype)
    return dq, whole(dk, k), whole(dv, v), tokens(dek, extra_k), tokens(dev, extra_v)
