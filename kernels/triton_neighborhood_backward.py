"""Gradients of neighborhood attention: two passes, each sums its own rows, so no atomics.

The first pass keeps a tile of queries and walks their keys; it also leaves `delta`, the row sums of
`grad * out` less the gradient of lse. The second keeps a tile of keys and walks the queries that
attend them, which form a box as well. Every sum has a fixed order: gradients repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
from vistoken.kernels.triton_neighborhood_launch import SIZES


@triton.jit(do_not_specialize=[*SIZES, "extra", "group"])
def _query(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, dq_ptr,
    extra_k_ptr, extra_v_ptr, rpb_ptr,
    sqb, sqx, sqy, sqz, sqh, skb, skx, sky, skz, skh, svb, svx, svy, svz, svh,
    sgb, sgx, sgy, sgz, sgh, seb, sen, seh, sfb, sfn, sfh,
    nx, ny, nz, wx, wy, wz, jx, jy, jz, dx, dy, dz, tx, ty, tz, heads, group, extra, scale, scale2,
    RANK: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr, CZ: tl.constexpr,
    STRIDED: tl.constexpr, DILATED: tl.constexpr, EXTRA: tl.constexpr, RPB: tl.constexpr,
    GRAD_LSE: tl.constexpr,
    TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr, BM: tl.constexpr,
    KX: tl.constexpr, KY: tl.constexpr, KZ: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ONE_BAND: tl.constexpr, WIDE: tl.constexpr,
    HEAD_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, rx, ry, rz, ix, iy, iz = place(dx, dy, dz, ty, tz, DILATED, RANK, HEAD_FIRST)
    lx, ly = members(nx, dx, rx, DILATED), members(ny, dy, ry, DILATED)
    lz = members(nz, dz, rz, DILATED)
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
    steps_y, steps_z = tl.cdiv(ey - by, KY).to(tl.int32), tl.cdiv(ez - bz, KZ).to(tl.int32)
    inverse_y, inverse_z = reciprocal(steps_y), reciprocal(steps_z)
    steps = tl.cdiv(ex - bx, KX).to(tl.int32) * steps_y * steps_z

    gx, gy, gz = px, py, pz
    if DILATED:
        gx, gy, gz = px * dx + rx, py * dy + ry, pz * dz + rz
    head = far(h) if WIDE else h
    own_q = offsets(gx, gy, gz, sqx, sqy, sqz, RANK, WIDE)
    q = load_rows(q_ptr + b * sqb + head * sqh, own_q, inside, dims, D, BLOCK_D)
    own_grad = offsets(gx, gy, gz, sgx, sgy, sgz, RANK, WIDE)
    grad = load_rows(
        grad_ptr + b * sgb + head * sgh,
        own_grad,
        inside,
        dims,
        D,
        BLOCK_D,
    )
    row = offsets(gx, gy, gz, ny * nz * heads, nz * heads, heads, RANK, WIDE) + h
    entry = b * (nx * ny * nz) * heads
    out = load_rows(out_ptr + entry * D, row * D, inside, dims, D, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + entry + row, mask=inside, other=0.0)
    tl.store(delta_ptr + entry + row, delta, mask=inside)
    norm = tl.load(lse_ptr + entry + row, mask=inside, other=0.0) * 1.4426950408889634

    hk = h // group
    k_ptr += b * skb + corner(hk, rx, ry, rz, skh, skx, sky, skz, WIDE)
    v_ptr += b * svb + corner(hk, rx, ry, rz, svh, svx, svy, svz, WIDE)
    if WIDE:
        skx, sky, skz = far(skx), far(sky), far(skz)
        svx, svy, svz = far(svx), far(svy), far(svz)
    if DILATED:
        skx, sky, skz = skx * dx, sky * dy, skz * dz
        svx, svy, svz = svx * dx, svy * dy, svz * dz
    cx, cy, cz = coordinates(tl.arange(0, BN), KX, KY, KZ, BN, RANK)
    bits = column_word(cx, cy, cz, KX, KY, KZ, RANK)
    k_offset = offsets(cx, cy, cz, skx, sky, skz, RANK, False)
    v_offset = offsets(cx, cy, cz, svx, svy, svz, RANK, False)
    table_y, table_z = 2 * wy - 1, 2 * wz - 1
    if RPB:
        rpb_ptr += h * (2 * wx - 1) * table_y * table_z
        own = ((px - wx + 1) * table_y + py - wy + 1) * table_z + pz - wz + 1
        column = (cx * table_y + cy) * table_z + cz

    dq = tl.zeros([BM, BLOCK_D], tl.float32)
    if EXTRA > 0:
        extra_k_ptr += b * seb + hk * seh
        extra_v_ptr += b * sfb + hk * sfh
        for start in range(0, extra, EXTRA):
            nth = start + tl.arange(0, EXTRA)
            k = load_rows(extra_k_ptr, nth * sen, nth < extra, dims, D, BLOCK_D)
            v = load_rows(extra_v_ptr, nth * sfn, nth < extra, dims, D, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            score = tl.where((nth < extra)[None, :], score * scale2, float("-inf"))
            p = tl.exp2(score - norm[:, None])
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = (p * (dp - delta[:, None])).to(k.dtype)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
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
        corner_v = offsets(ox, oy, oz, svx, svy, svz, RANK, False)
        v = load_rows(v_ptr + corner_v, v_offset, seen, dims, D, BLOCK_D)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        score = score * scale2 - norm[:, None]
        if RPB:
            slot = (ox * table_y + oy) * table_z + oz + column
            bias = tl.load(rpb_ptr + (slot[None, :] - own[:, None]), mask=ok, other=0.0)
            score += bias.to(tl.float32) * 1.4426950408889634
        p = tl.exp2(tl.where(ok, score, float("-inf")))
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    store_rows(dq_ptr + entry * D, row * D, inside, dims, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _key(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, rpb_ptr,
    sqb, sqx, sqy, sqz, sqh, skb, skx, sky, skz, skh, svb, svx, svy, svz, svh,
    sgb, sgx, sgy, sgz, sgh,
    nx, ny, nz, wx, wy, wz, jx, jy, jz, dx, dy, dz, tx, ty, tz, heads, group, scale, scale2,
    RANK: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr, CZ: tl.constexpr,
    STRIDED: tl.constexpr, DILATED: tl.constexpr, RPB: tl.constexpr, GROUPED: tl.constexpr,
    TX: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr, BM: tl.constexpr,
    KX: tl.constexpr, KY: tl.constexpr, KZ: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ONE_BAND: tl.constexpr, WIDE: tl.constexpr,
    HEAD_FIRST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b, hk, rx, ry, rz, ix, iy, iz = place(dx, dy, dz, ty, tz, DILATED, RANK, HEAD_FIRST)
    lx, ly = members(nx, dx, rx, DILATED), members(ny, dy, ry, DILATED)
    lz = members(nz, dz, rz, DILATED)
    x0, y0, z0 = ix * TX, iy * TY, iz * TZ
    if DILATED:  # noqa: SIM102 (a constexpr condition must stand alone)
        if (x0 >= lx) | (y0 >= ly) | (z0 >= lz):
            return
    dims = tl.arange(0, BLOCK_D)
    px, py, pz = coordinates(tl.arange(0, BM), TX, TY, TZ, BM, RANK)
    px, py, pz = px + x0, py + y0, pz + z0
    inside = visible(px, py, pz, lx, ly, lz, RANK)
    px, py, pz = tl.minimum(px, lx - 1), tl.minimum(py, ly - 1), tl.minimum(pz, lz - 1)
    low_x, high_x = bounds(px, lx, wx, jx, CX, STRIDED, True)
    low_y, high_y = bounds(py, ly, wy, jy, CY, STRIDED, True)
    low_z, high_z = bounds(pz, lz, wz, jz, CZ, STRIDED, True)
    bx, ex = box(x0, lx, wx, jx, TX, CX, STRIDED, True)
    by, ey = box(y0, ly, wy, jy, TY, CY, STRIDED, True)
    bz, ez = box(z0, lz, wz, jz, TZ, CZ, STRIDED, True)
    steps_y, steps_z = tl.cdiv(ey - by, KY).to(tl.int32), tl.cdiv(ez - bz, KZ).to(tl.int32)
    inverse_y, inverse_z = reciprocal(steps_y), reciprocal(steps_z)
    steps = tl.cdiv(ex - bx, KX).to(tl.int32) * steps_y * steps_z

    gx, gy, gz = px, py, pz
    if DILATED:
        gx, gy, gz = px * dx + rx, py * dy + ry, pz * dz + rz
    head = far(hk) if WIDE else hk
    own_k = offsets(gx, gy, gz, skx, sky, skz, RANK, WIDE)
    k = load_rows(k_ptr + b * skb + head * skh, own_k, inside, dims, D, BLOCK_D)
    own_v = offsets(gx, gy, gz, svx, svy, svz, RANK, WIDE)
    v = load_rows(v_ptr + b * svb + head * svh, own_v, inside, dims, D, BLOCK_D)
    stride = heads // group
    row = offsets(gx, gy, gz, ny * nz * stride, nz * stride, stride, RANK, WIDE) + hk
    entry = b * (nx * ny * nz) * stride

    first = hk * group
    q_ptr += b * sqb + corner(first, rx, ry, rz, sqh, sqx, sqy, sqz, WIDE)
    grad_ptr += b * sgb + corner(first, rx, ry, rz, sgh, sgx, sgy, sgz, WIDE)
    row_corner = (((b * nx + rx) * ny + ry) * nz + rz) * heads + first
    lse_ptr += row_corner
    delta_ptr += row_corner
    srx, sry, srz = ny * nz * heads, nz * heads, heads
    if WIDE:
        sqx, sqy, sqz, sqh = far(sqx), far(sqy), far(sqz), far(sqh)
        sgx, sgy, sgz, sgh = far(sgx), far(sgy), far(sgz), far(sgh)
        srx, sry, srz = far(srx), far(sry), far(srz)
    if DILATED:
        sqx, sqy, sqz = sqx * dx, sqy * dy, sqz * dz
        sgx, sgy, sgz = sgx * dx, sgy * dy, sgz * dz
        srx, sry, srz = srx * dx, sry * dy, srz * dz
    cx, cy, cz = coordinates(tl.arange(0, BN), KX, KY, KZ, BN, RANK)
    bits = column_word(cx, cy, cz, KX, KY, KZ, RANK)
    q_offset = offsets(cx, cy, cz, sqx, sqy, sqz, RANK, False)
    g_offset = offsets(cx, cy, cz, sgx, sgy, sgz, RANK, False)
    r_offset = offsets(cx, cy, cz, srx, sry, srz, RANK, False)
    table_y, table_z = 2 * wy - 1, 2 * wz - 1
    if RPB:
        rpb_ptr += first * (2 * wx - 1) * table_y * table_z
        own = ((px + wx - 1) * table_y + py + wy - 1) * table_z + pz + wz - 1
        column = (cx * table_y + cy) * table_z + cz

    dk = tl.zeros([BM, BLOCK_D], tl.float32)
    dv = tl.zeros([BM, BLOCK_D], tl.float32)
    walks = steps
    if GROUPED:
        walks = steps * group
    # Naming the stages makes the small loads of lse and delta run ahead like the large ones.
    for walk in tl.range(0, walks, num_stages=STAGES):
        t, g = walk, 0
        if GROUPED:
            t, g = walk % steps, walk // steps
        ox, oy, oz = step(
            t, bx, by, bz, steps_y, steps_z, inverse_y, inverse_z, KX, KY, KZ, RANK, ONE_BAND
        )
        seen = visible(cx, cy, cz, ex - ox, ey - oy, ez - oz, RANK)
        corner_q = offsets(ox, oy, oz, sqx, sqy, sqz, RANK, False) + g * sqh
        q = load_rows(q_ptr + corner_q, q_offset, seen, dims, D, BLOCK_D)
        corner_g = offsets(ox, oy, oz, sgx, sgy, sgz, RANK, False) + g * sgh
        grad = load_rows(grad_ptr + corner_g, g_offset, seen, dims, D, BLOCK_D)
        at = offsets(ox, oy, oz, srx, sry, srz, RANK, False) + g + r_offset
        norm = tl.load(lse_ptr + at, mask=seen, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + at, mask=seen, other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        ok = related(low_x, high_x, low_y, high_y, low_z, high_z, ox, oy, oz, cx, cy, cz, bits,
                     KX, KY, KZ, RANK)  # fmt: skip
        score = score * scale2 - norm[None, :]
        if RPB:
            slot = (ox * table_y + oy) * table_z + oz + column
            table = rpb_ptr + g * (2 * wx - 1) * table_y * table_z
            bias = tl.load(table + (own[:, None] - slot[None, :]), mask=ok, other=0.0)
            score += bias.to(tl.float32) * 1.4426950408889634
        p = tl.exp2(tl.where(ok, score, float("-inf")))
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    store_rows(dk_ptr + entry * D, row * D, inside, dims, dk * scale, D, BLOCK_D)
    store_rows(dv_ptr + entry * D, row * D, inside, dims, dv, D, BLOCK_D)
