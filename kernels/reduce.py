"""Applying an assignment: gather the kept tokens, add the merged ones into their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.dispatch import ANY, trains, use_triton


def reduce_tokens(
    x: Tensor,
    keep: Tensor,
    src: Tensor | None,
    dst: Tensor | None,
    weight: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """`take`, or `merge` where tokens merge: in one launch where there is a kernel.

    Arguments as for `merge`; compilers and autograd see the torch operators.
    """
    if use_triton(x, ANY) and not torch.compiler.is_compiling() and not trains(x, weight):
        from vistoken.kernels.triton_chain import reduce_tokens_triton

        return reduce_tokens_triton(x.contiguous(), keep, src, dst, weight, normalize)
    if src is None or dst is None:
        return take(x, keep)
    return merge(x, keep, src, dst, weight, normalize)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x at `index`.

    Args:
        x: `[B, N]` or `[B, N, C]`.
        index: `[B, M]` int64.

    Returns:
        `[B, M]` or `[B, M, C]`.
    """
    if x.dim() == 2:
        return x.gather(1, index)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def add_into(base: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """`base [B, M(, C)]` plus `values [B, S(, C)]` added at `slots [B, S]`."""
    if base.dim() == 3:
        slots = slots[..., None].expand_as(values)
    return base.scatter_add(1, slots, values)


def merge(
    x: Tensor,
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    weight: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Weighted mean (or sum) of each kept token with the tokens merged into it.

    Args:
        x: tokens `[B, N, C]`.
        keep: `[B, M]` index of the token that opens each slot.
        src: `[B, S]` index of the tokens merged away.
        dst: `[B, S]` slot that each of them joins.
        weight: `[B, N]` weight of every token; None weighs all alike.
        normalize: divide by the slot's total weight.

    Returns:
        `[B, M, C]` in the dtype of x; sums are kept in fp32 (fp64 for fp64).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    kept, merged = take(x, keep).to(wide), take(x, src).to(wide)
    if weight is None:
        total = kept.new_ones(keep.shape)
        joined = kept.new_ones(src.shape)
    else:
        total, joined = take(weight, keep).to(wide), take(weight, src).to(wide)
        kept, merged = kept * total[..., None], merged * joined[..., None]
    out = add_into(kept, dst, merged)
    if normalize:
        out = out / add_into(total, dst, joined)[..., None]
    return out.to(x.dtype)


def slot_of(keep: Tensor, src: Tensor | None, dst: Tensor | None, tokens: int) -> Tensor:
    """The slot that every token went into, `[B, tokens]`; -1 where it went nowhere."""
    slots = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    parent = keep.new_full((keep.shape[0], tokens), -1).scatter(1, keep, slots)
    return parent if src is None or dst is None else parent.scatter(1, src, dst)


def merge_gradient(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    weight: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `merge` to x and weight, given that of its result y `[B, M, C]`.

    Every token feeds one slot at most, so they are gathered, never added up.

    Returns:
        `[B, N, C]` in fp32 (fp64 for fp64), and `[B, N]` or None without a weight.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parent = slot_of(keep, src, dst, x.shape[1])
    fed, slot = parent >= 0, parent.clamp_min(0)
    spread = take(grad, slot).to(wide) * fed[..., None]
    share = spread.new_ones(parent.shape) if weight is None else weight.to(wide)
    if normalize:
        total = add_into(take(share, keep), dst, take(share, src))
        spread = spread / take(total, slot)[..., None]
    to_weight = None
    if weight is not None:
        excess = x.to(wide) - take(y, slot).to(wide) if normalize else x.to(wide)
        to_weight = (spread * excess).sum(-1)
    return spread * share[..., None], to_weight


def largest_norm(x: Tensor, keep: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    """Largest Euclidean norm among the members of each slot, `[B, M]` in fp32 or fp64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = x.to(wide).norm(dim=-1)
    return take(norm, keep).scatter_reduce(1, dst, take(norm, src), "amax")


def rescale(x: Tensor, length: Tensor) -> Tensor:
    """Tokens `[B, M, C]` brought to the Euclidean norms `length [B, M]`; zero vectors stay zero."""
    own = x.to(length.dtype).norm(dim=-1).clamp_min(1e-12)
    scaled: Tensor = x * (length / own)[..., None]
    return scaled.to(x.dtype)
