"""Neighborhood attention on a GPU: agreement with float64, choice of tiles, times beside others.

python benchmarks/neighborhood.py --check --seconds 200
python benchmarks/neighborhood.py --tune --seconds 500 --out benchmarks/results
python benchmarks/neighborhood.py --bench --seconds 400 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import random
import statistics
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vistoken.kernels import neighborhood_reference as reference
from vistoken.kernels.neighborhood import na1d, na2d, na3d
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


class Clock:
    """Time left of `--seconds`."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def over(self) -> bool:
        return time.monotonic() > self.end


def say(*words: object) -> None:
    print(*words, flush=True)


def graph_ms(call, repeats: int = 10, rounds: int = 15) -> float:
    """Median milliseconds of one call, from replays of a CUDA graph of several."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    return event_ms(graph.replay, rounds) / repeats


def event_ms(call, rounds: int = 15) -> float:
    """Median milliseconds between events around single calls."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def relative(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


# --- tiles ---------------------------------------------------------------------------------------


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


# --- agreement -----------------------------------------------------------------------------------

CALL = {1: na1d, 2: na2d, 3: na3d}


def check_problem(problem: Problem, dtype: torch.dtype, **options) -> dict[str, float]:
    """Relative errors of output and gradients against the float64 reference, on one small batch."""
    small = dataclasses.replace(problem, batch=min(problem.batch, 2), heads=min(problem.heads, 2))
    q, k, v, grad = small.tensors(4, dtype)
    extra = options.get("extra", 0)
    heads = small.heads // options.get("group", 1)
    k, v = k[..., :heads, :], v[..., :heads, :]
    more = [torch.randn(small.batch, extra, heads, small.dim, device="cuda", dtype=dtype)
            for _ in range(2)] if extra else [None, None]  # fmt: skip
    rpb = None
    if options.get("rpb") or problem.rpb:
        table = (2 * w - 1 for w in small.window)
        rpb = torch.randn(small.heads, *table, device="cuda")
    causal = options.get("causal", False)
    leaves = {"q": q, "k": k, "v": v, "ek": more[0], "ev": more[1], "rpb": rpb}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items() if x is not None}
    out, lse = CALL[len(small.grid)](
        leaves["q"], leaves["k"], leaves["v"], small.window, small.stride, small.dilation, causal,
        None, leaves.get("ek"), leaves.get("ev"), leaves.get("rpb"), return_lse=True,
    )  # fmt: skip
    grad_lse = torch.randn_like(lse)
    torch.autograd.backward([out, lse], [grad, grad_lse])
    rank = len(small.grid)
    hood = Neighborhood(small.window, (small.stride,) * rank, (small.dilation,) * rank,
                        (causal,) * rank)  # fmt: skip
    wide = {n: x.detach().double() for n, x in leaves.items()}
    args = wide["q"], wide["k"], wide["v"]
    tail = hood, small.dim**-0.5, wide.get("ek"), wide.get("ev"), wide.get("rpb")
    exact, exact_lse = reference.forward(*args, *tail)
    grads = reference.backward(grad.double(), grad_lse.double(), *args, exact, exact_lse, *tail)
    errors = {"out": relative(out, exact), "lse": relative(lse, exact_lse)}
    values = [g for g in grads if g is not None]
    for (name, leaf), value in zip(leaves.items(), values, strict=True):
        errors[name] = relative(leaf.grad, value)
    return errors


def checks():
    """Problems, types and options whose agreement is shown."""
    half = torch.bfloat16
    for problem in PROBLEMS + MORE:
        yield problem, half, {}
    nat = square(4, 28, 4, 32, 7)
    yield nat, half, {"rpb": True}
    yield square(4, 27, 4, 32, 7, 2), half, {"rpb": True}
    yield square(2, 29, 4, 32, 7, 4), torch.float16, {"rpb": True}
    yield square(2, 37, 4, 64, 9), half, {"extra": 5}
    yield square(2, 37, 4, 64, 9), half, {"extra": 70, "group": 2}
    yield square(2, 20, 4, 64, 6), half, {"causal": True}
    for dim in (24, 48, 80, 96, 128, 256):
        yield square(2, 20, 2, dim, 5), half, {}
    yield Problem(2, (30, 33), 2, 64, (8, 5), 1, 4), half, {"causal": False}
    yield Problem(2, (9, 14, 15), 2, 32, (4, 5, 7), 1, 2), half, {}
    yield Problem(2, (9, 14, 15), 2, 32, (3, 5, 7)), half, {"causal": True}
    yield Problem(2, (500,), 2, 64, (63,), 3, 1), half, {"extra": 3}
    yield square(2, 20, 2, 64, 7), torch.float32, {}
    yield square(2, 20, 2, 32, 7), torch.float32, {"rpb": True, "extra": 3}


def check(clock: Clock) -> bool:
    good = True
    for problem, dtype, options in checks():
        if clock.over():
            say("out of time")
            return False
        try:
            errors = check_problem(problem, dtype, **options)
        except Exception:
            traceback.print_exc()
            good = False
            say("FAILED", problem.name, dtype, options)
            continue
        limit = 1e-4 if dtype == torch.float32 else 5e-3
        fine = all(e < limit for e in errors.values())
        good &= fine
        text = " ".join(f"{n} {e:.1e}" for n, e in errors.items())
        say("ok   " if fine else "WRONG", problem.name, str(dtype)[6:], options or "", text)
    return repeatable() and good


def repeatable() -> bool:
    """Two backward passes agree bit for bit."""
    q, k, v = (x.requires_grad_() for x in square(4, 56, 2, 32, 7).tensors())
    rpb = torch.randn(2, 13, 13, device="cuda", requires_grad=True)
    runs = []
    for _ in range(2):
        out = na2d(q, k, v, 7, rpb=rpb)
        runs.append(torch.autograd.grad(out.float().square().sum(), (q, k, v, rpb)))
    same = all(map(torch.equal, *runs))
    say("gradients repeat bit for bit:", same)
    return same


# --- times ---------------------------------------------------------------------------------------


def rivals(problem: Problem, skip: set[str]) -> dict[str, object]:
    """Implementations by name: functions of heads-last q, k, v."""
    window, dilation, rpb = problem.window, problem.dilation, problem.table()

    def ours(q, k, v):
        return CALL[len(problem.grid)](q, k, v, window, dilation=dilation, rpb=rpb)

    def sdpa(q, k, v):
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    found = {"vistoken": ours, "sdpa full": sdpa}
    if problem.rpb:
        return found
    if len(problem.grid) == 2 and "flex" not in skip:
        found["flex"] = flex(problem)
    try:
        import natten

        found["natten"] = lambda q, k, v: natten.na2d(q, k, v, window, dilation=dilation)
    except ImportError:
        pass
    return found


def flex(problem: Problem):
    """FlexAttention, compiled, tokens in row-major order, 128 x 128 blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (height, width), (a, b), d = problem.grid, problem.window, problem.dilation

    def near(i, j, n, w):
        group, at = i % d, i // d
        members = (n - group + d - 1) // d
        start = (at - w // 2).clamp(min=0)
        start = torch.minimum(start, members - w)
        return (j % d == group) & (j // d >= start) & (j // d < start + w)

    def mask(batch, head, i, j):
        return near(i // width, j // width, height, a) & near(i % width, j % width, width, b)

    tokens = height * width
    blocks = torch.compile(create_block_mask)(mask, None, None, tokens, tokens, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)

    def call(q, k, v):
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=blocks).transpose(1, 2)

    return call


def bench(problems: list[Problem], clock: Clock, skip: set[str]) -> list[dict]:
    rows = []
    for problem in problems:
        if clock.over():
            say("out of time before", problem.name)
            break
        q, k, v = problem.tensors()
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        grad = torch.randn_like(q)
        exact = None
        for name, call in rivals(problem, skip).items():
            try:
                with torch.no_grad():
                    forward = graph_ms(lambda: call(q, k, v))  # noqa: B023
                    plain = event_ms(lambda: [call(q, k, v) for _ in range(10)]) / 10  # noqa: B023

                def both():
                    out = call(*leaves)  # noqa: B023
                    return torch.autograd.grad(out, leaves, grad.view_as(out))  # noqa: B023

                grads = both()
                if exact is None:
                    exact = grads
                agree = name == "sdpa full" or max(map(relative, grads, exact)) < 2e-2
                total = graph_ms(both, 5)
            except Exception as error:
                say("  failed", problem.name, name, type(error).__name__, str(error)[:200])
                continue
            note = "" if agree else " (gradients differ from ours)"
            say(f"{problem.name:36s} {name:10s} fwd {forward:.4f} fwd+bwd {total:.4f} "
                f"plain fwd {plain:.3f}{note}")  # fmt: skip
            for direction, ms in (("fwd", forward), ("fwd+bwd", total), ("fwd plain", plain)):
                rows.append({"case": problem.name, "batch": problem.batch, "dtype": "bfloat16",
                             "method": name, "mode": "eager" if "plain" in direction else "graph",
                             "direction": direction.split()[0], "ms": ms,
                             "gradients_agree": agree})  # fmt: skip
            if clock.over():
                break
    return rows


def save(folder: str | None, name: str, rows: list[dict]) -> None:
    if folder is None:
        return
    record = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    say("wrote", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="errors against float64")
    parser.add_argument("--tune", action="store_true", help="times of many tiles")
    parser.add_argument("--bench", action="store_true", help="times beside other implementations")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--problems", default="", help="indices of the problem list, e.g. 0,3")
    parser.add_argument("--more", action="store_true", help="the second problem list")
    parser.add_argument("--passes", default="forward,query,key")
    parser.add_argument("--tiles", type=int, default=24, help="tiles to try per pass")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--skip", default="", help="implementations to leave out, e.g. flex")
    parser.add_argument("--out")
    args = parser.parse_args()
    clock = Clock(args.seconds)
    torch.manual_seed(0)
    random.seed(0)
    known = MORE if args.more else PROBLEMS
    problems = [known[int(i)] for i in args.problems.split(",")] if args.problems else known
    say(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    gpu = torch.cuda.get_device_name().split()[1].lower()
    good = True
    if args.check:
        good = check(clock)
    if args.tune:
        rows = tune(problems, args.passes.split(","), args.tiles, clock, args.workers)
        save(args.out, f"na-tiles-{gpu}.json", rows)
    if args.bench:
        rows = bench(problems, clock, set(args.skip.split(",")))
        save(args.out, f"na-{gpu}.json", rows)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
