"""Triton kernels of `prefill`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import on_device

ROWS = 32
"""Tokens per program, of one head."""

BLOCK = 2048


@triton.jit
def _rotate_and_store(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, length, capacity,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One head of q, k or v, ROWS tokens of one batch entry, by halves of the head."""
    head = tl.program_id(1)
    entry = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (token < length)[:, None] & (d < HALF)[None, :]
    row = entry * length + token
    if head < H:
        ptr = q_ptr + (row * H + head)[:, None] * (2 * HALF) + d[None, :]
    elif head < H + G:
        ptr = k_ptr + (row * G + head - H)[:, None] * (2 * HALF) + d[None, :]
    else:
        ptr = v_ptr + (row * G + head - H - G)[:, None] * (2 * HALF) + d[None, :]
    first = tl.load(ptr, mask=mask)
    second = tl.load(ptr + HALF, mask=mask)
    if head < H + G:
        table = row[:, None] * (2 * HALF) + d[None, :]
        cos = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * cos - b * sin).to(first.dtype)
        second = (b * cos + a * sin).to(second.dtype)
    if head >= H:
        group = (head - H) % G
        cell = (entry * G + group) * capacity + token
        at = cell[:, None] * (2 * HALF) + d[None, :]
        ptr = key_ptr + at
        if head >= H + G:
            ptr = value_ptr + at
    tl.store(ptr, first, mask=mask)
    tl.store(ptr + HALF, second, mask=mask)


@triton.jit
def _silu_times(gate_ptr, up_ptr, count, BLOCK: tl.constexpr):
    """In place of the gate."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    tl.store(gate_ptr + at, (x / (1 + tl.exp(-x)) * up).to(gate.dtype), mask=mask)


@on_device
def rotate_and_store_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
) -> None:
    """See `vistoken.kernels.prefill.rotate_and_store`."""
    batch, length, heads, dim = q.shape
    groups, half = k.shape[2], dim // 2
    grid = (triton.cdiv(length, ROWS), heads + 2 * groups, batch)
    _rotate_and_store[grid](
        q, k, v, cos, sin, keys, values, length, keys.shape[2],
        H=heads, G=groups, HALF=half, BLOCK_D=triton.next_power_of_2(half), ROWS=ROWS,
    )  # fmt: skip


@on_device
def silu_times_triton(gate: Tensor, up: Tensor) -> Tensor:
    """See `vistoken.kernels.prefill.silu_times`; the result takes the place of gate."""
    count = gate.numel()
    _silu_times[(triton.cdiv(count, BLOCK),)](gate, up, count, BLOCK=BLOCK)
    return gate
