"""Neighborhood attention in one, two and three dimensions: a query attends the window around it.

Names and semantics are those of NATTEN 0.21 (Hassani et al., arXiv 2204.07143 and 2504.16922), plus
the relative position bias that the published NAT and DiNAT models need. The operators are torch
custom operators: they compile without a graph break, export, and can be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.errors import ConfigError
from vistoken.kernels import neighborhood_ops as ops
from vistoken.kernels.dispatch import autocasts
from vistoken.kernels.neighborhood_windows import check_axes, per_axis

Ints = int | Sequence[int]
Bools = bool | Sequence[bool]


def na1d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a window of a sequence `[B, L, H, D]`; arguments as in `na2d`."""
    return _attend(1, q, k, v, kernel_size, stride, dilation, is_causal, scale,
                   additional_keys, additional_values, rpb, return_lse)  # fmt: skip


def na2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a window of a feature map (NATTEN 0.21's `na2d`, with `rpb` added).

    Args:
        q: queries `[B, X, Y, H, D]`, any float type and any strides.
        k: keys `[B, X, Y, Hk, D]`, Hk a divisor of H; head h reads key head `h // (H // Hk)`.
        v: values `[B, X, Y, Hk, Dv]`.
        kernel_size: keys per axis, one number or one per axis. Borders move windows inwards.
        stride: queries per axis that share the window of their leader, 1 to `kernel_size`.
        dilation: distance of neighboring keys of a window; `dilation * kernel_size` must fit.
        is_causal: axes on which a query attends no later key.
        scale: softmax scale, `D ** -0.5` by default.
        additional_keys: `[B, E, Hk, D]`, keys that every query attends besides its window.
        additional_values: `[B, E, Hk, Dv]`.
        rpb: `[H, 2 * wx - 1, 2 * wy - 1]`, added to the scaled score of query i and key j at
            `j - i + w - 1` on each axis (counted in steps of the dilation).
        return_lse: also return the natural logarithm of the softmax sums, `[B, X, Y, H]` in
            float32 (float64 for float64); it carries gradients.

    Returns:
        `[B, X, Y, H, Dv]` in the type of q, contiguous; with `return_lse` a pair.

    Raises:
        ConfigError: a ValueError, when an argument does not fit the others.
    """
    return _attend(2, q, k, v, kernel_size, stride, dilation, is_causal, scale,
                   additional_keys, additional_values, rpb, return_lse)  # fmt: skip


def na3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a window of a volume `[B, X, Y, Z, H, D]`; arguments as in `na2d`."""
    return _attend(3, q, k, v, kernel_size, stride, dilation, is_causal, scale,
                   additional_keys, additional_values, rpb, return_lse)  # fmt: skip


def _attend(
    rank: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    is_causal: Bools,
    scale: float | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    rpb: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    _check_tensors(rank, q, k, v, extra_k, extra_v)
    if extra_k is not None and extra_k.shape[1] == 0:
        extra_k = extra_v = None
    window = per_axis("kernel_size", kernel_size, rank, int)
    steps = per_axis("stride", stride, rank, int)
    spread = per_axis("dilation", dilation, rank, int)
    causal = per_axis("is_causal", is_causal, rank, bool)
    check_axes(q.shape[1:-2], window, steps, spread)
    _check_bias(rpb, q, window, any(causal))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v, extra_k, extra_v = _autocast(q, k, v, extra_k, extra_v)
    whole = all(w == n for w, n in zip(window, q.shape[1:-2], strict=True))
    if whole and rpb is None and not any(causal) and not return_lse:
        return _dense(q, k, v, scale, extra_k, extra_v)
    if scale <= 0:
        # The kernels take the largest raw score for the largest scaled one.
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    out, lse = ops.neighborhood(
        q, k, v, extra_k, extra_v, rpb, list(window), list(steps), list(spread), list(causal), scale
    )
    return (out, lse) if return_lse else out


def _dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, extra_k: Tensor | None, extra_v: Tensor | None
) -> Tensor:
    """Full attention, which a window as long as every axis is."""
    keys, values = k.flatten(1, -3), v.flatten(1, -3)
    if extra_k is not None and extra_v is not None:
        keys, values = torch.cat([keys, extra_k], 1), torch.cat([values, extra_v], 1)
    out = F.scaled_dot_product_attention(
        q.flatten(1, -3).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        scale=scale,
        enable_gqa=q.shape[-2] != k.shape[-2],
    )
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


def _autocast(q: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All tensors in the autocast type, where one is active."""
    kind = q.device.type
    if not autocasts(kind) or q.dtype == torch.float64:
        return (q, *others)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if x is None else x.to(dtype) for x in (q, *others))


def _check_tensors(
    rank: int, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None
) -> None:
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if x.is_nested or x.layout != torch.strided:
            raise NotImplementedError(f"{name} is nested or sparse; only strided tensors are taken")
        if x.dim() != rank + 3:
            raise ConfigError(
                f"{name} has {x.dim()} axes; na{rank}d takes {rank + 3}: B, grid, H, D"
            )
    if (extra_k is None) != (extra_v is None):
        raise ConfigError("additional_keys and additional_values must be given together")
    if extra_k is not None and extra_v is not None:
        named |= {"additional_keys": extra_k, "additional_values": extra_v}
        if extra_k.dim() != 4 or extra_v.dim() != 4:
            raise ConfigError("additional_keys and additional_values must be [B, E, Hk, D]")
        for name, x, like in (
            ("additional_keys", extra_k, k),
            ("additional_values", extra_v, v),
        ):
            want = (q.shape[0], extra_k.shape[1], *like.shape[-2:])
            if tuple(x.shape) != want:
                raise ConfigError(f"{name} has shape {tuple(x.shape)}; expected {want}")
    for name, x in named.items():
        if x.device != q.device or x.dtype != q.dtype:
            raise ConfigError(
                f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}"
            )
    if not q.is_floating_point():
        raise ConfigError(f"q is {q.dtype}; neighborhood attention needs a floating type")
    if k.shape[:-2] != q.shape[:-2] or v.shape[:-2] != q.shape[:-2]:
        raise ConfigError(
            f"q, k and v must have the same batch and grid, not {tuple(q.shape[:-2])}, "
            f"{tuple(k.shape[:-2])} and {tuple(v.shape[:-2])}"
        )
    if k.shape[-1] != q.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ConfigError(
            f"k has heads and width {tuple(k.shape[-2:])}; it needs the heads of v, "
            f"{v.shape[-2]}, and the width of q, {q.shape[-1]}"
        )
    if q.shape[-2] % k.shape[-2]:
        raise ConfigError(f"q has {q.shape[-2]} heads, no multiple of the {k.shape[-2]} of k")


def _check_bias(rpb: Tensor | None, q: Tensor, window: Sequence[int], causal: bool) -> None:
    if rpb is None:
        return
    want = (q.shape[-2], *(2 * w - 1 for w in window))
    if tuple(rpb.shape) != want:
        raise ConfigError(f"rpb has shape {tuple(rpb.shape)}; expected {want}: H, 2 * window - 1")
    if rpb.device != q.device or not rpb.is_floating_point():
        raise ConfigError(f"rpb is {rpb.dtype} on {rpb.device}; it must be a float on {q.device}")
    if causal:
        raise ConfigError("rpb is not defined together with is_causal")
