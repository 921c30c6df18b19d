"""Residual, LayerScale, reduction and the next norm in one operator, with its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.dispatch import ANY, as_op, trains, use_triton
from vistoken.kernels.reduce import (
    add_into,
    largest_norm,
    merge,
    merge_gradient,
    reduce_tokens,
    rescale,
    slot_of,
    take,
)

SCHEMA = (
    "(Tensor x, Tensor? branch, Tensor? gamma, Tensor? keep, Tensor? src, Tensor? dst, "
    "Tensor? weight, Tensor? gain, str rule, Tensor? size, Tensor norm_weight, "
    "Tensor norm_bias, float eps) -> (Tensor, Tensor, Tensor)"
)

Rule = Literal["mean", "sum", "mlerp"]
"""How members join: `mean` by weight, `sum` by weight, or `mlerp`: direction of the mean, length of
the longest member (ToFu, Kim et al., WACV 2024)."""


@dataclass(frozen=True)
class Slots:
    """Where tokens go, and how members weigh; the tensors of an `Assignment`.

    Attributes:
        keep: `[B, M]` int64.
        src: `[B, S]` int64 or None.
        dst: `[B, S]` int64 or None.
        weight: `[B, N]` fp32 or None.
        gain: `[B, S]` fp32 or None.
        rule: how members join.
    """

    keep: Tensor
    src: Tensor | None = None
    dst: Tensor | None = None
    weight: Tensor | None = None
    gain: Tensor | None = None
    rule: Rule = "mean"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in order."""
        return self.keep, self.src, self.dst, self.weight, self.gain

    @property
    def lengthens(self) -> bool:
        """Whether slots get the length of their longest member."""
        return self.rule == "mlerp" and self.src is not None


Norm = tuple[Tensor, Tensor, float]
"""Weight `[C]`, bias `[C]` and eps of a LayerNorm."""


def add_reduce_norm(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    slots: Slots | None,
    size: Tensor | None,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`y = reduce(x + gamma * branch)`, `LayerNorm(y)` and the slots' sizes.

    Args:
        x: residual stream `[B, N, C]`, contiguous.
        branch: what the branch adds, `[B, N, C]` contiguous, or None.
        gamma: LayerScale `[C]`, or None.
        slots: the reduction; None keeps every token.
        size: token sizes `[B, N]` fp32; None is all ones.
        norm: the LayerNorm that follows.

    Returns:
        y `[B, M, C]`, its norm `[B, M, C]`, sizes `[B, M]` fp32 or None while nothing was merged.
    """
    weighs = () if slots is None else (slots.weight, slots.gain)
    learns = trains(x, branch, gamma, size, norm[0], norm[1], *weighs)
    # The operator has no gradient of lengths.
    if not use_triton(x) or (learns and slots is not None and slots.lengthens):
        return add_reduce_norm_reference(x, branch, gamma, slots, size, norm)
    if as_op(x) or learns:
        fields = (None,) * 5 if slots is None else slots.tensors
        rule = "mean" if slots is None else slots.rule
        y, h, total = add_reduce_norm_op(x, branch, gamma, *fields, rule, size, *norm)
        return y, h, total if _sizes_change(slots, size) else size
    from vistoken.kernels.triton_chain import add_reduce_norm_triton

    return add_reduce_norm_triton(x, branch, gamma, slots, size, norm)


def add_reduce_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    slots: Slots | None,
    size: Tensor | None,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`add_reduce_norm` in torch operators."""
    if branch is not None:
        x = x + (branch if gamma is None else branch * gamma)
    if slots is not None:
        if slots.src is None or slots.dst is None:
            x, size = take(x, slots.keep), None if size is None else take(size, slots.keep)
        else:
            if size is None:
                size = x.new_ones(x.shape[:2], dtype=torch.float32)
            joined = take(size, slots.src)
            joined = joined if slots.gain is None else joined * slots.gain
            size = add_into(take(size, slots.keep), slots.dst, joined)
            x = _joined(x, slots)
    weight, bias, eps = norm
    return x, F.layer_norm(x, (x.shape[-1],), weight, bias, eps), size


def reduce_slots(x: Tensor, slots: Slots) -> Tensor:
    """Tokens `[B, N, C]` to slots `[B, M, C]`: in one launch where there is a kernel.

    Compilers and autograd see the torch operators.
    """
    if not slots.lengthens:
        into = slots.keep, slots.src, slots.dst
        return reduce_tokens(x, *into, slots.weight, slots.rule != "sum")
    if use_triton(x, ANY) and not torch.compiler.is_compiling() and not trains(x, slots.weight):
        from vistoken.kernels.triton_chain import add_reduce_norm_triton

        return add_reduce_norm_triton(x, None, None, slots, None, None)[0]
    return _joined(x, slots)


def _joined(x: Tensor, slots: Slots) -> Tensor:
    """`reduce_slots` of merged tokens in torch operators."""
    assert slots.src is not None and slots.dst is not None
    into = slots.keep, slots.src, slots.dst
    joined = merge(x, *into, slots.weight, slots.rule != "sum")
    return rescale(joined, largest_norm(x, *into)) if slots.lengthens else joined


def _sizes_change(slots: Slots | None, size: Tensor | None) -> bool:
    """Whether the sizes after the reduction are other than those before."""
    return slots is not None and (slots.src is not None or size is not None)


@torch.library.custom_op("vistoken::add_reduce_norm", mutates_args=(), schema=SCHEMA)
def add_reduce_norm_op(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    src: Tensor | None,
    dst: Tensor | None,
    weight: Tensor | None,
    gain: Tensor | None,
    rule: str,
    size: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_reduce_norm` on plain arguments; sizes that stay are not returned again but empty."""
    slots = None if keep is None else Slots(keep, src, dst, weight, gain, cast(Rule, rule))
    norm = (norm_weight, norm_bias, eps)
    if use_triton(x):
        from vistoken.kernels.triton_chain import add_reduce_norm_triton

        y, h, total = add_reduce_norm_triton(x, branch, gamma, slots, size, norm)
    else:
        y, h, total = add_reduce_norm_reference(x, branch, gamma, slots, size, norm)
        y = y.clone() if y is x else y
    if total is None or not _sizes_change(slots, size):
        total = x.new_empty(0, dtype=torch.float32)
    return y, h, total


@add_reduce_norm_op.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    src: Tensor | None,
    dst: Tensor | None,
    weight: Tensor | None,
    gain: Tensor | None,
    rule: str,
    size: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    slots = None if keep is None else Slots(keep, src)
    batch, tokens, width = x.shape
    y = x.new_empty(batch, tokens if keep is None else keep.shape[1], width)
    shape = y.shape[:2] if _sizes_change(slots, size) else (0,)
    return y, torch.empty_like(y), x.new_empty(shape, dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, rule, size, norm_weight, norm_bias, eps = inputs
    if rule == "mlerp" and tensors[4] is not None:
        raise RuntimeError("vistoken::add_reduce_norm has no gradient of rule='mlerp'")
    ctx.save_for_backward(*tensors, size, norm_weight, norm_bias, output[0])
    ctx.normalize, ctx.eps = rule != "sum", eps
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, to_y: Tensor | None, to_h: Tensor | None, to_sizes: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments, gathered: every token feeds one slot at most."""
    x, branch, gamma, keep, src, dst, weight, gain, size, scale, shift, y = ctx.saved_tensors
    to_scale = to_shift = None
    if to_h is not None:
        shape = [y.shape[-1]]
        _, mean, spread = torch.native_layer_norm(y, shape, scale, shift, ctx.eps)
        through, to_scale, to_shift = torch.ops.aten.native_layer_norm_backward(
            to_h.contiguous(), y, shape, mean, spread, scale, shift, [True, True, True]
        )
        to_y = through if to_y is None else to_y + through
    grad = torch.zeros_like(y) if to_y is None else to_y

    z = x
    if branch is not None and weight is not None:
        z = x + (branch if gamma is None else branch * gamma)
    to_weight = to_size = to_gain = None
    if keep is not None and src is not None:
        args = (keep, src, dst, weight, ctx.normalize)
        grad, to_weight = merge_gradient(grad, z, y, *args)
    elif keep is not None:
        parent = slot_of(keep, None, None, x.shape[1])
        grad = take(grad, parent.clamp_min(0)) * (parent >= 0)[..., None]
    if to_sizes is not None and keep is not None and to_sizes.dim() == 2:
        parent = slot_of(keep, src, dst, x.shape[1])
        to_size = take(to_sizes, parent.clamp_min(0)) * (parent >= 0)
        if gain is not None:
            members = 1.0 if size is None else take(size, src)
            to_gain = take(to_sizes, dst) * members
            to_size = to_size * torch.ones_like(to_size).scatter(1, src, gain.to(to_size.dtype))

    to_branch = grad if gamma is None else grad * gamma
    to_gamma = None if gamma is None or branch is None else (grad * branch).sum((0, 1))
    given = (x, branch, gamma, weight, gain, size)
    found = (grad, to_branch, to_gamma, to_weight, to_gain, to_size)
    to_x, to_branch, to_gamma, to_weight, to_gain, to_size = (
        None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, given, strict=True)
    )
    indices = (None,) * 3
    return (
        to_x, to_branch, to_gamma, *indices, to_weight, to_gain, None, to_size, to_scale, to_shift,
        None,
    )  # fmt: skip


add_reduce_norm_op.register_autograd(_gradients, setup_context=_remember)
