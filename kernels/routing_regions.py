"""Regions of a grid, lists of regions, and the routing of bi-level routing attention in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.dispatch import ANY, as_given, as_op, use_triton

Sides = tuple[int, int]

MAX_RANKED = 256
"""Most regions whose lists the Triton kernel finds."""

MAX_BATCH = 65535
"""Most batch entries, or heads, of a launch."""

MAX_ENTRIES = 4096
"""Longest lists of an image that the Triton kernel inverts: every region reads them all."""


@dataclass(frozen=True)
class Routing:
    """What the lists of a routed attention mean."""

    q_size: Sides
    """Rows and columns of a query region; the last regions of a grid may be ragged."""
    k_size: Sides
    pads: bool = False
    """Ragged regions attend zeros where they leave the grid."""
    causal: bool = False
    """One row of tokens; no query attends a later key, counted from the ends of both rows."""


def count_regions(grid: Sides, size: Sides) -> Sides:
    """Regions along each axis."""
    return -(-grid[0] // size[0]), -(-grid[1] // size[1])


def partition(x: Tensor, size: Sides) -> Tensor:
    """Tokens of a grid `[B, X, Y, H, D]` by region, `[B, H, R, n, D]`; missing ones are zeros."""
    rows, columns = count_regions((x.shape[1], x.shape[2]), size)
    bottom, right = rows * size[0] - x.shape[1], columns * size[1] - x.shape[2]
    if bottom or right:
        x = F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom))
    x = x.unflatten(2, (columns, size[1])).unflatten(1, (rows, size[0]))
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)


def merge(x: Tensor, grid: Sides, size: Sides) -> Tensor:
    """Inverse of `partition`; what lies outside the grid is dropped."""
    x = x.unflatten(3, size).unflatten(2, count_regions(grid, size))
    x = x.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)
    return x[:, : grid[0], : grid[1]].contiguous()


def inside(grid: Sides, size: Sides, device: torch.device) -> Tensor:
    """Which places of the regions are on the grid, `[R, n]`."""
    on = torch.ones(1, *grid, 1, 1, dtype=torch.bool, device=device)
    return partition(on, size)[0, 0, :, :, 0]


def valid_lists(index: Tensor, counts: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
    """Lists `[.., R, K]` with legal entries, and which entries count."""
    ok = (index >= 0) & (index < total)
    if counts is not None:
        ok &= torch.arange(index.shape[-1], device=index.device) < counts[..., None]
    return index.masked_fill(~ok, 0), ok


def inverse_lists(index: Tensor, counts: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
    """Who lists a region: ids one after the other, and where each region's begin.

    Args:
        index: `[B, H, R, K]` key regions of each query region.
        counts: `[B, H, R]` entries that count, or None for all.
        total: number of key regions.

    Returns:
        ids `[B, H, R * K]` and starts `[B, H, total + 1]`, both int32; rising ids, so sums over
        them have one order.
    """
    entries = math.prod(index.shape[2:])
    lines = index.shape[0] * index.shape[1]
    if use_triton(index, (torch.int32,)) and 0 < entries <= MAX_ENTRIES and lines <= MAX_BATCH:
        from vistoken.kernels import triton_routing_lists

        return triton_routing_lists.inverse_lists(index, counts, total)
    ids, ok = valid_lists(index, counts, total)
    flat = ids.masked_fill(~ok, total).flatten(2)
    keys, order = flat.sort(dim=-1, stable=True)
    edges = torch.arange(total + 1, device=index.device, dtype=keys.dtype)
    starts = torch.searchsorted(keys, edges.expand(*keys.shape[:2], -1).contiguous())
    return (order // index.shape[-1]).int(), starts.int()


def region_means(x: Tensor, size: Sides) -> Tensor:
    """Mean of every region's tokens, `[B, X, Y, ...]` to float32 `[B, R, ...]`.

    Ragged regions average what they have. float64 stays float64. Sums run over the tensor where it
    lies: pooling operators would copy it first.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, columns = count_regions((x.shape[1], x.shape[2]), size)
    bottom, right = rows * size[0] - x.shape[1], columns * size[1] - x.shape[2]
    if bottom or right:
        whole = (0, 0) * (x.dim() - 3)
        sums = F.pad(x, (*whole, 0, right, 0, bottom))
    else:
        sums = x
    sums = sums.unflatten(2, (columns, size[1])).unflatten(1, (rows, size[0]))
    sums = sums.sum((2, 4), dtype=wide)
    high, long = (
        (length - torch.arange(count, device=x.device) * side).clamp(max=side)
        for length, count, side in zip(x.shape[1:3], (rows, columns), size, strict=True)
    )
    counts = (high[:, None] * long).to(wide)
    means: Tensor = sums / counts.view(rows, columns, *(1,) * (x.dim() - 3))
    return means.flatten(1, 2)


def route(q: Tensor, k: Tensor, size: Sides, topk: int, per_head: bool = False) -> Tensor:
    """The regions that each region's queries attend: those whose mean key fits their mean query.

    Args:
        q: queries `[B, X, Y, H, D]`.
        k: keys `[B, X, Y, Hk, D]`, Hk a divisor of H.
        size: rows and columns of a region.
        topk: regions per list; all of them where there are fewer.
        per_head: whether every head has lists of its own, by its own part of the means.

    Returns:
        `[B, H or 1, R, topk]` int32 without gradient (Zhu et al., CVPR 2023, section 3.2), no
        region twice in a list.
    """
    run = route_op if as_op(q, ANY) else _route
    index: Tensor = run(q.detach(), k.detach(), list(size), topk, per_head)
    return index


def _route(q: Tensor, k: Tensor, size: Sequence[int], topk: int, per_head: bool) -> Tensor:
    sides, grid = (size[0], size[1]), (q.shape[1], q.shape[2])
    few = math.prod(count_regions(grid, sides)) <= MAX_RANKED
    if use_triton(q, ANY) and few and q.shape[0] <= MAX_BATCH and q.numel() > 0:
        from vistoken.kernels import triton_routing_lists

        return triton_routing_lists.route(q, k, sides, topk, per_head)
    with torch.no_grad(), as_given(q.device.type):
        mean_q, mean_k = region_means(q, sides), region_means(k, sides)
        mean_k = mean_k.repeat_interleave(q.shape[-2] // k.shape[-2], 2)
        if per_head:
            scores = mean_q.transpose(1, 2) @ mean_k.permute(0, 2, 3, 1)
        else:
            scores = (mean_q.flatten(2) @ mean_k.flatten(2).transpose(1, 2))[:, None]
        return scores.topk(min(topk, scores.shape[-1]), dim=-1).indices.int()


route_op = torch.library.custom_op(
    "vistoken::route",
    _route,
    mutates_args=(),
    schema="(Tensor q, Tensor k, SymInt[] size, int topk, bool per_head) -> Tensor",
)


@route_op.register_fake
def _(q: Tensor, k: Tensor, size: Sequence[int], topk: int, per_head: bool) -> Tensor:
    rows, columns = count_regions((q.shape[1], q.shape[2]), (size[0], size[1]))
    regions, heads = rows * columns, (q.shape[-2] if per_head else 1)
    return q.new_empty(q.shape[0], heads, regions, min(topk, regions), dtype=torch.int32)
