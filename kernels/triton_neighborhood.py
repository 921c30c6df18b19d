"""Fused neighborhood attention: a program keeps a tile of queries and walks the box of its keys.

Softmax runs online in powers of two; the scale joins the exponent, so besides the exponential a
score costs one test of its mask bits and one fused multiply-add.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import on_device
from vistoken.kernels.neighborhood_tiles import Tile
from vistoken.kernels.neighborhood_trust import sound_tile
from vistoken.kernels.neighborhood_windows import Neighborhood
from vistoken.kernels.triton_neighborhood_geometry import (
    bounds,
    box,
    column_word,
    coordinates,
    corner,
    far,
    load_rows,
    members,
    offsets,
    place,
    reciprocal,
    related,
    step,
    store_rows,
    visible,
)
from vistoken.kernels.triton_neighborhood_launch import (
    LOG2E,
    SIZES,
    extras,
    plan,
    rows_packed,
    strides,
    wide,
)


@triton.jit
def add_keys(score, top, total, acc, v, gain, BOUNDED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the softmax; masked scores are minus infinity, `top` never is."""
    if BOUNDED:
        p = tl.exp2(score * gain)
        total += tl.sum(p, 1)
    else:
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score * gain - (new_top * gain)[:, None])
        fade = tl.exp2((top - new_top) * gain)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        top = new_top
    return top, total, tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)


@triton.jit
def attend(
    q, k_ptr, v_ptr, extra_k_ptr, extra_v_ptr, rpb_ptr, own,
    low_x, high_x, low_y, high_y, low_z, high_z, bx, ex, by, ey, bz, ez,
    skx, sky, skz, svx, svy, svz, sen, sfn, wy, wz, extra, scale2,
    RANK: tl.constexpr, EXTRA: tl.constexpr, RPB: tl.constexpr, BM: tl.constexpr,
    KX: tl.constexpr, KY: tl.constexpr, KZ: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ONE_BAND: tl.constexpr, PRECISION: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Largest score, softmax sum and weighted values of a tile's queries over the box of keys.

    Where `BOUNDED`, exponentials are summed as they are, which saves the running maximum; the
    caller looks at the sums and repeats the walk where they left the safe range.
    """
    dims = tl.arange(0, BLOCK_D)
    steps_y, steps_z = tl.cdiv(ey - by, KY).to(tl.int32), tl.cdiv(ez - bz, KZ).to(tl.int32)
    inverse_y, inverse_z = reciprocal(steps_y), reciprocal(steps_z)
    steps = tl.cdiv(ex - bx, KX).to(tl.int32) * steps_y * steps_z
    cx, cy, cz = coordinates(tl.arange(0, BN), KX, KY, KZ, BN, RANK)
    bits = column_word(cx, cy, cz, KX, KY, KZ, RANK)
    k_offset = offsets(cx, cy, cz, skx, sky, skz, RANK, False)
    v_offset = offsets(cx, cy, cz, svx, svy, svz, RANK, False)
    table_y, table_z = 2 * wy - 1, 2 * wz - 1
    column = (cx * table_y + cy) * table_z + cz
    gain = 1.0 if RPB else scale2

    top = tl.full([BM], 0.0 if BOUNDED else -1.0e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    if EXTRA > 0:
        for start in range(0, extra, EXTRA):
            nth = start + tl.arange(0, EXTRA)
            k = load_rows(extra_k_ptr, nth * sen, nth < extra, dims, D, BLOCK_D)
            v = load_rows(extra_v_ptr, nth * sfn, nth < extra, dims, D, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if RPB:
                score *= scale2
            score = tl.where((nth < extra)[None, :], score, float("-inf"))
            top, total, acc = add_keys(score, top, total, acc, v, gain, BOUNDED, PRECISION)
    for t in range(0, steps):
        ox, oy, oz = step(
            t, bx, by, bz, steps_y, steps_z, inverse_y, inverse_z, KX, KY, KZ, RANK, ONE_BAND
        )
        seen = visible(cx, cy, cz, ex - ox, ey - oy, ez - oz, RANK)
        corner_k = offsets(ox, oy, oz, skx, sky, skz, RANK, False)
        k = load_rows(k_ptr + corner_k, k_offset, seen, dims, D, BLOCK_D)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        ok = related(low_x, high_x, low_y, high_y, low_z, high_z, ox, oy, oz, cx, cy, cz, bits,
                     KX, KY, KZ, RANK)  # fmt: skip
        if RPB:
            slot = (ox * table_y + oy) * table_z + oz + column
            bias = tl.load(rpb_ptr + (slot[None, :] - own[:, None]), mask=ok, other=0.0)
            score = score * scale2 + bias.to(tl.float32) * 1.4426950408889634
        score = tl.where(ok, score, float("-inf"))
        corner_v = offsets(ox, oy, oz, svx, svy, svz, RANK, False)
        v = load_rows(v_ptr + corner_v, v_offset, seen, dims, D, BLOCK_D)
        top, total, acc = add_keys(score, top, total, acc, v, gain, BOUNDED, PRECISION)
    return top * gain, total, acc


@triton.jit(do_not_specialize=[*SIZES, "extra", "group"])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, extra_k_ptr, extra_v_ptr, rpb_ptr,
    sqb, sqx, sqy, sqz, sqh, skb, skx, sky, skz, skh, svb, svx, svy, svz, svh,
    seb, sen, seh, sfb, sfn, sfh,
    nx, ny, nz, wx, wy, wz, jx, jy, jz, dx, dy, dz, tx, ty, tz, heads, group, extra, scale2,
    RANK: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr, CZ: tl.constexpr,
    STRIDED: tl.constexpr, DILATED: tl.constexpr, EXTRA: tl.constexpr, RPB: tl.constexpr,
    TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr, BM: tl.constexpr,
    KX: tl.constexpr, KY: tl.constexpr, KZ: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ONE_BAND: tl.constexpr, WIDE: tl.constexpr,
    HEAD_FIRST: tl.constexpr, PRECISION: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    b, h, rx, ry, rz, ix, iy, iz = place(dx, dy, dz, ty, tz, DILATED, RANK, HEAD_FIRST)
    lx, ly, lz = (
        members(nx, dx, rx, DILATED),
        members(ny, dy, ry, DILATED),
        members(nz, dz, rz, DILATED),
    )
    x0, y0, z0 = ix * TX, iy * TY, iz * TZ
    if DILATED:  # noqa: SIM102 (a constexpr condition must stand alone)
        if (x0 >= lx) | (y0 >= ly) | (z0 >= lz):
            return
    dims = tl.arange(0, BLOCK_D)
    px, py, pz = coordinates(tl.arange(0, BM), TX, TY, TZ, BM, RANK)
    px, py, pz = px + x0, py + y0, pz + z0
    inside = visible(px, py, pz, lx, ly, lz, RANK)
    px, py, pz = tl.minimum(px, lx - 1), tl.minimum(py, ly - 1), tl.minimum(pz, lz - 1)
    low_x, high_x = bounds(px, lx, wx, jx, CX, STRIDED, False)
    low_y, high_y = bounds(py, ly, wy, jy, CY, STRIDED, False)
    low_z, high_z = bounds(pz, lz, wz, jz, CZ, STRIDED, False)
    bx, ex = box(x0, lx, wx, jx, TX, CX, STRIDED, False)
    by, ey = box(y0, ly, wy, jy, TY, CY, STRIDED, False)
    bz, ez = box(z0, lz, wz, jz, TZ, CZ, STRIDED, False)

    gx, gy, gz = px, py, pz
    if DILATED:
        gx, gy, gz = px * dx + rx, py * dy + ry, pz * dz + rz
    head = far(h) if WIDE else h
    own_q = offsets(gx, gy, gz, sqx, sqy, sqz, RANK, WIDE)
    q = load_rows(q_ptr + b * sqb + head * sqh, own_q, inside, dims, D, BLOCK_D)
    row = offsets(gx, gy, gz, ny * nz * heads, nz * heads, heads, RANK, WIDE) + h
    entry = b * (nx * ny * nz) * heads
    hk = h // group
    k_ptr += b * skb + corner(hk, rx, ry, rz, skh, skx, sky, skz, WIDE)
    v_ptr += b * svb + corner(hk, rx, ry, rz, svh, svx, svy, svz, WIDE)
    if WIDE:
        skx, sky, skz = far(skx), far(sky), far(skz)
        svx, svy, svz = far(svx), far(svy), far(svz)
    if DILATED:
        skx, sky, skz = skx * dx, sky * dy, skz * dz
        svx, svy, svz = svx * dx, svy * dy, svz * dz
    if EXTRA > 0:
        extra_k_ptr += b * seb + hk * seh
        extra_v_ptr += b * sfb + hk * sfh
    own = py
    if RPB:
        rpb_ptr += h * (2 * wx - 1) * (2 * wy - 1) * (2 * wz - 1)
        own = ((px - wx + 1) * (2 * wy - 1) + py - wy + 1) * (2 * wz - 1) + pz - wz + 1
    top, total, acc = attend(
        q, k_ptr, v_ptr, extra_k_ptr, extra_v_ptr, rpb_ptr, own,
        low_x, high_x, low_y, high_y, low_z, high_z, bx, ex, by, ey, bz, ez,
        skx, sky, skz, svx, svy, svz, sen, sfn, wy, wz, extra, scale2,
        RANK, EXTRA, RPB, BM, KX, KY, KZ, BN, D, BLOCK_D, ONE_BAND, PRECISION, BOUNDED,
    )  # fmt: skip
    if BOUNDED:
        safe = (total > 1.0e-20) & (total < 1.0e20)
        unsafe = tl.max((inside & ~safe).to(tl.int32), 0)
        if unsafe > 0:
            # A zero that the compiler cannot see: else it keeps the addresses of this second walk
            # in registers all through the first one.
            none = unsafe - 1
            top, total, acc = attend(
                q, k_ptr + none * 16, v_ptr + none * 16, extra_k_ptr, extra_v_ptr, rpb_ptr, own,
                low_x, high_x, low_y, high_y, low_z, high_z,
                bx, ex, by + none, ey, bz + none, ez,
                skx, sky, skz, svx, svy, svz, sen, sfn, wy, wz, extra, scale2,
                RANK, EXTRA, RPB, BM, KX, KY, KZ, BN, D, BLOCK_D, ONE_BAND, PRECISION, False,
            )  # fmt: skip
    acc = acc * (1.0 / total)[:, None]
    store_rows(out_ptr + entry * D, row * D, inside, dims, acc, D, BLOCK_D)
    tl.store(lse_ptr + entry + row, (top + tl.log2(total)) * 0.6931471805599453, mask=inside)


@on_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hood: Neighborhood,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    rpb: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See `vistoken.kernels.neighborhood_reference.forward`; `tile` overrides the choice."""
    q, k, v = rows_packed(q), rows_packed(k), rows_packed(v)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    launch = plan(q, hood, "forward", tile or sound_tile("forward", q, k, hood, extra_k, rpb))
    extra_k = None if extra_k is None else rows_packed(extra_k)
    extra_v = None if extra_v is None else rows_packed(extra_v)
    count = 0 if extra_k is None else extra_k.shape[1]
    heads = q.shape[-2]
    _forward[launch.programs(q.shape[0], heads)](
        q, k, v, out, lse, q if extra_k is None else extra_k, q if extra_v is None else extra_v,
        q if rpb is None else rpb.contiguous(),
        *strides(q), *strides(k), *strides(v), *extras(extra_k), *extras(extra_v),
        *launch.sizes, heads, heads // k.shape[-2], count, scale * LOG2E,
        EXTRA=extra_block(count, q), RPB=rpb is not None, WIDE=wide(q, k, v),
        BOUNDED=q.dtype != torch.float16, **launch.constants,
    )  # fmt: skip
    return out, lse


def extra_block(count: int, q: Tensor) -> int:
    """Rows of a block of extra tokens; rows of 1 KiB leave no room for 64 beside the tiles."""
    most = 32 if triton.next_power_of_2(q.shape[-1]) * q.element_size() > 512 else 64
    return 0 if count == 0 else min(most, max(16, triton.next_power_of_2(count)))
