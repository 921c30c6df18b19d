"""Attention through lists: a region of queries attends the regions, or blocks, that it lists.

The token-to-token step of bi-level routing attention (BiFormer, Zhu et al., CVPR 2023, arXiv
2303.08810) and its general form over blocks of a sequence. Keys and values are read where they lie,
never gathered. The operators are torch custom operators: they compile without a graph break,
export, and can be captured in CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistoken.errors import ConfigError
from vistoken.kernels import routing_ops as ops
from vistoken.kernels.dispatch import autocasts
from vistoken.kernels.routing_regions import Routing, Sides, count_regions

PADS = ("mask", "attend")


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    region_size: int | Sequence[int],
    scale: float | None = None,
    pad_keys: str = "mask",
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    distinct: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every region's queries over the tokens of the regions it lists.

    Regions are numbered row by row. Where their size does not divide the grid, the last ones are
    ragged.

    Args:
        q: queries `[B, X, Y, H, D]`, any float type and any strides.
        k: keys `[B, X, Y, Hk, D]`, Hk a divisor of H; head h reads key head `h // (H // Hk)`.
        v: values `[B, X, Y, Hk, Dv]`.
        index: regions to attend `[B, R, K]`, or `[B, H, R, K]` for lists of every head, integers; B
            and H may be 1. Numbers outside `0 .. R - 1` are skipped; a region listed twice counts
            twice.
        region_size: rows and columns of a region, one number or two.
        scale: softmax scale, `D ** -0.5` by default.
        pad_keys: `mask`, or `attend` to have ragged regions filled up with zero keys and values
            that take part in the softmax.
        additional_keys: `[B, E, Hk, D]`, keys that every query attends besides its regions.
        additional_values: `[B, E, Hk, Dv]`.
        return_lse: also return the natural logarithm of the softmax sums, `[B, X, Y, H]` in
            float32 (float64 for float64); it carries gradients.
        distinct: the caller's word that no list has a region twice, as those of `route`; small maps
            are faster with it, and wrong where it does not hold. Values of a region that are not
            finite then reach queries that do not list it, too.

    Returns:
        `[B, X, Y, H, Dv]` in the type of q, contiguous; with `return_lse` a pair. Queries without
        keys give zeros, and minus infinity.

    Raises:
        ConfigError: a ValueError, when an argument does not fit the others.
    """
    _check_tensors(5, q, k, v, additional_keys, additional_values)
    if additional_keys is not None and additional_keys.shape[1] == 0:
        additional_keys = additional_values = None
    if q.shape[1:3] != k.shape[1:3]:
        raise ConfigError(f"k has grid {tuple(k.shape[1:3])}; q has {tuple(q.shape[1:3])}")
    grid = q.shape[1], q.shape[2]
    size = two("region_size", region_size)
    if size[0] > grid[0] or size[1] > grid[1]:
        raise ConfigError(f"region_size={size}: must be at most the grid, {grid}")
    if pad_keys not in PADS:
        raise ConfigError(f"pad_keys={pad_keys!r}: must be one of {PADS}")
    index = _check_index(index, q, math.prod(count_regions(grid, size)))
    routing = Routing(size, size, pad_keys == "attend", False)
    given = q, k, v, index, None, additional_keys, additional_values, routing, scale
    out, lse = _attend(*given, distinct)
    return (out, lse) if return_lse else out


def block_list_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    block: int | Sequence[int] = 64,
    counts: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of blocks of queries over listed blocks of keys, along one axis.

    Args:
        q: queries `[B, N, H, D]`, any float type and any strides.
        k: keys `[B, M, Hk, D]`, Hk a divisor of H; head h reads key head `h // (H // Hk)`.
        v: values `[B, M, Hk, Dv]`.
        index: key blocks of every query block `[B, R, K]`, or `[B, H, R, K]` for lists of every
            head, integers, with R blocks of queries; B and H may be 1. Numbers that are no block
            are skipped; a block listed twice counts twice.
        block: tokens of a block, one number or (queries, keys). The last blocks may be shorter.
        counts: `[B, R]` or `[B, H, R]`, how many leading entries of each list count; None is all.
        is_causal: queries attend no later key; the last query and the last key coincide.
        scale: softmax scale, `D ** -0.5` by default.
        return_lse: also return the natural logarithm of the softmax sums, `[B, N, H]` in float32
            (float64 for float64); it carries gradients.

    Returns:
        `[B, N, H, Dv]` in the type of q, contiguous; with `return_lse` a pair. Queries without keys
        give zeros, and minus infinity.

    Raises:
        ConfigError: a ValueError, when an argument does not fit the others.
    """
    _check_tensors(4, q, k, v, None, None)
    if not isinstance(is_causal, bool):
        raise ConfigError(f"is_causal={is_causal!r}: must be True or False")
    sizes = two("block", block)
    index = _check_index(index, q, -(-q.shape[1] // sizes[0]))
    if counts is not None:
        counts = counts[:, None] if counts.dim() == 2 else counts
        if counts.is_floating_point() or tuple(counts.shape) != tuple(index.shape[:3]):
            raise ConfigError(
                f"counts is {counts.dtype} {tuple(counts.shape)}; it must be integers in the shape "
                f"of index without its last axis, {tuple(index.shape[:3])}"
            )
        counts = counts.to(q.device, torch.int32)
    routing = Routing((1, sizes[0]), (1, sizes[1]), False, is_causal)
    q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    out, lse = (x.squeeze(1) for x in _attend(q, k, v, index, counts, None, None, routing, scale))
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, counts: Tensor | None,
    extra_k: Tensor | None, extra_v: Tensor | None, routing: Routing, scale: float | None,
    distinct: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v, extra_k, extra_v = _autocast(q, k, v, extra_k, extra_v)
    if scale <= 0:
        # The kernels take the largest raw score for the largest scaled one.
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    out, lse = ops.routed(
        q, k, v, index, counts, extra_k, extra_v,
        list(routing.q_size), list(routing.k_size), routing.pads, routing.causal, scale,
        distinct,
    )  # fmt: skip
    return out, lse


def two(name: str, value: int | Sequence[int]) -> Sides:
    """One positive number, or two, as two.

    Raises:
        ConfigError: anything else.
    """
    sides = (value, value) if isinstance(value, int) else tuple(value)
    ok = len(sides) == 2 and all(isinstance(s, int) and not isinstance(s, bool) for s in sides)
    if not ok or min(sides) < 1:
        raise ConfigError(f"{name}={value!r}: must be a positive number, or two of them")
    return sides[0], sides[1]


def _autocast(q: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All tensors in the autocast type, where one is active."""
    kind = q.device.type
    if not autocasts(kind) or q.dtype == torch.float64:
        return (q, *others)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if x is None else x.to(dtype) for x in (q, *others))


def _check_index(index: Tensor, q: Tensor, regions: int) -> Tensor:
    """The lists as int32 `[B or 1, H or 1, R, K]`."""
    if index.dim() not in (3, 4) or index.is_floating_point() or index.dtype == torch.bool:
        raise ConfigError(
            f"index is {index.dtype} with {index.dim()} axes; it must be integers [B, R, K] or "
            "[B, H, R, K]"
        )
    if index.device != q.device:
        raise ConfigError(f"index is on {index.device}, but q is on {q.device}")
    index = index[:, None] if index.dim() == 3 else index
    batch, heads, found, listed = index.shape
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[-2]):
        raise ConfigError(
            f"index is for {batch} images and {heads} heads; it must be for 1 or all of the "
            f"{q.shape[0]} images and 1 or all of the {q.shape[-2]} heads"
        )
    if found != regions or listed < 1:
        raise ConfigError(
            f"index has {found} lists of {listed} entries; there are {regions} regions of queries, "
            "and a list has one entry at least"
        )
    if index.dtype == torch.int64:
        index = index.clamp(-1, torch.iinfo(torch.int32).max)  # Else large numbers wrap to regions.
    return index.to(torch.int32).contiguous()


def _check_tensors(
    rank: int, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None
) -> None:
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if x.is_nested or x.layout != torch.strided:
            raise NotImplementedError(f"{name} is nested or sparse; only strided tensors are taken")
        if x.dim() != rank:
            axes = "B, X, Y, H, D" if rank == 5 else "B, N, H, D"
            raise ConfigError(f"{name} has {x.dim()} axes; it must have {rank}: {axes}")
    if (extra_k is None) != (extra_v is None):
        raise ConfigError("additional_keys and additional_values must be given together")
    if extra_k is not None and extra_v is not None:
        named |= {"additional_keys": extra_k, "additional_values": extra_v}
        for name, x, like in (("additional_keys", extra_k, k), ("additional_values", extra_v, v)):
            want = (q.shape[0], extra_k.shape[1] if extra_k.dim() == 4 else "E", *like.shape[-2:])
            if tuple(x.shape) != want:
                raise ConfigError(f"{name} has shape {tuple(x.shape)}; expected {want}")
    for name, x in named.items():
        if x.device != q.device or x.dtype != q.dtype:
            raise ConfigError(
                f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}"
            )
    if not q.is_floating_point():
        raise ConfigError(f"q is {q.dtype}; attention needs a floating type")
    if k.shape[0] != q.shape[0] or v.shape[:-1] != k.shape[:-1]:
        raise ConfigError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}: they "
            "need one batch size, and k and v the same tokens and heads"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ConfigError(f"k is {k.shape[-1]} wide; it needs the width of q, {q.shape[-1]}")
    if q.shape[-2] % k.shape[-2]:
        raise ConfigError(f"q has {q.shape[-2]} heads, no multiple of the {k.shape[-2]} of k")
