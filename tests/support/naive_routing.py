"""Routed attention by a dense mask in float64: the slow truth of the tests."""

import math

import torch


def region_ids(grid, size):
    """Region of every token, row by row."""
    columns = math.ceil(grid[1] / size[1])
    rows = [[x // size[0] * columns + y // size[1] for y in range(grid[1])] for x in range(grid[0])]
    return [region for row in rows for region in row]


def multiplicity(index, queries, keys, batch, heads, counts=None):
    """How often each query token lists each key token, `[B, H, N, M]`."""
    table = torch.zeros(batch, heads, len(queries), len(keys), dtype=torch.float64)
    total = max(keys) + 1
    for b in range(batch):
        for h in range(heads):
            own = index[b if len(index) > 1 else 0]
            own = own if own.dim() == 2 else own[h if len(own) > 1 else 0]
            limit = None
            if counts is not None:
                limit = counts[b if len(counts) > 1 else 0]
                limit = limit if limit.dim() == 1 else limit[h if len(limit) > 1 else 0]
            times = torch.zeros(len(own), total, dtype=torch.float64)
            for region, entries in enumerate(own.tolist()):
                for place, entry in enumerate(entries):
                    if 0 <= entry < total and (limit is None or place < limit[region]):
                        times[region, entry] += 1
            table[b, h] = times[queries][:, keys]
    return table


def attend(q, k, v, times, scale, extra=None, zeros=None):
    """Dense attention with weights `times`; heads last, tokens flat `[B, N, H, D]`.

    `zeros [B, H, N]` says how many zero keys with zero values take part besides.
    """
    heads = q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    score = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    weight = times.clamp(min=0)
    values = v
    if extra is not None:
        ek, ev = (x.repeat_interleave(heads // x.shape[2], 2) for x in extra)
        score = torch.cat([score, torch.einsum("bnhd,bmhd->bhnm", q, ek) * scale], -1)
        weight = torch.cat([weight, torch.ones_like(weight[..., :1]).expand(*weight.shape[:-1],
                            ek.shape[1])], -1)  # fmt: skip
        values = torch.cat([v, ev], 1)
    mass = weight * score.exp()
    total = mass.sum(-1, keepdim=True)
    if zeros is not None:
        total = total + zeros[..., None]
    some = total > 0
    total = torch.where(some, total, 1.0)
    lse = torch.where(some, total.log(), float("-inf")).squeeze(-1).transpose(1, 2)
    return torch.einsum("bhnm,bmhd->bnhd", mass / total, values), lse
