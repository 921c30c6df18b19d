"""The torch custom operators of routed attention, and which implementation they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistoken.kernels import routing_reference as reference
from vistoken.kernels.dispatch import ANY, as_given, use_triton
from vistoken.kernels.neighborhood_reference import wide_type
from vistoken.kernels.routing_bands import BandPass, bands_fit, bands_have_room, bands_win
from vistoken.kernels.routing_regions import MAX_BATCH, Routing
from vistoken.kernels.routing_tiles import shared_limit

MAX_DIM = 256
"""Widest head that the Triton kernels take."""


def triton_runs(q: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernels take these tensors; the reference takes all."""
    fits = q.shape[-1] == v.shape[-1] <= MAX_DIM and max(q.shape[0], q.shape[-2]) <= MAX_BATCH
    return use_triton(q, ANY) and fits and q.numel() > 0


def walks_bands(
    q: Tensor, k: Tensor, listed: int, routing: Routing, distinct: bool, kind: BandPass
) -> bool:
    """Whether the kernels of small maps take a problem, whose lists may have no repeats."""
    grid, dim = (q.shape[1], q.shape[2]), q.shape[-1]
    return (
        distinct
        and grid == (k.shape[1], k.shape[2])
        and bands_fit(grid, routing, dim, q.element_size(), q.shape[-2] // k.shape[-2])
        and bands_win(grid, routing.q_size, listed, dim)
        and bands_have_room(grid, routing.q_size, dim, kind, shared_limit(q.device))
    )


def _routing(
    q_size: Sequence[int], k_size: Sequence[int], pads: bool, causal: bool
) -> Routing:  # fmt: skip
    return Routing((q_size[0], q_size[1]), (k_size[0], k_size[1]), pads, causal)


@torch.library.custom_op("vistoken::routed", mutates_args=())
def routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    counts: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    q_size: Sequence[int],
    k_size: Sequence[int],
    pads: bool,
    causal: bool,
    scale: float,
    distinct: bool,
) -> tuple[Tensor, Tensor]:
    """Output `[B, X, Y, H, Dv]` and lse `[B, X, Y, H]`; see `vistoken.kernels.routing`."""
    routing = _routing(q_size, k_size, pads, causal)
    if triton_runs(q, v):
        if counts is None and walks_bands(q, k, index.shape[-1], routing, distinct, "forward"):
            from vistoken.kernels import triton_routing_bands as bands

            return bands.forward(q, k, v, index, extra_k, extra_v, routing.q_size, scale)
        from vistoken.kernels import triton_routing

        return triton_routing.forward(q, k, v, index, counts, extra_k, extra_v, routing, scale)
    with as_given(q.device.type):
        return reference.forward(q, k, v, index, counts, extra_k, extra_v, routing, scale)


@routed.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=wide_type(q.dtype))


@torch.library.custom_op("vistoken::routed_backward", mutates_args=())
def routed_backward(
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
    q_size: Sequence[int],
    k_size: Sequence[int],
    pads: bool,
    causal: bool,
    scale: float,
    distinct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, extra_k and extra_v; empty for those that were not given."""
    routing = _routing(q_size, k_size, pads, causal)
    given = (grad, grad_lse, q, k, v, out, lse, index, counts, extra_k, extra_v, routing, scale)
    with as_given(q.device.type):
        if not triton_runs(q, v):
            grads = reference.backward(*given)
        elif counts is None and walks_bands(q, k, index.shape[-1], routing, distinct, "backward"):
            from vistoken.kernels import triton_routing_bands as bands

            few = (index, extra_k, extra_v, routing.q_size, scale)
            grads = bands.backward(grad, grad_lse, q, k, v, out, lse, *few)
        else:
            from vistoken.kernels import triton_routing_gradients

            grads = triton_routing_gradients.backward(*given)
    dq, dk, dv, dek, dev = (q.new_empty(0) if g is None else g for g in grads)
    return dq, dk, dv, dek, dev


@routed_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, index, counts, extra_k, extra_v, *rest):  # type: ignore[no-untyped-def]
    inputs = (q, k, v, extra_k, extra_v)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, counts, extra_k, extra_v, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, index, counts, extra_k, extra_v)
    ctx.rest = rest


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, index, counts, extra_k, extra_v = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    dq, dk, dv, *extras = routed_backward(
        grad, grad_lse, q, k, v, out, lse, index, counts, extra_k, extra_v, *ctx.rest
    )
    dek, dev = (None if extra_k is None else g for g in extras)
    return dq, dk, dv, None, None, dek, dev, *(None for _ in ctx.rest)


routed.register_autograd(_backward, setup_context=_save)


def _refuse_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise NotImplementedError(
        "routed attention has a batch axis of its own and is not mapped by vmap: "
        "put the mapped axis into the batch"
    )


routed.register_vmap(_refuse_vmap)
routed_backward.register_vmap(_refuse_vmap)
