"""Attention of one decoding step over a static cache: rotary, cache write, softmax over real keys.

Rows of a batch have lengths of their own, which stay on the device. Keys beyond a row's length are
never read, so the cost follows the real lengths and not the size of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.dispatch import use_triton


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    arrivals: Tensor,
    scale: float,
    early: bool = False,
) -> Tensor:
    """Rotate q and k, append k and v to the cache in place, attend to all keys of the row.

    Args:
        qkv: `[B, (H + 2 G) D]`, contiguous: queries of H heads, keys and values of G heads.
        cos: `[B, D]`, rotary table at the new token's position, halves repeated.
        sin: `[B, D]`.
        keys: cache `[B, G, M, D]`, written at `lengths`.
        values: cache `[B, G, M, D]`.
        lengths: `[B]` int64, tokens in the cache before this one; less than M.
        arrivals: `[B G]` int32 zeros, counters of the kernel; zero again afterwards.
        scale: factor of the scores.
        early: launch before the kernel before has ended; for kernels that all do.

    Returns:
        `[B, H D]` in qkv's dtype.
    """
    if use_triton(qkv) and keys.is_contiguous() and keys.shape[-1] % 16 == 0:
        from vistoken.kernels.triton_decode_attention import decode_attention_triton

        return decode_attention_triton(qkv, cos, sin, keys, values, lengths, arrivals, scale, early)
    return decode_attention_reference(qkv, cos, sin, keys, values, lengths, arrivals, scale)


def decode_attention_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    arrivals: Tensor,
    scale: float,
) -> Tensor:
    """`decode_attention` in torch operators."""
    batch, groups, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * groups
    q, k, v = qkv.view(batch, -1, dim).split([heads, groups, groups], 1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    slot = lengths.view(batch, 1, 1, 1).expand(batch, groups, 1, dim)
    keys.scatter_(2, slot, k[:, :, None])
    values.scatter_(2, slot, v[:, :, None])
    q = q.view(batch, groups, heads // groups, dim)
    scores = torch.einsum("bgqd,bgkd->bgqk", q.float(), keys.float()) * scale
    beyond = torch.arange(capacity, device=keys.device) > lengths[:, None]
    weights = scores.masked_fill(beyond[:, None, None], -torch.inf).softmax(-1)
    # Cells beyond the length may hold anything, also what is not finite.
    known = values.float().masked_fill(beyond[:, None, :, None], 0)
    return (weights @ known).to(qkv.dtype).view(batch, heads * dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position of heads `[B, H, D]` with tables `[B, D]`."""
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return x * cos[:, None] + turned * sin[:, None]
