"""Neighborhood attention written down a second time: Python loops for the windows, a dense mask."""

import math

import torch


def keys_of(position, length, window, stride=1, dilation=1, causal=False):
    """Positions that one position of an axis attends."""
    group = [p for p in range(length) if p % dilation == position % dilation]
    own = group.index(position)
    team = [i for i in range(len(group)) if i // stride == own // stride]
    full = own // stride * stride
    leader = full + (stride - 1 if causal else stride // 2)
    leader = leader if leader in team else len(group) - 1
    if causal:
        chosen = range(max(0, leader - window + 1), own + 1)
    else:
        start = leader - window // 2
        while start < 0:
            start += 1
        while start + window > len(group):
            start -= 1
        chosen = range(start, start + window)
    return [group[i] for i in chosen]


def dense_mask(grid, window, stride, dilation, causal):
    """`[N, N]` bool, tokens in row-major order."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for length, w, s, d, c in zip(grid, window, stride, dilation, causal, strict=True):
        axis = torch.zeros(length, length, dtype=torch.bool)
        for position in range(length):
            axis[position, keys_of(position, length, w, s, d, c)] = True
        mask = torch.kron(mask.int(), axis.int()).bool()
    return mask


def dense_bias(rpb, grid, window, dilation):
    """`[H, N, N]` table entries of pairs whose difference the table has; zero elsewhere."""
    tokens = list(
        torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid)).tolist()
    )
    bias = torch.zeros(len(rpb), len(tokens), len(tokens), dtype=rpb.dtype)
    for i, own in enumerate(tokens):
        for j, other in enumerate(tokens):
            at = [o // d - p // d + w - 1
                  for o, p, d, w in zip(other, own, dilation, window, strict=True)]  # fmt: skip
            if all(0 <= a < 2 * w - 1 for a, w in zip(at, window, strict=True)):
                bias[:, i, j] = rpb[(slice(None), *at)]
    return bias


def attend(q, k, v, window, stride, dilation, causal, scale=None, extra=(None, None), rpb=None):
    """Output and lse by full attention with a mask."""
    batch, *grid, heads, dim = q.shape
    tokens = math.prod(grid)
    mask = dense_mask(grid, window, stride, dilation, causal).to(q.device)
    q, k, v = (x.reshape(batch, tokens, *x.shape[-2:]).transpose(1, 2) for x in (q, k, v))
    bias = torch.zeros(heads, tokens, tokens, dtype=q.dtype, device=q.device)
    if rpb is not None:
        bias = dense_bias(rpb.cpu(), grid, window, dilation).to(q)
    if extra[0] is not None:
        count = extra[0].shape[1]
        k = torch.cat([k, extra[0].transpose(1, 2)], 2)
        v = torch.cat([v, extra[1].transpose(1, 2)], 2)
        mask = torch.cat([mask, mask.new_ones(tokens, count)], 1)
        bias = torch.cat([bias, bias.new_zeros(heads, tokens, count)], 2)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    score = q @ k.transpose(-1, -2) * (dim**-0.5 if scale is None else scale) + bias
    score = score.masked_fill(~mask, float("-inf"))
    out, lse = score.softmax(-1) @ v, score.logsumexp(-1)
    back = out.transpose(1, 2).reshape(batch, *grid, heads, -1)
    return back, lse.transpose(1, 2).reshape(batch, *grid, heads)
