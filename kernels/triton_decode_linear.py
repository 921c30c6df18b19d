"""Triton kernels of `decode_linear`: weights stream once, tiles of rows of W per program.

One row is multiplied and summed outside the tensor cores, which leaves the whole register file to
loads in flight. Two to sixteen rows share a `dot`. Where the hardware can start a launch before its
predecessor has ended, the first tile of weights is already on its way by then: weights never
change, so only x has to be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vistoken.kernels.decode_linear import RMS, Tile
from vistoken.kernels.dispatch import on_device


@triton.jit
def _select(start, n0, n1, a_ptr, b_ptr, c_ptr, PARTS: tl.constexpr):
    """The array that holds concatenated row `start`, and the row in it."""
    ptr = a_ptr
    row = start
    if PARTS > 1:
        if start >= n0 + n1:
            ptr = c_ptr
            row = start - n0 - n1
        elif start >= n0:
            ptr = b_ptr
            row = start - n0
    return ptr, row


@triton.jit
def _finish(
    y, second, inverse, b0, b1, BIAS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr
):
    """Scale of the norm, bias, gate."""
    if NORM:
        y = y * inverse
        second = second * inverse
    if BIAS:
        y += b0
        second += b1
    if GATED:
        y = y / (1 + tl.exp(-y)) * second
    return y


@triton.jit
def _vector(
    x_ptr, gain_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, residual_ptr, out_ptr,
    width, n0, n1, total, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N results of one row x."""
    start = tl.program_id(0) * BLOCK_N
    w_ptr, row = _select(start, n0, n1, w0_ptr, w1_ptr, w2_ptr, PARTS)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (start + n < total)[:, None]
    offset = (row + n).to(tl.int64)[:, None] * width + k[None, :]
    some = inside & (k < width)[None, :]
    w = tl.load(w_ptr + offset, mask=some, other=0.0, eviction_policy="evict_first")
    if GATED:
        v = tl.load(w1_ptr + offset, mask=some, other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, width, BLOCK_K):
        here = begin + k < width
        x = tl.load(x_ptr + begin + k, mask=here, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(gain_ptr + begin + k, mask=here, other=0.0).to(tl.float32)
        # The next tile is on its way while this one is multiplied.
        offset += BLOCK_K
        some = inside & (begin + BLOCK_K + k < width)[None, :]
        w_next = tl.load(w_ptr + offset, mask=some, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * x[None, :]
        w = w_next
        if GATED:
            v_next = tl.load(w1_ptr + offset, mask=some, other=0.0, eviction_policy="evict_first")
            gate += v.to(tl.float32) * x[None, :]
            v = v_next
    inverse = 1.0
    if NORM:
        inverse = tl.rsqrt(tl.sum(squares) / width + eps)
    y = tl.sum(acc, 1)
    second = y
    if GATED:
        second = tl.sum(gate, 1)
    mask = start + n < total
    bias, bias1 = y, y
    if BIAS:
        b_ptr, row = _select(start, n0, n1, b0_ptr, b1_ptr, b2_ptr, PARTS)
        bias = tl.load(b_ptr + row + n, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            bias1 = tl.load(b1_ptr + row + n, mask=mask, other=0.0).to(tl.float32)
    y = _finish(y, second, inverse, bias, bias1, BIAS, NORM, GATED)
    if RESIDUAL:
        y += tl.load(residual_ptr + start + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + n, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _matrix(
    x_ptr, gain_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, residual_ptr, out_ptr,
    rows, width, n0, n1, total, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N results of each of up to ROWS rows of x."""
    start = tl.program_id(0) * BLOCK_N
    w_ptr, row = _select(start, n0, n1, w0_ptr, w1_ptr, w2_ptr, PARTS)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, ROWS)
    inside = (start + n < total)[:, None]
    offset = (row + n).to(tl.int64)[:, None] * width + k[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    gate = tl.zeros([BLOCK_N, ROWS], tl.float32)
    # Summed over columns once, at the end: a sum per step would stop all warps in every step.
    squares = tl.zeros([BLOCK_K, ROWS], tl.float32)
    for begin in range(0, width, BLOCK_K):
        here = begin + k < width
        mask = here[:, None] & (r < rows)[None, :]
        x = tl.load(x_ptr + r[None, :] * width + begin + k[:, None], mask=mask, other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += wide * wide
            gain = tl.load(gain_ptr + begin + k, mask=here, other=0.0).to(tl.float32)
            x = (wide * gain[:, None]).to(x.dtype)
        some = inside & here[None, :]
        w = tl.load(w_ptr + offset, mask=some, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if GATED:
            v = tl.load(w1_ptr + offset, mask=some, other=0.0, eviction_policy="evict_first")
            gate = tl.dot(v, x, gate, input_precision="ieee")
        offset += BLOCK_K
    inverse = tl.rsqrt(tl.sum(squares, 0) / width + eps)[None, :]
    mask = start + n < total
    bias, bias1 = acc, acc
    if BIAS:
        b_ptr, row = _select(start, n0, n1, b0_ptr, b1_ptr, b2_ptr, PARTS)
        bias = tl.load(b_ptr + row + n, mask=mask, other=0.0).to(tl.float32)[:, None]
        if GATED:
            bias1 = tl.load(b1_ptr + row + n, mask=mask, other=0.0).to(tl.float32)[:, None]
    y = _finish(acc, gate, inverse, bias, bias1, BIAS, NORM, GATED)
    at = r[None, :] * total + start + n[:, None]
    both = mask[:, None] & (r < rows)[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=both, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=both)


@on_device
def decode_linear_triton(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    norm: RMS | None,
    residual: Tensor | None,
    gated: bool,
    tile: Tile,
) -> Tensor:
    """`decode_linear` in one launch; see there."""
    batch, width = x.shape
    columns = max(16, min(tile.columns, triton.next_power_of_2(width)))
    counts = [weight.shape[0] for weight in weights]
    total = counts[0] if gated else sum(counts)
    out = x.new_empty(batch, total)
    w = [*weights, *[weights[0]] * (3 - len(weights))]
    b = [*biases, *[biases[0]] * (3 - len(biases))] if biases is not None else [x] * 3
    gain, eps = norm if norm is not None else (x, 0.0)
    parts = 1 if gated else len(weights)
    options = {"num_warps": tile.warps, **({"launch_pdl": True} if tile.early else {})}
    arrays = (x, gain, *w, *b, x if residual is None else residual, out)
    flags = {
        "NORM": norm is not None, "BIAS": biases is not None, "RESIDUAL": residual is not None,
        "GATED": gated, "PARTS": parts, "BLOCK_N": tile.rows, "BLOCK_K": columns, "PDL": tile.early,
    }  # fmt: skip
    sizes = (width, counts[0], counts[1] if parts > 2 else total - counts[0], total, eps)
    grid = (triton.cdiv(total, tile.rows),)
    if batch == 1:
        _vector[grid](*arrays, *sizes, **flags, **options)
    else:
        _matrix[grid](*arrays, batch, *sizes, **flags, ROWS=16, num_stages=tile.stages, **options)
    return out
