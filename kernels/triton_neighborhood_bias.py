"""Gradient of the relative position bias.

All batch entries share their geometry. A program therefore fixes a tile of queries and one walked
tile of keys, sums the score gradients of that pair over its share of the batch in registers, and
writes them once, as `[*grid, H, window]`. What is left is small: window places become table places.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import on_device
from vistoken.kernels.neighborhood_windows import Neighborhood
from vistoken.kernels.triton_neighborhood_geometry import (
    bounds,
    box,
    column_word,
    coordinates,
    far,
    load_rows,
    members,
    place,
    reciprocal,
    related,
    step,
    visible,
)
from vistoken.kernels.triton_neighborhood_launch import LOG2E, SIZES, plan, strides, wide

PROGRAMS = 1024
"""About as many programs as fill a large GPU; the batch is shared out until there are so many."""


@triton.jit(do_not_specialize=[*SIZES, "group", "batch", "shares", "most"])
def _bias(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, rpb_ptr, part_ptr,
    sqb, sqx, sqy, sqz, sqh, skb, skx, sky, skz, skh, svb, svx, svy, svz, svh,
    sgb, sgx, sgy, sgz, sgh,
    nx, ny, nz, wx, wy, wz, jx, jy, jz, dx, dy, dz, tx, ty, tz, heads, group, batch, shares, most,
    scale2,
    RANK: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr, CZ: tl.constexpr,
    STRIDED: tl.constexpr, DILATED: tl.constexpr,
    TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr, BM: tl.constexpr,
    KX: tl.constexpr, KY: tl.constexpr, KZ: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ONE_BAND: tl.constexpr, WIDE: tl.constexpr,
    HEAD_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, rx, ry, rz, ix, iy, iz = place(dx, dy, dz, ty, tz, DILATED, RANK, HEAD_FIRST)
    share, t = b // most, (b % most).to(tl.int32)
    lx, ly = members(nx, dx, rx, DILATED), members(ny, dy, ry, DILATED)
    lz = members(nz, dz, rz, DILATED)
    x0, y0, z0 = ix * TX, iy * TY, iz * TZ
    if DILATED:  # noqa: SIM102 (a constexpr condition must stand alone)
        if (x0 >= lx) | (y0 >= ly) | (z0 >= lz):
            return
    bx, ex = box(x0, lx, wx, jx, TX, CX, STRIDED, False)
    by, ey = box(y0, ly, wy, jy, TY, CY, STRIDED, False)
    bz, ez = box(z0, lz, wz, jz, TZ, CZ, STRIDED, False)
    steps_y, steps_z = tl.cdiv(ey - by, KY).to(tl.int32), tl.cdiv(ez - bz, KZ).to(tl.int32)
    inverse_y, inverse_z = reciprocal(steps_y), reciprocal(steps_z)
    if t >= tl.cdiv(ex - bx, KX) * steps_y * steps_z:
        return
    dims = tl.arange(0, BLOCK_D)
    px, py, pz = coordinates(tl.arange(0, BM), TX, TY, TZ, BM, RANK)
    px, py, pz = px + x0, py + y0, pz + z0
    inside = visible(px, py, pz, lx, ly, lz, RANK)
    px, py, pz = tl.minimum(px, lx - 1), tl.minimum(py, ly - 1), tl.minimum(pz, lz - 1)
    low_x, high_x = bounds(px, lx, wx, jx, CX, STRIDED, False)
    low_y, high_y = bounds(py, ly, wy, jy, CY, STRIDED, False)
    low_z, high_z = bounds(pz, lz, wz, jz, CZ, STRIDED, False)
    cx, cy, cz = coordinates(tl.arange(0, BN), KX, KY, KZ, BN, RANK)
    bits = column_word(cx, cy, cz, KX, KY, KZ, RANK)
    ox, oy, oz = step(
        t, bx, by, bz, steps_y, steps_z, inverse_y, inverse_z, KX, KY, KZ, RANK, ONE_BAND
    )
    seen = visible(cx, cy, cz, ex - ox, ey - oy, ez - oz, RANK)
    ok = related(low_x, high_x, low_y, high_y, low_z, high_z, ox, oy, oz, cx, cy, cz, bits,
                 KX, KY, KZ, RANK)  # fmt: skip
    table_y, table_z = 2 * wy - 1, 2 * wz - 1
    own = ((px - wx + 1) * table_y + py - wy + 1) * table_z + pz - wz + 1
    at = ((cx + ox) * table_y + cy + oy) * table_z + cz + oz
    rpb_ptr += h * (2 * wx - 1) * table_y * table_z
    bias = tl.load(rpb_ptr + (at[None, :] - own[:, None]), mask=ok, other=0.0).to(tl.float32)
    bias = tl.where(ok, bias * 1.4426950408889634, float("-inf"))

    qx, qy, qz = px * dx + rx, py * dy + ry, pz * dz + rz
    kx, ky, kz = (cx + ox) * dx + rx, (cy + oy) * dy + ry, (cz + oz) * dz + rz
    hk = h // group
    if WIDE:
        qx, qy, qz, kx, ky, kz = far(qx), far(qy), far(qz), far(kx), far(ky), far(kz)
        h, hk = far(h), far(hk)
    row = ((qx * ny + qy) * nz + qz) * heads + h
    q_offset = qx * sqx + qy * sqy + qz * sqz + h * sqh
    g_offset = qx * sgx + qy * sgy + qz * sgz + h * sgh
    k_offset = kx * skx + ky * sky + kz * skz + hk * skh
    v_offset = kx * svx + ky * svy + kz * svz + hk * svh
    total = tl.zeros([BM, BN], tl.float32)
    for b in range(share, batch, shares):
        q = load_rows(q_ptr + b * sqb, q_offset, inside, dims, D, BLOCK_D)
        k = load_rows(k_ptr + b * skb, k_offset, seen, dims, D, BLOCK_D)
        grad = load_rows(grad_ptr + b * sgb, g_offset, inside, dims, D, BLOCK_D)
        v = load_rows(v_ptr + b * svb, v_offset, seen, dims, D, BLOCK_D)
        first = b * nx * ny * nz * heads
        norm = tl.load(lse_ptr + first + row, mask=inside, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + first + row, mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        total += tl.exp2(score - norm[:, None] + bias) * (dp - delta[:, None])
    place_x, place_y, place_z = cx + ox, cy + oy, cz + oz
    slot = (place_x[None, :] - low_x[:, None]) * wy + place_y[None, :] - low_y[:, None]
    slot = slot * wz + place_z[None, :] - low_z[:, None]
    line = (share * nx * ny * nz * heads + row) * (wx * wy * wz)
    tl.store(part_ptr + line[:, None] + slot, total, mask=ok & inside[:, None])


@on_device
def bias_gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    hood: Neighborhood,
    scale: float,
    rpb: Tensor,
) -> Tensor:
    """Gradient of `rpb [H, 2w - 1, ...]`."""
    batch, *grid, heads, _ = q.shape
    launch = plan(q, hood, "query")
    programs = launch.tiles * launch.groups * launch.steps * heads
    shares = min(batch, max(1, PROGRAMS // programs))
    part = q.new_empty(shares, *grid, heads, math.prod(hood.window), dtype=torch.float32)
    _bias[launch.programs(shares * launch.steps, heads)](
        q, k, v, grad, lse, delta, rpb.contiguous(), part,
        *strides(q), *strides(k), *strides(v), *strides(grad),
        *launch.sizes, heads, heads // k.shape[-2], batch, shares, launch.steps, scale * LOG2E,
        WIDE=wide(q, k, v, grad), **launch.constants,
    )  # fmt: skip
    return from_windows(part.sum(0), hood).to(rpb.dtype)


def from_windows(part: Tensor, hood: Neighborhood) -> Tensor:
    """Sums `[*grid, H, prod(window)]` by window place, as a table `[H, 2w - 1, ...]`.

    Products with one-hot matrices add in a fixed order, which index addition would not.
    """
    rank = len(hood.window)
    grid = part.shape[:rank]
    part = part.unflatten(-1, hood.window)
    for axis in range(rank):
        w = hood.window[axis]
        first = first_key_minus_query(grid[axis], w, hood.stride[axis], hood.dilation[axis], part)
        places = first[:, None] + torch.arange(w, device=part.device) + w - 1
        hot = places[..., None] == torch.arange(2 * w - 1, device=part.device)
        # The axis itself is first; its window is behind the open axes and the heads.
        part = torch.tensordot(part, hot.to(part.dtype), dims=([0, rank - axis + 1], [0, 1]))
    return part


def first_key_minus_query(length: int, window: int, stride: int, d: int, like: Tensor) -> Tensor:
    """For every position of an axis, computed on the device: captured graphs copy nothing."""
    position = torch.arange(length, device=like.device)
    own, group = position // d, position % d
    members = (length - group + d - 1) // d
    leader = torch.minimum(own // stride * stride + stride // 2, members - 1)
    return torch.minimum((leader - window // 2).clamp(min=0), members - window) - own
