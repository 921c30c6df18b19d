"""The backward pass of routed attention: its launches."""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.dispatch import on_device
from vistoken.kernels.routing_reference import Grads
from vistoken.kernels.routing_regions import Routing, count_regions, inverse_lists
from vistoken.kernels.routing_tiles import Tile
from vistoken.kernels.triton_neighborhood_launch import LOG2E, extras, rows_packed, wide
from vistoken.kernels.triton_routing_backward import _key, _query
from vistoken.kernels.triton_routing_launch import (
    extra_rows,
    geometry,
    list_strides,
    plan,
    programs,
    strides,
)


@on_device
def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    counts: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    routing: Routing,
    scale: float,
    tiles: tuple[Tile | None, Tile | None] = (None, None),
) -> Grads:
    """See `vistoken.kernels.routing_reference.backward`; `tiles` override the choice."""
    grad, q, k, v = rows_packed(grad), rows_packed(q), rows_packed(k), rows_packed(v)
    dq, delta = query_gradient(
        grad, grad_lse, q, k, v, out, lse, index, counts, extra_k, extra_v, routing, scale, tiles[0]
    )
    dk, dv = key_gradients(grad, q, k, v, lse, delta, index, counts, routing, scale, tiles[1])
    if extra_k is None or extra_v is None:
        return dq, dk, dv, None, None
    from vistoken.kernels.triton_neighborhood_extra import extra_gradients

    return dq, dk, dv, *extra_gradients(grad, q, lse, delta, scale, extra_k, extra_v)


def query_gradient(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    counts: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    routing: Routing,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of q, and `delta [B, X, Y, H]`."""
    dq, delta = q.new_empty(q.shape), torch.empty_like(lse)
    extra_k = None if extra_k is None else rows_packed(extra_k)
    extra_v = None if extra_v is None else rows_packed(extra_v)
    count = 0 if extra_k is None else extra_k.shape[1]
    heads = q.shape[-2]
    tile, constants = plan(routing.q_size, routing.k_size, index.shape[-1], q, "query", tile)
    _query[programs(q, routing.q_size, tile, heads)](
        q, k, v, grad, out, lse, lse if grad_lse is None else grad_lse.contiguous(), delta, dq,
        index, index if counts is None else counts.contiguous(),
        q if extra_k is None else extra_k, q if extra_v is None else extra_v,
        *strides(q), *strides(k), *strides(v), *strides(grad), *extras(extra_k), *extras(extra_v),
        *geometry(q, routing.q_size, tile.own), *geometry(k, routing.k_size, tile.walk),
        index.shape[-1], *list_strides(index), heads, heads // k.shape[-2], count,
        k.shape[2] - q.shape[2], scale, scale * LOG2E,
        COUNTED=counts is not None, CAUSAL=routing.causal,
        EXTRA=extra_rows(count, q, tile, "query"), GRAD_LSE=grad_lse is not None,
        WIDE=wide(q, k, v, grad), **constants,
    )  # fmt: skip
    return dq, delta


def key_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    index: Tensor,
    counts: Tensor | None,
    routing: Routing,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v."""
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    rows, columns = count_regions((k.shape[1], k.shape[2]), routing.k_size)
    ids, starts = inverse_lists(index, counts, rows * columns)
    heads, key_heads = q.shape[-2], k.shape[-2]
    mean = max(1, ids.shape[-1] // (rows * columns))
    tile, constants = plan(routing.k_size, routing.q_size, mean, q, "key", tile)
    _key[programs(k, routing.k_size, tile, key_heads)](
        q, k, v, grad, lse, delta, dk, dv, ids, starts,
        *strides(q), *strides(k), *strides(v), *strides(grad),
        *geometry(k, routing.k_size, tile.own), *geometry(q, routing.q_size, tile.walk),
        ids.shape[-1], *list_strides(index), heads, heads // key_heads,
        k.shape[2] - q.shape[2], scale, scale * LOG2E,
        CAUSAL=routing.causal, GROUPED=heads != key_heads, WIDE=wide(q, k, v, grad, lse),
        **constants,
    )  # fmt: skip
    return dk, dv
