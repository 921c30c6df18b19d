"""Problems of the neighborhood benchmark, and the search for the fastest tiles."""

from __future__ import annotations

import dataclasses
import itertools
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass

import torch
from operators import Clock, graph_ms, relative, say
from torch import Tensor

from vistoken.kernels.neighborhood_tiles import Tile, boxes, choose, cost, shape_of, walks
from vistoken.kernels.neighborhood_windows import Neighborhood


@dataclass(frozen=True)
class Problem:
    """Sizes of one operator call."""

    batch: int
    grid: tuple[int, ...]
    heads: int
    dim: int
    window: tuple[int, ...]
    dilation: int = 1
    stride: int = 1
    rpb: bool = False

    @property
    def hood(self) -> Neighborhood:
        n = len(self.grid)
        return Neighborhood(self.window, (self.stride,) * n, (self.dilation,) * n, (False,) * n)

    @property
    def name(self) -> str:
        grid, window = ("x".join(map(str, x)) for x in (self.grid, self.window))
        more = "" if self.dilation == 1 else f" d{self.dilation}"
        more += " rpb" if self.rpb else ""
        return f"na{len(self.grid)}d B{self.batch} {grid} H{self.heads} D{self.dim} k{window}{more}"

    def table(self) -> Tensor | None:
        if not self.rpb:
            return None
        return torch.randn(self.heads, *(2 * w - 1 for w in self.window), device="cuda")

    def tensors(self, count: int = 3, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        shape = (self.batch, *self.grid, self.heads, self.dim)
        return [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(count)]


def square(batch: int, side: int, heads: int, dim: int, k: int, d: int = 1) -> Problem:
    return Problem(batch, (side, side), heads, dim, (k, k), d)


PROBLEMS = [
    square(16, 64, 12, 64, 7),
    square(16, 64, 12, 64, 13),
    square(16, 64, 12, 64, 31),
    square(128, 56, 2, 32, 7),
    square(128, 28, 4, 32, 7),
    square(2, 128, 16, 64, 13),
    square(2, 128, 16, 128, 31),
    square(128, 14, 6, 64, 7),
    square(8, 37, 16, 64, 9),
]
MORE = [
    square(64, 56, 2, 32, 7, 8),
    square(32, 28, 12, 64, 13),
    square(16, 37, 16, 64, 13),
    square(4, 64, 12, 64, 15),
    square(2, 64, 16, 80, 15),
    Problem(1, (32768,), 8, 64, (255,)),
    Problem(1, (16, 28, 28), 12, 64, (5, 7, 7)),
    dataclasses.replace(PROBLEMS[3], rpb=True),
    dataclasses.replace(PROBLEMS[4], rpb=True),
]


def tile_list(problem: Problem, kind: str, limit: int) -> list[Tile]:
    """Tiles to try first: own sides, walked shapes, warps; the cheapest by the rule come first."""
    shape = shape_of(problem.grid, problem.hood, problem.dim, 2)
    rank = len(problem.grid)
    sides = {
        1: [(1, 1, 64), (1, 1, 128), (1, 1, 32)],
        2: [(1, *xy) for xy in ((8, 8), (4, 16), (16, 4), (8, 16), (16, 8), (8, 7), (7, 9), (4, 8),
                                (9, 14), (4, 14), (14, 4), (5, 12), (14, 9), (10, 12), (13, 5))],
        3: [(2, 4, 8), (4, 4, 4), (4, 4, 8), (2, 7, 7), (2, 8, 8), (1, 8, 8), (3, 4, 5)],
    }[rank]  # fmt: skip
    found: dict[Tile, float] = {}
    for own in sides:
        own = tuple(map(min, own, (cdiv(n, problem.dilation) for n in shape.lengths)))
        for columns in (32, 64, 128):
            shapes = (walks(box, columns, rank) for box in sorted(boxes(shape, own, kind)))
            for walk in dict.fromkeys(itertools.chain(*shapes)):
                bare = Tile(own, walk)
                if kind != "forward" and bare.columns * bare.rows > 64 * 128:
                    continue
                for warps in (4, 8):
                    if warps == 8 and bare.rows < 128 and problem.dim < 128:
                        continue
                    if warps == 4 and bare.rows * problem.dim > 128 * 64:
                        continue
                    found[Tile(own, walk, warps, 3)] = cost(shape, kind, bare)
    return sorted(found, key=found.get)[:limit]


def variants(tile: Tile) -> list[Tile]:
    """The same shapes compiled otherwise."""
    changes = [{"stages": 2}, {"stages": 4}, {"registers": 128}, {"registers": 168},
               {"registers": 96}, {"head_first": True},
               {"stages": 2, "registers": 128}, {"stages": 4, "registers": 128}]  # fmt: skip
    return [dataclasses.replace(tile, **change) for change in changes]


def cdiv(n: int, by: int) -> int:
    return -(-n // by)


def passes(problem: Problem):
    """Calls of the three passes that take a tile, with their inputs bound."""
    from vistoken.kernels import triton_neighborhood as forward
    from vistoken.kernels import triton_neighborhood_gradients as gradients

    q, k, v, grad = problem.tensors(4)
    hood, scale, rpb = problem.hood, problem.dim**-0.5, problem.table()
    out, lse = forward.forward(q, k, v, hood, scale, rpb=rpb)
    _, delta = gradients.query_gradient(grad, None, q, k, v, out, lse, hood, scale, None, None, rpb)
    return {
        "forward": lambda tile: forward.forward(q, k, v, hood, scale, rpb=rpb, tile=tile),
        "query": lambda tile: gradients.query_gradient(
            grad, None, q, k, v, out, lse, hood, scale, None, None, rpb, tile
        ),
        "key": lambda tile: gradients.key_gradients(
            grad, q, k, v, lse, delta, hood, scale, rpb, tile
        ),
    }


def compile_one(problem: Problem, kind: str, tile: Tile) -> str:
    """Compile a tile in a process of its own, into the cache on disk, by one tiny-batch run."""
    small = dataclasses.replace(problem, batch=1)
    try:
        passes(small)[kind](tile)
        torch.cuda.synchronize()
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"


def time_tile(call, tile: Tile, base, error: str) -> tuple[float, str]:
    """Milliseconds, or why there are none."""
    if error:
        return math.inf, error
    try:
        far = max(map(relative, call(tile), base))
        if not far < 5e-3:
            return math.inf, f"differs by {far:.1e}"
        return graph_ms(lambda: call(tile), 5, 7), ""
    except Exception as problem:
        return math.inf, f"{type(problem).__name__} {str(problem)[:80]}"


def tune(problems: list[Problem], kinds: list[str], limit: int, clock: Clock, workers: int):
    """Times of many tiles of every pass; a tile that fails or differs is named and skipped."""
    best: dict[tuple[Problem, str], dict[Tile, float]] = {}
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for stage in ("shapes", "variants"):
            jobs = {}
            for problem in problems:
                for kind in kinds:
                    times = best.setdefault((problem, kind), {})
                    tiles = tile_list(problem, kind, limit)
                    if stage == "variants":
                        front = sorted(times, key=times.get)[:3]
                        tiles = [new for tile in front for new in variants(tile)]
                    for tile in tiles:
                        if tile not in times:
                            job = pool.submit(compile_one, problem, kind, tile)
                            jobs.setdefault((problem, kind), {})[tile] = job
            say("--", stage, sum(map(len, jobs.values())), "tiles")
            for (problem, kind), tiles in jobs.items():
                time_all(problem, kind, tiles, best[problem, kind], clock)
        pool.shutdown(cancel_futures=True)
    return [
        {"case": problem.name, "pass": kind, "ms": ms, "tile": dataclasses.asdict(tile)}
        for (problem, kind), times in best.items()
        for tile, ms in sorted(times.items(), key=lambda item: item[1])[:12]
    ]


def time_all(problem: Problem, kind: str, tiles, times: dict[Tile, float], clock: Clock) -> None:
    """Add the times of compiled tiles of one pass, and print the best so far."""
    if clock.over():
        say("out of time before", problem.name, kind)
        return
    call = passes(problem)[kind]
    base = call(None)
    rule = graph_ms(lambda: call(None), 5, 7)
    for tile, job in tiles.items():
        if clock.over():
            job.cancel()
            continue
        ms, error = time_tile(call, tile, base, job.result())
        if error:
            say("   failed", astuple(tile), error)
        else:
            times[tile] = ms
    shape = shape_of(problem.grid, problem.hood, problem.dim, 2)
    chosen = choose(shape, kind, torch.cuda.get_device_capability())
    say(f"== {problem.name} {kind}: {len(times)} timed; rule {rule:.4f} ms {astuple(chosen)}")
    for tile in sorted(times, key=times.get)[:6]:
        say(f"   {times[tile]:.4f} ms {astuple(tile)}")
    if len(problem.grid) == 2 and times:
        best = repr(min(times, key=times.get))
        side, length = problem.window[0], cdiv(max(problem.grid), problem.dilation)
        where = f"{problem.dim}, ({side}, {side}), ({length}, {length})"
        say(f"   Measured({kind!r}, {where}, {best}),")
