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
from vistoken.kernels.routing_tiles import shared_limit
from vistoken.kernels.triton_neighborhood_launch import precision, rows_packed, wide
from vistoken.kernels.triton_routing_geometry import place
from vistoken.kernels.triton_routing_launch import strides

ROWS = 16
"""Regions whose lists one program finds."""

LOADS = 2048
"""Values of queries, and as many of keys, that a warp has on their way at once."""

MIN_TOGETHER = 2**17
"""Fewest values of an image's queries for lists by one launch: below, its ranking is too long."""

MIN_PROGRAMS = 64
"""Fewest programs of such a launch: with fewer, most of the GPU would read nothing."""

AHEAD = 2**15
"""Bytes of keys that a step of such a launch reads."""

SHARED_TOGETHER = 150 * 2**10
"""Shared memory that a GPU needs for it: three stages of keys and half as many of queries."""


@triton.jit(do_not_specialize=["nx", "ny", "size_x", "size_y", "regions", "heads", "key_heads"])
def _means(
    q_ptr, k_ptr, mean_q_ptr, mean_k_ptr, sqb, sqx, sqy, sqh, skb, skx, sky, skh,
    nx, ny, size_x, size_y, regions, heads, key_heads,
    D: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Means of `BR` regions over `BC` channels; queries and keys are on their way together."""
    region = tl.program_id(1) * BR + tl.arange(0, BR)
    channel, b = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(2).to(tl.int64)
    across = tl.cdiv(ny, size_y)
    from_x, from_y = region // across * size_x, region % across * size_y
    # Regions behind the last begin behind the map and have no rows.
    long, high = tl.minimum(size_y, ny - from_y), tl.minimum(size_x, nx - from_x)
    count = high * long
    some_q, some_k = channel < heads * D, channel < key_heads * D
    q_ptr += b * sqb + place(channel // D, channel % D, sqh, 1, WIDE)[None, None, :]
    k_ptr += b * skb + place(channel // D, channel % D, skh, 1, WIDE)[None, None, :]
    total_q, total_k = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
    for start in range(0, size_x * size_y, BT):
        nth = start + tl.arange(0, BT)[None, :]
        x = nth // long[:, None]
        y = nth - x * long[:, None] + from_y[:, None]
        x += from_x[:, None]
        there = (nth < count[:, None])[:, :, None]
        q = tl.load(q_ptr + place(x, y, sqx, sqy, WIDE)[:, :, None],
                    mask=there & some_q[None, None, :], other=0.0)  # fmt: skip
        k = tl.load(k_ptr + place(x, y, skx, sky, WIDE)[:, :, None],
                    mask=there & some_k[None, None, :], other=0.0)  # fmt: skip
        total_q += tl.sum(q.to(tl.float32), 1)
        total_k += tl.sum(k.to(tl.float32), 1)
    share = (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
    line, known = (b * regions + region)[:, None], (region < regions)[:, None]
    tl.store(mean_q_ptr + line * (heads * D) + channel[None, :], total_q * share,
             mask=known & some_q[None, :])  # fmt: skip
    tl.store(mean_k_ptr + line * (key_heads * D) + channel[None, :], total_k * share,
             mask=known & some_k[None, :])  # fmt: skip


@triton.jit
def _rank(score, list_ptr, own, other, h, b, regions, listed, BN: tl.constexpr):
    """Stores the best of each row in falling order, lower numbers first in ties."""
    # Score and number in one word: a row's best takes one maximum, and its removal one comparison.
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    word = (bits << 32) | (BN - 1 - other).to(tl.int64)[None, :]
    least = -0x7FFFFFFFFFFFFFFF
    word = tl.where((other < regions)[None, :], word, least)
    line = (b * tl.num_programs(1) + h).to(tl.int64) * regions
    list_ptr += (line + own) * listed
    for nth in range(0, listed):
        best = tl.max(word, 1)
        tl.store(list_ptr + nth, BN - 1 - (best & 0xFFFFFFFF).to(tl.int32), mask=own < regions)
        word = tl.where(word == best[:, None], least, word)


@triton.jit(do_not_specialize=["regions", "listed", "heads", "group"])
def _best(
    mean_q_ptr, mean_k_ptr, list_ptr, regions, listed, heads, group,
    PER_HEAD: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of `BR` regions with all, and the best of each row, lower numbers first in ties."""
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
    _rank(score, list_ptr, own, other, h, b, regions, listed, BN)


@triton.jit
def _corners(region, nx, ny, size_x, size_y, sx, sy, WIDE: tl.constexpr):
    """Where regions begin, and their rows and columns; those behind the last have no rows."""
    across = tl.cdiv(ny, size_y)
    x, y = region // across * size_x, region % across * size_y
    return place(x, y, sx, sy, WIDE), tl.minimum(size_x, nx - x), tl.minimum(size_y, ny - y)


@triton.jit(do_not_specialize=["nx", "ny", "size_x", "size_y", "regions", "listed", "heads",
                               "group", "steps"])  # fmt: skip
def _choose(
    q_ptr, k_ptr, list_ptr, sqb, sqx, sqy, sqh, skb, skx, sky, skh,
    nx, ny, size_x, size_y, regions, listed, heads, group, steps,
    PER_HEAD: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Means, scores and lists of `BR` regions; the means never leave the program."""
    own, h, b = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1), tl.program_id(2)
    other = tl.arange(0, BN)
    begin, end = 0, heads * D
    if PER_HEAD:
        begin, end = h * D, h * D + D
    at_q, high_q, long_q = _corners(own, nx, ny, size_x, size_y, sqx, sqy, WIDE)
    at_k, high_k, long_k = _corners(other, nx, ny, size_x, size_y, skx, sky, WIDE)
    q_ptr += b.to(tl.int64) * sqb + at_q[:, None]
    k_ptr += b.to(tl.int64) * skb + at_k[:, None]
    share_q = (1.0 / tl.maximum(high_q * long_q, 1).to(tl.float32))[:, None]
    share_k = (1.0 / tl.maximum(high_k * long_k, 1).to(tl.float32))[:, None]
    score = tl.zeros([BR, BN], tl.float32)
    total_q, total_k = tl.zeros([BR, BC], tl.float32), tl.zeros([BN, BC], tl.float32)
    # One loop over channels and tokens, so that the next values are always on their way.
    for turn in tl.range(0, tl.cdiv(end - begin, BC) * steps, num_stages=STAGES):
        channel = begin + turn // steps * BC + tl.arange(0, BC)
        some = (channel < end)[None, :]
        column_q = place(channel // D, channel % D, sqh, 1, WIDE)[None, :]
        column_k = place(channel // D // group, channel % D, skh, 1, WIDE)[None, :]
        # Tokens are unrolled, no axis of a tensor: sums stay inside of a thread.
        for nth in tl.static_range(BT):
            x = (turn % steps * BT + nth) // size_y
            y = turn % steps * BT + nth - x * size_y
            there_q = ((x < high_q) & (y < long_q))[:, None] & some
            there_k = ((x < high_k) & (y < long_k))[:, None] & some
            q = tl.load(q_ptr + place(x, y, sqx, sqy, WIDE) + column_q, mask=there_q, other=0.0)
            k = tl.load(k_ptr + place(x, y, skx, sky, WIDE) + column_k, mask=there_k, other=0.0)
            total_q += q.to(tl.float32)
            total_k += k.to(tl.float32)
        if turn % steps == steps - 1:
            score = tl.dot(total_q * share_q, tl.trans(total_k * share_k), score,
                           input_precision=PRECISION)  # fmt: skip
            total_q, total_k = tl.zeros([BR, BC], tl.float32), tl.zeros([BN, BC], tl.float32)
    _rank(score, list_ptr, own, other, h, b, regions, listed, BN)


def share(channels: int, tokens: int, regions: int) -> tuple[int, int, int]:
    """Regions, tokens of each and channels that one warp adds up, all powers of two."""
    whole = channels & -channels
    block_c = min(128, whole if whole >= 32 else triton.next_power_of_2(channels))
    block_t = min(triton.next_power_of_2(tokens), LOADS // block_c)
    return min(LOADS // block_c // block_t, triton.next_power_of_2(regions)), block_t, block_c


def together(channels: int, grid: Sides, regions: int, lines: int, limit: int | None) -> bool:
    """Whether one program reads a whole image for its lists, in one launch.

    Args:
        channels: of queries, of all heads or of one.
        grid: rows and columns.
        regions: of the map.
        lines: maps that get lists of their own: images, or images times heads.
        limit: shared memory of the GPU in bytes, or None where that is not known.
    """
    programs = lines * -(-regions // 32)
    enough = limit is None or limit >= SHARED_TOGETHER
    large = channels * math.prod(grid) >= MIN_TOGETHER
    return regions <= 64 and programs >= MIN_PROGRAMS and enough and large


def blocks(channels: int, tokens: int, regions: int, bytes_: int) -> dict[str, int]:
    """Own and other regions, tokens and channels of a step of `_choose`, its stages and warps."""
    other = max(16, triton.next_power_of_2(regions))
    block_c = max(16, min(128 // bytes_, triton.next_power_of_2(channels)))
    block_t = min(8, AHEAD // bytes_ // other // block_c, triton.next_power_of_2(tokens))
    return {"BR": min(32, other), "BN": other, "BT": block_t, "BC": block_c,
            "STAGES": 3, "num_warps": 8}  # fmt: skip


@on_device
def route(q: Tensor, k: Tensor, size: Sides, topk: int, per_head: bool) -> Tensor:
    """See `vistoken.kernels.routing_regions.route`."""
    q, k = rows_packed(q), rows_packed(k)
    batch, rows, columns, heads, dim = q.shape
    regions = math.prod(count_regions((rows, columns), size))
    lists = q.new_empty(batch, heads if per_head else 1, regions, min(topk, regions),
                        dtype=torch.int32)  # fmt: skip
    channels = dim if per_head else heads * dim
    lines = lists.shape[0] * lists.shape[1]
    if together(channels, (rows, columns), regions, lines, shared_limit(q.device)):
        choose_at_once(
            q, k, lists, size, blocks(channels, math.prod(size), regions, q.element_size())
        )
    else:
        choose_by_means(q, k, lists, size)
    return lists


def choose_at_once(q: Tensor, k: Tensor, lists: Tensor, size: Sides, block: dict[str, int]) -> None:
    """Fills lists in one launch: means never leave the program, and nothing waits for them."""
    batch, *grid, heads, dim = q.shape
    _, lines, regions, listed = lists.shape
    _choose[-(-regions // block["BR"]), lines, batch](
        q, k, lists, *strides(q), *strides(k), *grid, *size, regions, listed, heads,
        heads // k.shape[-2], -(-size[0] * size[1] // block["BT"]), PER_HEAD=lines > 1, D=dim,
        WIDE=wide(q, k), PRECISION=precision(4), **block,
    )  # fmt: skip


def choose_by_means(q: Tensor, k: Tensor, lists: Tensor, size: Sides) -> None:
    """Fills lists in two launches; all of the GPU reads, however few images there are."""
    batch, *grid, heads, dim = q.shape
    _, lines, regions, listed = lists.shape
    key_heads = k.shape[-2]
    mean_q = q.new_empty(batch, regions, heads * dim, dtype=torch.float32)
    mean_k = q.new_empty(batch, regions, key_heads * dim, dtype=torch.float32)
    block_r, block_t, block_c = share(heads * dim, size[0] * size[1], regions)
    _means[-(-heads * dim // block_c), -(-regions // block_r), batch](
        q, k, mean_q, mean_k, *strides(q), *strides(k), *grid, *size, regions, heads, key_heads,
        D=dim, BR=block_r, BT=block_t, BC=block_c, WIDE=wide(q, k), num_warps=1,
    )  # fmt: skip
    block = max(16, triton.next_power_of_2(regions))
    _best[-(-regions // ROWS), lines, batch](
        mean_q, mean_k, lists, regions, listed, heads, heads // key_heads,
        PER_HEAD=lines > 1, D=dim, BR=ROWS, BN=block, BC=32 if block <= 64 else 16,
        PRECISION=precision(4), num_warps=4,
    )  # fmt: skip


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
