"""Device functions of the neighborhood kernels: who attends whom, where tiles lie.

A program owns a tile of rows of one head (queries; keys where the pass is inverse) and walks the
box of all rows on the other side that any of its own relates to. The box starts where the first
window starts, so no row is visited for alignment's sake, and the sides of a tile need not be powers
of two. What a row relates to in a walked tile fits one 32-bit word: per axis a run of bits. Columns
carry one bit per axis, so one AND decides a pair.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bounds(
    i, length, w, s, CAUSAL: tl.constexpr, STRIDED: tl.constexpr, INVERSE: tl.constexpr
):  # fmt: skip
    """Keys `[low, high)` of query i; where inverse, queries `[low, high)` of key i."""
    if INVERSE and CAUSAL:
        low = i
        high = i + w
        if STRIDED:
            high = high // s * s
        high = tl.where(i + w >= length, length, high)
    elif INVERSE:
        middle = i + w // 2
        first = i - w + 1 + w // 2
        if STRIDED:
            last_group = (length + s - 1) // s - 1
            low = s * tl.minimum((tl.maximum(first - s // 2, 0) + s - 1) // s, last_group)
            high = tl.minimum(s * ((middle - s // 2) // s + 1), length)
        else:
            low = tl.minimum(tl.maximum(first, 0), length - 1)
            high = tl.minimum(middle + 1, length)
        low = tl.where(i < w, 0, low)
        high = tl.where((i >= length - w) | (middle >= length - 1), length, high)
    else:
        leader = i
        if STRIDED:
            if CAUSAL:
                leader = tl.minimum(i // s * s + s - 1, length - 1)
            else:
                leader = tl.minimum(i // s * s + s // 2, length - 1)
        if CAUSAL:
            low = tl.maximum(leader - w + 1, 0)
            high = i + 1
        else:
            low = tl.minimum(tl.maximum(leader - w // 2, 0), length - w)
            high = low + w
    return low, high


@triton.jit
def box(
    first, length, w, s, SIDE: tl.constexpr,
    CAUSAL: tl.constexpr, STRIDED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One axis of the box that a tile of `SIDE` rows from `first` on relates to."""
    low, _ = bounds(first, length, w, s, CAUSAL, STRIDED, INVERSE)
    last = tl.minimum(first + SIDE, length) - 1
    _, high = bounds(last, length, w, s, CAUSAL, STRIDED, INVERSE)
    return low, high


@triton.jit
def place(
    dx, dy, dz, ty, tz, DILATED: tl.constexpr, RANK: tl.constexpr, HEAD_FIRST: tl.constexpr
):  # fmt: skip
    """Batch entry, head, dilation group and tile of this program."""
    if HEAD_FIRST:
        h, tile = tl.program_id(0), tl.program_id(1)
    else:
        tile, h = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2)
    rx, ry, rz = 0, 0, 0
    if DILATED:
        group = b % (dx * dy * dz)
        b = b // (dx * dy * dz)
        rz = group % dz
        ry = group // dz % dy
        rx = group // (dz * dy)
    ix, iy, iz = 0, 0, tile
    if RANK > 1:
        iz = tile % tz
        iy = tile // tz
    if RANK > 2:
        ix = iy // ty
        iy = iy % ty
    return b.to(tl.int64), h, rx, ry, rz, ix, iy, iz


@triton.jit
def members(n, d, r, DILATED: tl.constexpr):
    """Length of the dilation group that starts at r."""
    if DILATED:
        return (n - r + d - 1) // d
    return n


@triton.jit
def coordinates(
    at, SX: tl.constexpr, SY: tl.constexpr, SZ: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """Place of each row of a block in its tile; rows beyond it are far off on the first axis."""
    x, y, z = at * 0, at * 0, at
    if RANK > 1:
        y, z = at // SZ, at % SZ
    if RANK > 2:
        x, y = y // SY, y % SY
    if SX * SY * SZ < BLOCK:
        beyond = tl.where(at < SX * SY * SZ, 0, 1 << 20)
        if RANK == 1:
            z += beyond
        elif RANK == 2:
            y += beyond
        else:
            x += beyond
    return x, y, z


@triton.jit
def word(low, high, start, SIDE: tl.constexpr, SHIFT: tl.constexpr):
    """One axis of a row's word: the bits of the places `[low, high)` in a tile at `start`."""
    first = tl.minimum(tl.maximum(low - start, 0), SIDE)
    end = tl.minimum(tl.maximum(high - start, 0), SIDE)
    one = tl.full(low.shape, 1, tl.int32)
    return ((one << end) - (one << first)) << SHIFT


@triton.jit
def column_word(x, y, z, SX: tl.constexpr, SY: tl.constexpr, SZ: tl.constexpr, RANK: tl.constexpr):
    """The bits of a column; beyond the tile the top bit, which no row allows."""
    one = tl.full(z.shape, 1, tl.int32)
    bits = one << tl.minimum(z + (SX + SY), 31)
    if RANK > 1:
        bits |= one << tl.minimum(y + SX, 31)
    if RANK > 2:
        bits |= one << tl.minimum(x, 31)
    return bits


@triton.jit
def related(
    lx, hx, ly, hy, lz, hz, ox, oy, oz, x, y, z, bits,
    SX: tl.constexpr, SY: tl.constexpr, SZ: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """`[rows, columns]`: which columns of the tile at (ox, oy, oz) lie in each row's bounds."""
    if SX + SY + SZ <= 31:
        allowed = word(lz, hz, oz, SZ, SX + SY)
        if RANK > 1:
            allowed |= word(ly, hy, oy, SY, SX)
        if RANK > 2:
            allowed |= word(lx, hx, ox, SX, 0)
        return ((~allowed)[:, None] & bits[None, :]) == 0
    ok = (z[None, :] >= (lz - oz)[:, None]) & (z[None, :] < (hz - oz)[:, None])
    if RANK > 1:
        ok &= (y[None, :] >= (ly - oy)[:, None]) & (y[None, :] < (hy - oy)[:, None])
    if RANK > 2:
        ok &= (x[None, :] >= (lx - ox)[:, None]) & (x[None, :] < (hx - ox)[:, None])
    return ok


@triton.jit
def reciprocal(n):
    """For `divide`: 2**32 / n, rounded up; it wraps to 0 for 1."""
    return 0xFFFFFFFF // n.to(tl.uint32) + 1


@triton.jit
def divide(t, n, inverse):
    """Quotient by one wide product: a division in the loop would cost as much as the masks."""
    wide = (t + 0 * n).to(tl.uint32)  # the interpreter counts loops in Python integers
    return tl.where(n == 1, t, tl.umulhi(wide, inverse).to(tl.int32))


@triton.jit
def step(
    t, bx, by, bz, ny, nz, inverse_y, inverse_z,
    SX: tl.constexpr, SY: tl.constexpr, SZ: tl.constexpr,
    RANK: tl.constexpr, ONE_BAND: tl.constexpr,
):  # fmt: skip
    """Corner of walked tile t of a box; `ONE_BAND` says that the last axis needs one tile."""
    ox, oy, oz = bx, by, bz
    if RANK == 1:
        oz = bz + t * SZ
    else:
        rest = t
        if not ONE_BAND:
            rest = divide(t, nz, inverse_z)
            oz = bz + (t - rest * nz) * SZ
        if RANK == 2:
            oy = by + rest * SY
        else:
            plane = divide(rest, ny, inverse_y)
            oy = by + (rest - plane * ny) * SY
            ox = bx + plane * SX
    return ox, oy, oz


@triton.jit
def load_rows(base, offset, inside, dims, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a `[.., D]` tensor; zero where outside."""
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (dims[None, :] < D)
    return tl.load(base + offset[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, offset, inside, dims, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inverse of `load_rows`."""
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (dims[None, :] < D)
    tl.store(base + offset[:, None] + dims[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def offsets(x, y, z, sx, sy, sz, RANK: tl.constexpr, WIDE: tl.constexpr):
    """Where rows lie from the start of their batch entry."""
    if WIDE:
        x, y, z = x.to(tl.int64), y.to(tl.int64), z.to(tl.int64)
    at = z * sz
    if RANK > 1:
        at += y * sy
    if RANK > 2:
        at += x * sx
    return at


@triton.jit
def corner(h, rx, ry, rz, sh, sx, sy, sz, WIDE: tl.constexpr):
    """Where a head's dilation group lies from the start of its batch entry."""
    if WIDE:
        h, rx, ry, rz = far(h), far(rx), far(ry), far(rz)
    return h * sh + rx * sx + ry * sy + rz * sz


@triton.jit
def far(n):
    """A number in 64 bits, also one that was compiled in, like a stride of 1."""
    return n + tl.full([], 0, tl.int64)


@triton.jit
def visible(x, y, z, lx, ly, lz, RANK: tl.constexpr):
    """Rows that lie before the ends of all axes."""
    ok = z < lz
    if RANK > 1:
        ok &= y < ly
    if RANK > 2:
        ok &= x < lx
    return ok
