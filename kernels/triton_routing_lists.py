"""Lists of regions: means and scores of regions, the best of each row, and the inverse lists.

Torch takes ten launches and more for each; together they would cost as much as the attention.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import on_device
from vistoken.kernels.routing_regions import Sides, count_regions
from vistoken.kernels.triton_neighborhood_launch import precision, rows_packed, wide
from vistoken.kernels.triton_routing_geometry import place
from vistoken.kernels.triton_routing_launch import strides

CHANNELS = 512
"""Channels whose sums a program holds at once."""

ROWS = 16
"""Regions whose lists one program finds."""


@triton.jit
def _mean(
    x_ptr, mean_ptr, first, end, stride_x, stride_y, stride_h, from_x, from_y, high, long,
    D: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Means over one region of the channels `[first, end)`."""
    channel = first + tl.arange(0, BC)
    kept = channel < end
    offset = place(channel // D, channel % D, stride_h, 1, WIDE)
    total = tl.zeros([BC], tl.float32)
    for start in range(0, high * long, BT):
        nth = start + tl.arange(0, BT)
        x = nth // long
        token = place(from_x + x, from_y + nth - x * long, stride_x, stride_y, WIDE)
        mask = (nth < high * long)[:, None] & kept[None, :]
        values = tl.load(x_ptr + token[:, None] + offset[None, :], mask=mask, other=0.0)
        total += tl.sum(values.to(tl.float32), 0)
    tl.store(mean_ptr + channel, total / (high * long), mask=kept)


@triton.jit(do_not_specialize=["nx", "ny", "size_x", "size_y", "heads", "key_heads"])
def _means(
    q_ptr, k_ptr, mean_q_ptr, mean_k_ptr, sqb, sqx, sqy, sqh, skb, skx, sky, skh,
    nx, ny, size_x, size_y, heads, key_heads,
    D: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    region, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    across = tl.cdiv(ny, size_y)
    from_x, from_y = region // across * size_x, region % across * size_y
    high, long = tl.minimum(size_x, nx - from_x), tl.minimum(size_y, ny - from_y)
    line = b * tl.num_programs(0) + region
    _mean(q_ptr + b * sqb, mean_q_ptr + line * (heads * D), part * BC, heads * D, sqx, sqy, sqh,
          from_x, from_y, high, long, D, BT, BC, WIDE)  # fmt: skip
    if part * BC < key_heads * D:
        _mean(k_ptr + b * skb, mean_k_ptr + line * (key_heads * D), part * BC, key_heads * D,
              skx, sky, skh, from_x, from_y, high, long, D, BT, BC, WIDE)  # fmt: skip


@triton.jit(do_not_specialize=["regions", "listed", "heads", "group"])
def _best(
    mean_q_ptr, mean_k_ptr, list_ptr, regions, listed, heads, group,
    PER_HEAD: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    own, h, b = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1), tl.program_id(2)
    other = tl.arange(0, BN)
    begin, end = 0, heads * D
    if PER_HEAD:
        begin, end = h * D, h * D + D
    mean_q_ptr += b.to(tl.int64) * regions * heads * D
    mean_k_ptr += b.to(tl.int64) * regions * (heads // group) * D
    score = tl.zeros([BR, BN], tl.float32)
    for start in range(begin, end, BC):
        channel = start + tl.arange(0, BC)
        kept = (channel < end)[None, :]
        at = own[:, None] * (heads * D) + channel[None, :]
        q = tl.load(mean_q_ptr + at, mask=kept & (own < regions)[:, None], other=0.0)
        channel = channel // D // group * D + channel % D
        at = other[:, None] * (heads // group * D) + channel[None, :]
        k = tl.load(mean_k_ptr + at, mask=kept & (other < regions)[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), score, input_precision=PRECISION)
    score = tl.where((other < regions)[None, :], score, float("-inf"))
    line = (b * tl.num_programs(1) + h).to(tl.int64) * regions
    list_ptr += (line + own) * listed
    for nth in range(0, listed):
        best = tl.argmax(score, 1)
        tl.store(list_ptr + nth, best, mask=own < regions)
        score = tl.where(other[None, :] == best[:, None], float("-inf"), score)


@on_device
def route(q: Tensor, k: Tensor, size: Sides, topk: int, per_head: bool) -> Tensor:
    """See `vistoken.kernels.routing_regions.route`."""
    q, k = rows_packed(q), rows_packed(k)
    batch, *grid, heads, dim = q.shape
    key_heads = k.shape[-2]
    regions = math.prod(count_regions((grid[0], grid[1]), size))
    mean_q = q.new_empty(batch, regions, heads * dim, dtype=torch.float32)
    mean_k = q.new_empty(batch, regions, key_heads * dim, dtype=torch.float32)
    channels = min(CHANNELS, triton.next_power_of_2(heads * dim))
    tokens = min(triton.next_power_of_2(size[0] * size[1]), max(1, 4096 // channels))
    _means[regions, -(-heads * dim // channels), batch](
        q, k, mean_q, mean_k, *strides(q), *strides(k), *grid, *size, heads, key_heads,
        D=dim, BT=tokens, BC=channels, WIDE=wide(q, k), num_warps=4,
    )  # fmt: skip
    lists = q.new_empty(batch, heads if per_head else 1, regions, min(topk, regions),
                        dtype=torch.int32)  # fmt: skip
    block = max(16, triton.next_power_of_2(regions))
    _best[-(-regions // ROWS), lists.shape[1], batch](
        mean_q, mean_k, lists, regions, lists.shape[-1], heads, heads // key_heads,
        PER_HEAD=per_head, D=dim, BR=ROWS, BN=block, BC=32 if block <= 64 else 16,
        PRECISION=precision(4), num_warps=4,
    )  # fmt: skip
    return lists


@triton.jit(do_not_specialize=["entries", "listed", "total"])
def _invert(
    list_ptr, count_ptr, ids_ptr, start_ptr, entries, listed, total,
    COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Who lists one region: the entries with its number, behind those of lower regions."""
    region, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    list_ptr += line * entries
    ids_ptr += line * entries
    count_ptr += line * (entries // listed)
    begin, found = 0, 0
    for start in range(0, entries, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < entries
        if COUNTED:
            there &= at % listed < tl.load(count_ptr + at // listed, mask=there, other=0)
        id = tl.load(list_ptr + at, mask=there, other=-1)
        begin += tl.sum(((id >= 0) & (id < region)).to(tl.int32), 0)
    for start in range(0, entries, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < entries
        if COUNTED:
            there &= at % listed < tl.load(count_ptr + at // listed, mask=there, other=0)
        hit = tl.load(list_ptr + at, mask=there, other=-1) == region
        place_ = begin + found + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(ids_ptr + place_, at // listed, mask=hit)
        found += tl.sum(hit.to(tl.int32), 0)
    start_ptr += line * (total + 1)
    tl.store(start_ptr + region, begin)
    if region == total - 1:
        tl.store(start_ptr + total, begin + found)


@on_device
def inverse_lists(index: Tensor, counts: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
    """See `vistoken.kernels.routing_regions.inverse_lists`; ids behind the last are not written."""
    batch, heads, regions, listed = index.shape
    ids = torch.empty_like(index).flatten(2)
    starts = index.new_empty(batch, heads, total + 1)
    entries = regions * listed
    block = min(1024, triton.next_power_of_2(entries))
    _invert[total, batch * heads](
        index, index if counts is None else counts.contiguous(), ids, starts, entries, listed,
        total, COUNTED=counts is not None, BLOCK=block, num_warps=1,
    )  # fmt: skip
    return ids, starts
