"""Farthest-first order with one launch per picked vector.

One program per image would need a single launch, but also read all vectors through a single
multiprocessor at every step; this way a step reads them at the speed of the whole GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import on_device, packed

ROWS, COLUMNS = 8, 512
"""Vectors of one program, and how much of them it holds at once."""


@on_device
def farthest_first_triton(x: Tensor, first: Tensor, count: int) -> Tensor:
    """See `vistoken.kernels.farthest.farthest_first`; `first` is an index `[1]`."""
    x = packed(x)
    tokens, width = x.shape
    blocks = triton.cdiv(tokens, ROWS)
    inverse = x.float().norm(dim=-1).clamp(min=1e-12).reciprocal()
    nearest = inverse.new_full((tokens,), float("-inf"))
    # What every program found best: read by the next step, while that writes to the other half.
    worth = inverse.new_full((2, blocks), float("inf"))
    place = torch.zeros(2, blocks, dtype=torch.int64, device=x.device)
    worth[0, :1] = -2.0
    place[0, :1] = first
    picks = place.new_empty(count)
    for step in range(count):
        _step[(blocks,)](
            x, inverse, nearest, worth, place, picks, tokens, width, x.stride(0), step,
            ROWS=ROWS, COLUMNS=COLUMNS, BLOCKS=blocks, PARTS=triton.next_power_of_2(blocks),
            num_warps=4,
        )  # fmt: skip
    return picks


@triton.jit(do_not_specialize=["tokens", "step"])
def _step(
    x_ptr, inverse_ptr, nearest_ptr, worth_ptr, place_ptr, pick_ptr, tokens, width, stride, step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Pick number `step`, and how near all vectors of this program then are to a picked one.

    Grid (blocks,). x `[N, C]`; inverse, nearest `[N]`; worth, place `[2, blocks]`; pick `[count]`.
    """
    block = tl.program_id(0)
    old, new = (step % 2) * BLOCKS, ((step + 1) % 2) * BLOCKS
    part = tl.arange(0, PARTS)
    worth = tl.load(worth_ptr + old + part, mask=part < BLOCKS, other=float("inf"))
    place = tl.load(place_ptr + old + part, mask=part < BLOCKS, other=0)
    least = tl.min(worth, 0)
    pick = tl.min(tl.where((worth == least) & (part < BLOCKS), place, tokens - 1), 0)
    if block == 0:
        tl.store(pick_ptr + step, pick)
    rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = rows < tokens
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        mine = tl.load(
            x_ptr + rows[:, None] * stride + column, mask=real[:, None] & inside, other=0.0
        )
        it = tl.load(x_ptr + pick * stride + column, mask=inside, other=0.0)
        total += mine.to(tl.float32) * it.to(tl.float32)[None, :]
    like = tl.sum(total, 1) * tl.load(inverse_ptr + rows, mask=real, other=0.0)
    like = like * tl.load(inverse_ptr + pick)
    like = tl.where(like == like, like, 2.0)  # a NaN is picked last
    nearest = tl.maximum(tl.load(nearest_ptr + rows, mask=real, other=0.0), like)
    nearest = tl.where((rows == pick) | ~real, float("inf"), nearest)
    tl.store(nearest_ptr + rows, nearest, mask=real)
    best = tl.min(nearest, 0)
    tl.store(worth_ptr + new + block, best)
    tl.store(place_ptr + new + block, tl.min(tl.where(nearest == best, rows, tokens - 1), 0))
