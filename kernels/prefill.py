"""What stands between the products of a decoder layer over a whole prompt, one pass each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.dispatch import use_triton


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Rotate q in place; rotated k, and v, become the first L tokens of the cache.

    Args:
        q: `[B, L, H, D]`, contiguous.
        k: `[B, L, G, D]`, contiguous.
        v: `[B, L, G, D]`, contiguous.
        cos: `[B, L, D]`, contiguous: rotary table, halves repeated.
        sin: `[B, L, D]`.
        keys: cache `[B, G, M, D]`, M at least L, contiguous.
        values: cache `[B, G, M, D]`.
    """
    if use_triton(q):
        from vistoken.kernels.triton_prefill import rotate_and_store_triton

        return rotate_and_store_triton(q, k, v, cos, sin, keys, values)
    length = q.shape[1]
    q.copy_(_rotated(q, cos, sin))
    keys[:, :, :length] = _rotated(k, cos, sin).transpose(1, 2)
    values[:, :, :length] = v.transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return x * cos[:, :, None] + turned * sin[:, :, None]


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of two contiguous tensors of one shape; it may take the place of gate."""
    if use_triton(gate):
        from vistoken.kernels.triton_prefill import silu_times_triton

        return silu_times_triton(gate, up)
    return F.silu(gate) * up
