"""Residual, LayerScale, reduction and the next norm in one pass over the tokens.

For every output slot one program adds the branch to the residual stream, averages the slot's
members in fp32, writes the reduced stream and its LayerNorm. Each input is read once and each
output written once; members are added in a fixed order, so results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.chain import Norm, Slots
from vistoken.kernels.dispatch import on_device, packed


@on_device
def add_reduce_norm_triton(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    slots: Slots | None,
    size: Tensor | None,
    norm: Norm | None,
    warps: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `vistoken.kernels.chain.add_reduce_norm`; without a norm the second is the first."""
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    batch, tokens, width = x.shape
    merges = slots is not None and slots.src is not None
    slots_out = tokens if slots is None else slots.keep.shape[1]
    y = x.new_empty(batch, slots_out, width)
    h = y if norm is None else torch.empty_like(y)
    sized = merges or (size is not None and slots is not None)
    size_out = x.new_empty(batch, slots_out, dtype=torch.float32) if sized else size
    weight, bias, eps = (x, x, 0.0) if norm is None else norm
    sources = slots.src.shape[1] if slots is not None and slots.src is not None else 0

    parts = (None,) * 5 if slots is None else _fields(slots)
    rows = [x if part is None else packed(part) for part in (*parts, size)]
    block = triton.next_power_of_2(width)
    _add_reduce_norm[(slots_out, batch)](
        x, x if branch is None else branch, x if gamma is None else gamma, *rows,
        weight, bias, y, h, x if size_out is None else size_out,
        *(row.stride(0) for row in rows),
        tokens, slots_out, sources, width, eps,
        BRANCH=branch is not None, GAMMA=gamma is not None, INDEXED=slots is not None,
        MERGES=merges, WEIGHTED=slots is not None and slots.weight is not None,
        GAIN=slots is not None and slots.gain is not None,
        NORMALIZE=slots is None or slots.rule != "sum",
        LENGTHENS=slots is not None and slots.lengthens, SIZED=size is not None, SIZE_OUT=sized,
        NORM=norm is not None, BLOCK_C=block, BLOCK_S=max(16, triton.next_power_of_2(sources)),
        num_warps=warps or (1 if block <= 512 else 2 if block <= 1024 else 4),
    )  # fmt: skip
    return y, h, size_out


def reduce_tokens_triton(
    x: Tensor,
    keep: Tensor,
    src: Tensor | None,
    dst: Tensor | None,
    weight: Tensor | None,
    normalize: bool,
) -> Tensor:
    """See `vistoken.kernels.reduce.reduce_tokens`."""
    slots = Slots(keep, src, dst, weight, None, "mean" if normalize else "sum")
    return add_reduce_norm_triton(x, None, None, slots, None, None)[0]


def _fields(slots: Slots) -> tuple[Tensor | None, ...]:
    """The tensors of slots in the kernel's order."""
    return slots.keep, slots.src, slots.dst, slots.weight, slots.gain


COUNTS = ["tokens", "slots", "sources"]
ROWS = [f"{name}_row" for name in ("keep", "src", "dst", "weight", "gain", "size")]
POINTERS = [f"{name}_ptr" for name in ("keep", "src", "dst", "weight", "gain", "size")]


# Counts differ from block to block: a kernel for each kind of them would only cost start-up time.
@triton.jit(do_not_specialize=COUNTS + ROWS, do_not_specialize_on_alignment=POINTERS)
def _add_reduce_norm(
    x_ptr, branch_ptr, gamma_ptr, keep_ptr, src_ptr, dst_ptr, weight_ptr, gain_ptr, size_ptr,
    norm_weight_ptr, norm_bias_ptr, y_ptr, h_ptr, size_out_ptr,
    keep_row, src_row, dst_row, weight_row, gain_row, size_row,
    tokens, slots, sources, width, eps,
    BRANCH: tl.constexpr, GAMMA: tl.constexpr, INDEXED: tl.constexpr, MERGES: tl.constexpr,
    WEIGHTED: tl.constexpr, GAIN: tl.constexpr, NORMALIZE: tl.constexpr, LENGTHENS: tl.constexpr,
    SIZED: tl.constexpr, SIZE_OUT: tl.constexpr, NORM: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    slot, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < width
    token = tl.load(keep_ptr + b * keep_row + slot) if INDEXED else slot.to(tl.int64)
    at = (b * tokens + token) * width + c
    value = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GAMMA:
        gamma = tl.load(gamma_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        add = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        value += add * gamma if GAMMA else add
    if SIZE_OUT:
        size = tl.full([], 1.0, tl.float32)
        if SIZED:
            size = tl.load(size_ptr + b * size_row + token)
    if MERGES:
        s = tl.arange(0, BLOCK_S)
        share = tl.full([], 1.0, tl.float32)
        if WEIGHTED:
            share = tl.load(weight_ptr + b * weight_row + token).to(tl.float32)
        total = value * share
        if LENGTHENS:
            longest = tl.sum(value * value, 0)
        joins = tl.load(dst_ptr + b * dst_row + s, mask=s < sources, other=-1) == slot
        members = tl.sum(joins.to(tl.int32), 0)
        last = -1
        for _ in range(members):
            # The next source of this slot in order; most slots have none.
            last = tl.min(tl.where(joins & (s > last), s, BLOCK_S), 0)
            member = tl.load(src_ptr + b * src_row + last)
            w = tl.full([], 1.0, tl.float32)
            if WEIGHTED:
                w = tl.load(weight_ptr + b * weight_row + member).to(tl.float32)
            from_ = (b * tokens + member) * width + c
            row = tl.load(x_ptr + from_, mask=inside, other=0.0).to(tl.float32)
            if BRANCH:
                adds = tl.load(branch_ptr + from_, mask=inside, other=0.0).to(tl.float32)
                row += adds * gamma if GAMMA else adds
            total += row * w
            if LENGTHENS:
                longest = tl.maximum(longest, tl.sum(row * row, 0))
            share += w
            brings = tl.full([], 1.0, tl.float32)
            if SIZED:
                brings = tl.load(size_ptr + b * size_row + member)
            if GAIN:
                brings *= tl.load(gain_ptr + b * gain_row + last)
            size += brings
        value = total / share if NORMALIZE else total
        if LENGTHENS:
            length = tl.sqrt(tl.sum(value * value, 0))
            value *= tl.sqrt(longest) / tl.maximum(length, 1e-12)
    if SIZE_OUT:
        tl.store(size_out_ptr + b * slots + slot, size)
    out = (b * slots + slot) * width + c
    rounded = value.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + out, rounded, mask=inside)
    if NORM:
        value = tl.where(inside, rounded.to(tl.float32), 0.0)
        mean = tl.sum(value, 0) / width
        centred = tl.where(inside, value - mean, 0.0)
        spread = tl.sum(centred * centred, 0) / width
        norm = centred * (1.0 / tl.sqrt(spread + eps))
        norm = norm * tl.load(norm_weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
        norm += tl.load(norm_bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(h_ptr + out, norm.to(h_ptr.dtype.element_ty), mask=inside)
