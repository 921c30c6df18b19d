"""Neighborhood attention written out: Python loops over queries and keys, one softmax per query.

Nothing here calls the package.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def axis_keys(length: int, i: int, window: int, stride=1, dilation=1, causal=False) -> list[int]:
    """Positions that position i of an axis attends to."""
    group = list(range(i % dilation, length, dilation))
    place, last = i // dilation, len(group) - 1
    first_of_stride = place - place % stride
    if causal:
        leader = min(first_of_stride + stride - 1, last)
        return group[max(leader - window + 1, 0) : place + 1]
    leader = min(first_of_stride + stride // 2, last)
    start = leader - window // 2
    while start < 0:
        start += 1
    while start + window > len(group):
        start -= 1
    return group[start : start + window]


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window,
    stride=None,
    dilation=None,
    causal=None,
    scale=None,
    rpb=None,
    extra=None,
) -> Tensor:
    """q, k, v `[B, *grid, H, D]` to the same shape; differentiable."""
    grid = q.shape[1:-2]
    rank = len(grid)
    stride, dilation = stride or (1,) * rank, dilation or (1,) * rank
    causal = causal or (False,) * rank
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for query in product(*map(range, grid)):
        lists = [
            axis_keys(grid[a], query[a], window[a], stride[a], dilation[a], causal[a])
            for a in range(rank)
        ]
        keys = list(product(*lists))
        key = torch.stack([k[(slice(None), *j)] for j in keys], 1)  # [B, keys, H, D]
        value = torch.stack([v[(slice(None), *j)] for j in keys], 1)
        scores = torch.einsum("bhd,bkhd->bhk", q[(slice(None), *query)], key) * scale
        if rpb is not None:
            bias = [
                rpb[(slice(None), *((b - a) // d + w - 1 for a, b, d, w in steps))]
                for steps in (zip(query, j, dilation, window, strict=True) for j in keys)
            ]
            scores = scores + torch.stack(bias, -1)
        if extra is not None:
            key, value = extra
            more = torch.einsum("bhd,bkhd->bhk", q[(slice(None), *query)], key) * scale
            scores = torch.cat([scores, more], -1)
            value = torch.cat([torch.stack([v[(slice(None), *j)] for j in keys], 1), value], 1)
        rows.append(torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), value))
    return torch.stack(rows, 1).unflatten(1, grid)
