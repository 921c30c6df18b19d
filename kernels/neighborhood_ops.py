"""The torch custom operators of neighborhood attention, and which implementation they run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from vistoken.kernels import neighborhood_reference as reference
from vistoken.kernels.dispatch import ANY, as_given, use_triton
from vistoken.kernels.neighborhood_trust import NoSoundTileError
from vistoken.kernels.neighborhood_windows import Neighborhood

MAX_DIM = 256
"""Widest head that the Triton kernels take."""


MAX_BATCH = 65535
"""Most batch entries times dilation groups of a launch."""


def triton_runs(q: Tensor, v: Tensor, dilation: Sequence[int]) -> bool:
    """Whether the Triton kernels take these tensors; the reference takes all."""
    fits = q.shape[-1] == v.shape[-1] <= MAX_DIM and q.shape[0] * math.prod(dilation) <= MAX_BATCH
    return use_triton(q, ANY) and fits and q.numel() > 0


def _hood(
    window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], causal: Sequence[bool]
) -> Neighborhood:
    return Neighborhood(tuple(window), tuple(stride), tuple(dilation), tuple(causal))


@torch.library.custom_op("vistoken::neighborhood", mutates_args=())
def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    rpb: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *grid, H, Dv]` and lse `[B, *grid, H]`; see `vistoken.kernels.neighborhood`."""
    hood = _hood(window, stride, dilation, causal)
    if triton_runs(q, v, dilation):
        from vistoken.kernels import triton_neighborhood

        # The reference stays where no tile is sound; that was logged.
        with suppress(NoSoundTileError):
            return triton_neighborhood.forward(q, k, v, hood, scale, extra_k, extra_v, rpb)
    with as_given(q.device.type):
        return reference.forward(q, k, v, hood, scale, extra_k, extra_v, rpb)


@neighborhood.register_fake
def _(q, k, v, extra_k, extra_v, rpb, window, stride, dilation, causal, scale):  # type: ignore[no-untyped-def]
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=reference.wide_type(q.dtype))


@torch.library.custom_op("vistoken::neighborhood_backward", mutates_args=())
def neighborhood_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    rpb: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, extra_k, extra_v and rpb; empty for those that were not given."""
    hood = _hood(window, stride, dilation, causal)
    given = (grad, grad_lse, q, k, v, out, lse, hood, scale, extra_k, extra_v, rpb)
    with as_given(q.device.type):
        grads = None
        if triton_runs(q, v, dilation):
            from vistoken.kernels import triton_neighborhood_gradients

            with suppress(NoSoundTileError):
                grads = triton_neighborhood_gradients.backward(*given)
        if grads is None:
            grads = reference.backward(*given)
    dq, dk, dv, dek, dev, drpb = (q.new_empty(0) if g is None else g for g in grads)
    return dq, dk, dv, dek, dev, drpb


@neighborhood_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, extra_k, extra_v, rpb, *rest):  # type: ignore[no-untyped-def]
    inputs = (q, k, v, extra_k, extra_v, rpb)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, extra_k, extra_v, rpb, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, extra_k, extra_v, rpb)
    ctx.rest = rest


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, extra_k, extra_v, rpb = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    grads = neighborhood_backward(
        grad, grad_lse, q, k, v, out, lse, extra_k, extra_v, rpb, *ctx.rest
    )
    given = (q, k, v, extra_k, extra_v, rpb)
    kept = [None if x is None else g for x, g in zip(given, grads, strict=True)]
    return (*kept, *(None for _ in ctx.rest))


neighborhood.register_autograd(_backward, setup_context=_save)


def _refuse_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise NotImplementedError(
        "neighborhood attention has a batch axis of its own and is not mapped by vmap: "
        "put the mapped axis into the batch"
    )


neighborhood.register_vmap(_refuse_vmap)
neighborhood_backward.register_vmap(_refuse_vmap)
