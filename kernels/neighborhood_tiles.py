"""Tiles of the neighborhood kernels: measured ones for known problems, a cost rule for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal

from vistoken.kernels.neighborhood_windows import Neighborhood, group_length, spans

Pass = Literal["forward", "query", "key"]
"""Forward, gradient of the queries, gradient of the keys and values."""

Sides = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """Sides of a program's own tile and of the tiles it walks, x, y, z; size 1 on unused axes."""

    own: Sides
    walk: Sides
    warps: int = 4
    stages: int = 2
    head_first: bool = False
    """Programs of neighboring numbers work on neighboring heads, not on neighboring tiles."""
    registers: int | None = None
    """Most registers of a thread; fewer let more programs share a multiprocessor."""

    @property
    def rows(self) -> int:
        """Rows of the block that holds the own tile."""
        return block(self.own)

    @property
    def columns(self) -> int:
        """Rows of the block that holds a walked tile."""
        return block(self.walk)


def block(sides: Sides) -> int:
    """The power of two, 16 at least, that holds a tile."""
    return max(16, 1 << (math.prod(sides) - 1).bit_length())


@dataclass(frozen=True)
class Shape:
    """What the choice of a tile depends on; axes x, y, z, with size 1 where unused."""

    lengths: Sides
    window: Sides
    stride: Sides
    dilation: Sides
    causal: tuple[bool, bool, bool]
    rank: int
    dim: int
    bytes: int

    def spans(self, sides: Sides, inverse: bool) -> list[tuple[int, ...]]:
        """Box sides of the tiles along each axis, in the first dilation group, the longest."""
        return [
            spans(group_length(n, d, 0), t, w, s, c, inverse)
            for n, d, t, w, s, c in zip(
                self.lengths, self.dilation, sides, self.window, self.stride, self.causal,
                strict=True,
            )
        ]  # fmt: skip

    def box(self, sides: Sides, inverse: bool) -> Sides:
        """Largest box that a tile relates to, over all dilation groups."""
        x, y, z = (
            max(max(spans(group_length(n, d, r), t, w, s, c, inverse)) for r in {0, d - 1})
            for n, d, t, w, s, c in zip(
                self.lengths, self.dilation, sides, self.window, self.stride, self.causal,
                strict=True,
            )
        )  # fmt: skip
        return x, y, z


def shape_of(grid: tuple[int, ...], hood: Neighborhood, dim: int, bytes_: int) -> Shape:
    """The problem on three axes, the unused ones in front."""

    def three(values: tuple[int, ...]) -> Sides:
        x, y, z = (1,) * (3 - len(values)) + tuple(values)
        return x, y, z

    x, y, z = (False,) * (3 - len(grid)) + hood.causal
    return Shape(
        three(grid), three(hood.window), three(hood.stride), three(hood.dilation), (x, y, z),
        len(grid), dim, bytes_,
    )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """The fastest tile of square windows on maps of two axes, and where it applies."""

    kind: Pass
    dim: int
    window: tuple[int, int]
    """Smallest and largest window."""
    length: tuple[int, int]
    """Smallest and largest side of the map, or of its dilation groups."""
    tile: Tile

    def fits(self, shape: Shape, kind: Pass) -> bool:
        """Whether a problem is like the measured one."""
        lengths = [
            group_length(n, d, 0) for n, d in zip(shape.lengths, shape.dilation, strict=True)
        ]
        return (
            (kind, shape.dim, shape.rank, shape.bytes) == (self.kind, self.dim, 2, 2)
            and shape.stride == (1, 1, 1)
            and all(self.window[0] <= w <= self.window[1] for w in shape.window[1:])
            and all(self.length[0] <= n <= self.length[1] for n in lengths[1:])
        )


def flat(
    own: tuple[int, int], walk: tuple[int, int], stages: int, registers: int | None = None
) -> Tile:
    """A tile of two axes with four warps."""
    return Tile((1, *own), (1, *walk), 4, stages, registers=registers)


ANY = 2**31
MEASURED: dict[tuple[int, int], tuple[Measured, ...]] = {
    (9, 0): (
        Measured("forward", 32, (7, 7), (24, 32), flat((14, 4), (3, 10), 3, 96)),
        Measured("query", 32, (7, 7), (24, 32), flat((16, 4), (3, 10), 4)),
        Measured("key", 32, (7, 7), (24, 32), flat((4, 14), (7, 17), 2)),
        Measured("forward", 32, (7, 7), (33, ANY), flat((8, 8), (2, 14), 3)),
        Measured("query", 32, (7, 7), (33, ANY), flat((8, 8), (2, 14), 4)),
        Measured("key", 32, (7, 7), (33, ANY), flat((8, 8), (2, 14), 3, 128)),
        Measured("forward", 64, (7, 7), (13, 15), flat((8, 7), (3, 10), 4, 128)),
        Measured("query", 64, (7, 7), (13, 15), flat((8, 7), (3, 10), 4, 128)),
        Measured("key", 64, (7, 7), (13, 15), flat((8, 7), (3, 10), 3, 168)),
        Measured("forward", 64, (7, 7), (33, ANY), flat((8, 8), (2, 14), 4, 128)),
        Measured("query", 64, (7, 7), (33, ANY), flat((8, 8), (2, 14), 4, 128)),
        Measured("key", 64, (7, 7), (33, ANY), flat((8, 8), (2, 14), 3, 168)),
        Measured("forward", 64, (9, 9), (33, ANY), flat((8, 8), (2, 16), 3, 128)),
        Measured("query", 64, (9, 9), (33, ANY), flat((8, 8), (2, 16), 4)),
        Measured("key", 64, (9, 9), (33, 44), flat((8, 8), (3, 10), 3, 168)),
        Measured("forward", 64, (13, 13), (45, ANY), flat((16, 4), (2, 16), 3)),
        Measured("query", 64, (13, 13), (45, ANY), flat((16, 4), (2, 16), 3, 96)),
        Measured("key", 64, (13, 13), (45, 100), flat((8, 8), (4, 8), 3)),
        Measured("key", 64, (13, 13), (101, ANY), flat((4, 16), (8, 4), 3)),
        Measured("forward", 64, (31, 31), (45, ANY), flat((8, 8), (4, 8), 4)),
        Measured("query", 64, (31, 31), (45, ANY), flat((8, 8), (8, 4), 3, 128)),
        Measured("key", 64, (31, 31), (45, ANY), Tile((1, 8, 8), (1, 4, 8), 4, 3, True)),
        Measured("forward", 128, (31, 31), (101, ANY), flat((8, 8), (4, 8), 3)),
        Measured("query", 128, (31, 31), (101, ANY), flat((4, 16), (2, 16), 3)),
        Measured("key", 128, (31, 31), (101, ANY), flat((8, 8), (8, 4), 3)),
    )
}
"""By compute capability. Each was checked against the float64 reference before it was timed."""


@lru_cache(maxsize=1024)
def choose(shape: Shape, kind: Pass, capability: tuple[int, int] | None = None) -> Tile:
    """The tile of a problem: measured where one fits, by the cost rule elsewhere."""
    for entry in MEASURED.get(capability or (0, 0), ()):
        if entry.fits(shape, kind):
            return entry.tile
    return min(candidates(shape, kind), key=lambda tile: cost(shape, kind, tile))


def ranked(shape: Shape, kind: Pass, capability: tuple[int, int] | None = None) -> Iterator[Tile]:
    """The chosen tile first, then tiles that are compiled more plainly, then the next cheapest."""
    first = choose(shape, kind, capability)
    yield first
    plain = replace(first, stages=2 if first.stages > 2 else 1, registers=None)
    seen = {first, plain}
    yield plain
    for tile in sorted(candidates(shape, kind), key=lambda tile: cost(shape, kind, tile)):
        if tile not in seen:
            seen.add(tile)
            yield tile


def candidates(shape: Shape, kind: Pass) -> Iterator[Tile]:
    """Tiles worth a look."""
    narrow = 64 if shape.bytes == 2 else 32
    stages = 3 if shape.dim <= 128 else 2
    # Wide heads load so much per key that a key must serve more queries.
    rows = narrow * 2 if 64 < shape.dim <= 128 and kind != "forward" else narrow
    largest = [group_length(n, d, 0) for n, d in zip(shape.lengths, shape.dilation, strict=True)]
    sizes = [1, 2, 4, 7, 8, 14, 16, 32, 64]
    axes = [
        [1] if n == 1 else sorted({min(n, size) for size in sizes})
        for n in largest
    ]  # fmt: skip
    for own in product(*axes):
        tile = own[0], own[1], own[2]
        if not rows // 2 < math.prod(tile) <= rows and math.prod(largest) > math.prod(tile):
            continue
        if math.prod(tile) > rows:
            continue
        for box in boxes(shape, tile, kind):
            for columns in (narrow // 2, narrow):
                # Four programs share a multiprocessor at 128 registers, and nothing spills here.
                four = columns == 32 < shape.dim <= 64 and kind != "key" and shape.bytes == 2
                registers = 128 if four else None
                for walk in walks(box, columns, shape.rank):
                    warps = 4 if rows * shape.dim <= 64 * 128 else 8
                    yield Tile(tile, walk, warps, stages, registers=registers)


def boxes(shape: Shape, own: Sides, kind: Pass) -> set[Sides]:
    """The largest box of a tile and the one in the middle of the grid, where most tiles are."""
    x, y, z = (axis[len(axis) // 2] for axis in shape.spans(own, kind == "key"))
    return {shape.box(own, kind == "key"), (x, y, z)}


def walks(box: Sides, columns: int, rank: int) -> Iterator[Sides]:
    """Walked tiles of at most `columns` rows: whole lines of the box, or equal parts of them."""
    for parts in range(1, box[2] + 1):
        z = -(-box[2] // parts)
        if z > columns:
            continue
        for y in {min(columns // z, box[1]), min(max(1, columns // (2 * z)), box[1])}:
            x = min(columns // (y * z), box[0]) if rank == 3 else 1
            if rank < 2 or x + y + z <= 31:
                yield x, y, z
        if parts > 1 and z <= 4:
            return


def cost(shape: Shape, kind: Pass, tile: Tile) -> float:
    """Work of a whole grid in multiply-adds per head-dim; a step and a tile have a fixed part."""
    steps = tiles = 1
    for axis, side in zip(shape.spans(tile.own, kind == "key"), tile.walk, strict=True):
        steps *= sum(-(-length // side) for length in axis)
        tiles *= len(axis)
    # Walking two axes costs more than walking whole lines; a wide tile whose sides are no powers of
    # two needs a register for the offset of every row; more scores at once leave room for fewer
    # programs on a multiprocessor.
    turns = 1.1 if max(shape.spans(tile.own, kind == "key")[2]) > tile.walk[2] else 1.0
    odd = 1.2 if tile.columns > max(32, math.prod(tile.walk)) else 1.0
    full = 1.3 if tile.columns * tile.rows >= 1024 * tile.warps else 1.0
    return steps * (tile.columns + 8) * (tile.rows + 16) * turns * odd * full + tiles * 6000
