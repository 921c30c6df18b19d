"""The backward pass of neighborhood attention: its launches."""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.dispatch import on_device
from vistoken.kernels.neighborhood_tiles import Tile
from vistoken.kernels.neighborhood_trust import sound_tile
from vistoken.kernels.neighborhood_windows import Neighborhood
from vistoken.kernels.triton_neighborhood import extra_block
from vistoken.kernels.triton_neighborhood_backward import _key, _query
from vistoken.kernels.triton_neighborhood_launch import (
    LOG2E,
    extras,
    plan,
    rows_packed,
    strides,
    wide,
)

Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


@on_device
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
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    rpb: Tensor | None = None,
    tiles: tuple[Tile | None, Tile | None] = (None, None),
) -> Grads:
    """See `vistoken.kernels.neighborhood_reference.backward`; `tiles` override the choice."""
    grad, q, k, v = rows_packed(grad), rows_packed(q), rows_packed(k), rows_packed(v)
    dq, delta = query_gradient(
        grad, grad_lse, q, k, v, out, lse, hood, scale, extra_k, extra_v, rpb, tiles[0]
    )
    dk, dv = key_gradients(grad, q, k, v, lse, delta, hood, scale, rpb, tiles[1])
    dek = dev = drpb = None
    if extra_k is not None and extra_v is not None:
        from vistoken.kernels.triton_neighborhood_extra import extra_gradients

        dek, dev = extra_gradients(grad, q, lse, delta, scale, extra_k, extra_v)
    if rpb is not None:
        from vistoken.kernels.triton_neighborhood_bias import bias_gradient

        drpb = bias_gradient(grad, q, k, v, lse, delta, hood, scale, rpb)
    return dq, dk, dv, dek, dev, drpb


def query_gradient(
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
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of q, and `delta [B, *grid, H]`."""
    dq, delta = q.new_empty(q.shape), torch.empty_like(lse)
    launch = plan(q, hood, "query", tile or sound_tile("query", q, k, hood, extra_k, rpb))
    extra_k = None if extra_k is None else rows_packed(extra_k)
    extra_v = None if extra_v is None else rows_packed(extra_v)
    count = 0 if extra_k is None else extra_k.shape[1]
    heads = q.shape[-2]
    _query[launch.programs(q.shape[0], heads)](
        q, k, v, grad, out, lse, lse if grad_lse is None else grad_lse.contiguous(), delta, dq,
        q if extra_k is None else extra_k, q if extra_v is None else extra_v,
        q if rpb is None else rpb.contiguous(),
        *strides(q), *strides(k), *strides(v), *strides(grad), *extras(extra_k), *extras(extra_v),
        *launch.sizes, heads, heads // k.shape[-2], count, scale, scale * LOG2E,
        EXTRA=extra_block(count, q), RPB=rpb is not None, GRAD_LSE=grad_lse is not None,
        WIDE=wide(q, k, v, grad), **launch.constants,
    )  # fmt: skip
    return dq, delta


def key_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    hood: Neighborhood,
    scale: float,
    rpb: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v."""
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    launch = plan(q, hood, "key", tile or sound_tile("key", q, k, hood, None, rpb))
    heads, key_heads = q.shape[-2], k.shape[-2]
    _key[launch.programs(q.shape[0], key_heads)](
        q, k, v, grad, lse, delta, dk, dv, q if rpb is None else rpb.contiguous(),
        *strides(q), *strides(k), *strides(v), *strides(grad),
        *launch.sizes, heads, heads // key_heads, scale, scale * LOG2E,
        RPB=rpb is not None, GROUPED=heads != key_heads, WIDE=wide(q, k, v, grad, lse),
        **launch.constants,
    )  # fmt: skip
    return dk, dv
