"""Problems of the routing benchmark, and the search for the fastest tiles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from operators import Clock, graph_ms, relative, say
from torch import Tensor

from vistoken.kernels import triton_routing, triton_routing_gradients
from vistoken.kernels import triton_routing_bands as bands
from vistoken.kernels.routing_bands import BandTile, band_tile, bands_fit, bands_win, choose_bands
from vistoken.kernels.routing_regions import Routing, route
from vistoken.kernels.routing_tiles import Tile, _walk, block, choose, split

AnyTile = Tile | BandTile
Passes = dict[str, Callable[[AnyTile | None], object]]


@dataclass(frozen=True)
class Problem:
    """Sizes of one operator call."""

    batch: int
    grid: tuple[int, int]
    heads: int
    dim: int
    n_win: int
    topk: int

    @property
    def size(self) -> tuple[int, int]:
        return -(-self.grid[0] // self.n_win), -(-self.grid[1] // self.n_win)

    @property
    def name(self) -> str:
        grid = "x".join(map(str, self.grid))
        return f"bra B{self.batch} {grid} H{self.heads} D{self.dim} S{self.n_win} k{self.topk}"

    def tensors(self, count: int = 3, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        shape = (self.batch, *self.grid, self.heads, self.dim)
        return [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(count)]

    def fits_bands(self) -> bool:
        routing = Routing(self.size, self.size)
        return bands_fit(self.grid, routing, self.dim, 2, 1)


def stages(batch: int, side: int, n_win: int) -> list[Problem]:
    """The three routed stages of BiFormer-B at an image size."""
    return [
        Problem(batch, (side // down,) * 2, heads, 32, n_win, topk)
        for down, heads, topk in ((4, 3, 1), (8, 6, 4), (16, 12, 16))
    ]


PROBLEMS = [*stages(64, 224, 7), *stages(64, 512, 8)]
MORE = [
    Problem(2, (200, 336), 3, 32, 16, 1),
    Problem(2, (100, 168), 6, 32, 16, 4),
    Problem(2, (50, 84), 12, 32, 16, 16),
    Problem(16, (37, 37), 16, 64, 7, 25),
    Problem(4, (64, 64), 12, 64, 8, 16),
    Problem(64, (14, 14), 12, 64, 7, 25),
    Problem(64, (16, 16), 12, 64, 8, 8),
    Problem(64, (14, 14), 6, 64, 7, 4),
]


def tiles(problem: Problem, kind: str) -> Iterator[AnyTile]:
    """Tiles of every shape; stages come later."""
    size = problem.size
    if kind.startswith("bands"):
        shapes = [(256, 8), (256, 16)]
        if kind == "bands forward":
            shapes = [(32, 2), (64, 2), (64, 4), (128, 4), (128, 8), (256, 8)]
        for rows, warps in shapes:
            for columns in (32, 64, 128):
                tile = band_tile(problem.grid, size, rows, columns, warps, 2)
                if tile is not None:
                    yield tile
        return
    for limit in (16, 32, 64, 128):
        own = split(size, limit)
        rows = block(math.prod(own))
        for columns in (16, 32, 64, 128):
            if math.prod(size) > 8 * columns:
                continue
            walk, per, filled = _walk(size, problem.topk, columns)
            for warps in (1, 2, 4, 8):
                if rows <= 64 * warps and 16 * warps <= rows:
                    yield Tile(own, walk, per, rows, filled, warps, 2)
                    if per == 1:  # Corners of steps as one number instead of one for each row.
                        yield Tile(own, walk, 0, rows, filled, warps, 2)


def variants(tile: AnyTile) -> list[AnyTile]:
    """The same shapes compiled otherwise."""
    return [dataclasses.replace(tile, stages=stages) for stages in (1, 3, 4)]


def passes(problem: Problem) -> Passes:
    """Calls of the passes that take a tile, with their inputs bound."""
    q, k, v, grad = problem.tensors(4)
    size, scale = problem.size, problem.dim**-0.5
    index = route(q, k, size, problem.topk)
    tail = index, None, None, None, Routing(size, size), scale
    out, lse = triton_routing.forward(q, k, v, *tail)
    given = (grad, None, q, k, v, out, lse)
    _, delta = triton_routing_gradients.query_gradient(*given, *tail)
    other = (grad, q, k, v, lse, delta, index, None, tail[4], scale)
    few = index, None, None, size, scale
    found: Passes = {
        "forward": lambda tile: triton_routing.forward(q, k, v, *tail, tile=tile),
        "query": lambda tile: triton_routing_gradients.query_gradient(*given, *tail, tile=tile),
        "key": lambda tile: triton_routing_gradients.key_gradients(*other, tile=tile),
    }
    if problem.fits_bands():
        found["bands forward"] = lambda tile: bands.forward(q, k, v, *few, tile=tile)
        found["bands backward"] = lambda tile: bands.backward(*given, *few, tile=tile)[:3]
    return found


def rule(problem: Problem, kind: str) -> AnyTile:
    """The tile that is taken without `tile`."""
    size, dim = problem.size, problem.dim
    if kind == "bands forward":
        return choose_bands(problem.grid, size, dim, "forward")
    if kind == "bands backward":
        return choose_bands(problem.grid, size, dim, "backward")
    return choose(size, size, problem.topk, dim, 2, kind)


def compile_one(problem: Problem, kind: str, tile: AnyTile) -> str:
    """Compile a tile in a process of its own, into the cache on disk, by one tiny-batch run."""
    try:
        passes(dataclasses.replace(problem, batch=2))[kind](tile)
        torch.cuda.synchronize()
        return ""
    except Exception as error:
        return f"{type(error).__name__} {str(error)[:100]}"


def tune(problems: list[Problem], kinds: list[str], clock: Clock, workers: int) -> None:
    """The fastest tiles of every pass; put them into the rules where they beat those."""
    best: dict[tuple[Problem, str], dict[AnyTile, float]] = {}
    for problem in problems:
        names = ["forward", "query", "key"]
        names += ["bands forward", "bands backward"] if problem.fits_bands() else []
        best.update({(problem, kind): {} for kind in names if not kinds or kind in kinds})
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for stage in ("shapes", "stages"):
            jobs = {}
            for (problem, kind), times in best.items():
                found = tiles(problem, kind)
                if stage == "stages":
                    front = sorted(times, key=lambda tile: times[tile])[:3]
                    found = (new for tile in front for new in variants(tile))
                wanted = dict.fromkeys([rule(problem, kind), *found])
                jobs[problem, kind] = {
                    tile: pool.submit(compile_one, problem, kind, tile)
                    for tile in wanted if tile not in times
                }  # fmt: skip
            say("--", stage, sum(map(len, jobs.values())), "tiles")
            for (problem, kind), built in jobs.items():
                call = passes(problem)[kind]
                base = call(None)
                for tile, job in built.items():
                    if clock.over():
                        job.cancel()
                        continue
                    ms, error = time_tile(call, tile, base, job.result())
                    if error:
                        say("   failed", kind, tile, error)
                    else:
                        best[problem, kind][tile] = ms
        pool.shutdown(cancel_futures=True)
    for (problem, kind), times in best.items():
        report(problem, kind, times)


def time_tile(
    call: Callable[[AnyTile], object], tile: AnyTile, base: object, error: str
) -> tuple[float, str]:
    """Milliseconds, or why there are none."""
    if error:
        return math.inf, error
    try:
        far = max(map(relative, call(tile), base))
        if not far < 5e-3:
            return math.inf, f"differs by {far:.1e}"
        return graph_ms(lambda: call(tile), 5, 5), ""
    except Exception as problem:
        return math.inf, f"{type(problem).__name__} {str(problem)[:80]}"


def report(problem: Problem, kind: str, times: dict[AnyTile, float]) -> None:
    """The best tiles beside the rule's."""
    chosen = rule(problem, kind)
    wins = problem.fits_bands() and bands_win(problem.grid, problem.size, problem.topk, problem.dim)
    say(f"== {problem.name} {kind}: {len(times)} timed; rule {times.get(chosen, math.nan):.4f} ms "
        f"{dataclasses.astuple(chosen)} bands win {wins}")  # fmt: skip
    for tile in sorted(times, key=lambda tile: times[tile])[:6]:
        say(f"   {times[tile]:.4f} ms {dataclasses.astuple(tile)}")
