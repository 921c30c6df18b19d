"""Routed attention on a GPU: agreement with float64, times and memory beside others.

python benchmarks/routing.py --check --seconds 120  # --share 0/8 to 7/8 side by side
python benchmarks/routing.py --bench --seconds 400 --out benchmarks/results
python benchmarks/routing.py --models --seconds 200 --out benchmarks/results
python benchmarks/routing.py --tune --seconds 300 --workers 12
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import triton
from operators import Clock, event_ms, graph_ms, relative, replayed, save, say
from routing_tune import MORE, PROBLEMS, Problem, tune
from torch import Tensor

from vistoken.attention import BiLevelRoutingAttention
from vistoken.kernels import routing_reference as reference
from vistoken.kernels.routing import block_list_attention, routed_attention
from vistoken.kernels.routing_regions import (
    Routing,
    _route,
    count_regions,
    inverse_lists,
    merge,
    partition,
    route,
)

# --- agreement -----------------------------------------------------------------------------------


def check_problem(problem: Problem, dtype: torch.dtype, extra: int = 0, pads: str = "mask",
                  per_head: bool = False, distinct: bool = True) -> dict[str, float]:  # fmt: skip
    """Relative errors of output and gradients against the float64 reference, on one small batch."""
    small = dataclasses.replace(problem, batch=min(problem.batch, 2), heads=min(problem.heads, 2))
    q, k, v, grad = small.tensors(4, dtype)
    shape = (small.batch, extra, small.heads, small.dim)
    more = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2)] if extra else []
    index = route(q, k, small.size, small.topk, per_head)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *more)]
    out, lse = routed_attention(*leaves[:3], index, small.size, None, pads, *leaves[3:],
                                return_lse=True, distinct=distinct)  # fmt: skip
    grad_lse = torch.randn_like(lse)
    torch.autograd.backward([out, lse], [grad, grad_lse])
    wide = [x.detach().double() for x in leaves] + [None, None]
    args, tail = wide[:3], (index, None, *wide[3:5])
    end = Routing(small.size, small.size, pads == "attend"), small.dim**-0.5
    exact, exact_lse = reference.forward(*args, *tail, *end)
    grads = reference.backward(grad.double(), grad_lse.double(), *args, exact, exact_lse, *tail,
                               *end)  # fmt: skip
    errors = {"out": relative(out, exact), "lse": relative(lse, exact_lse)}
    for name, leaf, value in zip(("q", "k", "v", "ek", "ev"), leaves, grads, strict=False):
        errors[name] = relative(leaf.grad, value)
    return errors


def check_lists(problem: Problem, per_head: bool) -> dict[str, float]:
    """Share of regions chosen otherwise than in float64, and of differences of inverse lists."""
    q, k, _ = problem.tensors()
    index = route(q, k, problem.size, problem.topk, per_head)
    exact = _route(q.double(), k.double(), problem.size, problem.topk, per_head)
    total = index.shape[2]
    other = (one_hot(index, total) != one_hot(exact, total)).double().mean().item()
    found, wanted = (inverse_lists(x, None, total) for x in (index, index.cpu()))
    same = all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
    return {"lists": other, "inverse": float(not same)}


def one_hot(index: Tensor, total: int) -> Tensor:
    shape = (*index.shape[:-1], total)
    return torch.zeros(shape, dtype=torch.bool, device=index.device).scatter_(-1, index.long(), 1)


def check_blocks() -> dict[str, float]:
    """Causal block lists with counts and grouped heads."""
    q = torch.randn(2, 1000, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 1500, 2, 128, device="cuda", dtype=torch.bfloat16)
    index = torch.stack([torch.randperm(24)[:12] for _ in range(2 * 8 * 8)]).view(2, 8, 8, 12)
    counts = torch.randint(1, 13, (2, 8, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = block_list_attention(*leaves, index.cuda(), (128, 64), counts.cuda(), True)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = block_list_attention(*wide, index.cuda(), (128, 64), counts.cuda(), True)
    grads = torch.autograd.grad(exact, wide, grad.double())
    names = ("out", "q", "k", "v")
    pairs = zip(names, (out, *found), (exact, *grads), strict=True)
    return {name: relative(a, b) for name, a, b in pairs}


def checks() -> Iterator[tuple[str, torch.dtype, Callable[[], dict[str, float]]]]:
    half, single = torch.bfloat16, torch.float32
    options: list[tuple[Problem, torch.dtype, dict]] = [(p, half, {}) for p in PROBLEMS + MORE]
    ragged = Problem(2, (23, 31), 2, 32, 7, 5)
    options += [
        (ragged, half, {"pads": "attend"}),
        (ragged, torch.float16, {"per_head": True}),
        (ragged, single, {"extra": 3}),
        (MORE[3], half, {"extra": 5}),
        (PROBLEMS[2], half, {"distinct": False}),
        (PROBLEMS[2], torch.float16, {"per_head": True, "extra": 1}),
        (MORE[5], half, {"extra": 5}),
        (Problem(2, (13, 16), 2, 32, 5, 9), half, {}),
        (Problem(2, (9, 11), 2, 24, 3, 4), half, {}),
        (dataclasses.replace(ragged, dim=24), half, {"extra": 70}),
        (dataclasses.replace(ragged, dim=128), half, {}),
        (dataclasses.replace(ragged, dim=256), half, {}),
        (dataclasses.replace(ragged, dim=64), single, {"pads": "attend"}),
    ]
    for problem, dtype, more in options:
        yield f"{problem.name} {more or ''}", dtype, lambda p=problem, d=dtype, m=more: (
            check_problem(p, d, **m))  # fmt: skip
    yield "block lists", half, check_blocks
    for problem in PROBLEMS + MORE:
        yield f"{problem.name} lists", half, lambda p=problem: check_lists(p, False)
    yield "lists per head", half, lambda: check_lists(PROBLEMS[2], True)


def check(clock: Clock, part: int, parts: int) -> bool:
    """Every `parts`-th check, so that processes side by side share the compiling."""
    good = True
    for name, dtype, call in list(checks())[part::parts]:
        if clock.over():
            say("out of time")
            return False
        try:
            errors = call()
        except Exception:
            traceback.print_exc()
            say("FAILED", name)
            good = False
            continue
        fine = all(e < (1e-4 if dtype == torch.float32 else 5e-3) for e in errors.values())
        good &= fine
        text = " ".join(f"{n} {e:.1e}" for n, e in errors.items())
        say("ok   " if fine else "WRONG", name, str(dtype)[6:], text)
    return good and (part > 0 or all(map(repeats, (PROBLEMS[2], PROBLEMS[4]))))


def repeats(problem: Problem) -> bool:
    """Two backward passes agree bit for bit."""
    q, k, v = (x.requires_grad_() for x in problem.tensors())
    index = route(q, k, problem.size, problem.topk)
    runs = []
    for _ in range(2):
        out = routed_attention(q, k, v, index, problem.size, distinct=True)
        runs.append(torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    same = all(map(torch.equal, *runs))
    say(problem.name, "gradients repeat bit for bit:", same)
    return same


# --- times ---------------------------------------------------------------------------------------


def gathered(q: Tensor, k: Tensor, v: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
    """The usual implementation: regions brought together, keys and values copied per list."""
    b, x, y, heads, dim = q.shape
    own, keys, values = (partition(t, size) for t in (q, k, v))
    listed = index.long().expand(b, heads, -1, -1)
    regions, count = listed.shape[2:]
    at = listed.reshape(b, heads, regions * count, 1, 1).expand(-1, -1, -1, *keys.shape[3:])
    near = [t.gather(2, at).view(b, heads, regions, -1, dim) for t in (keys, values)]
    score = own @ near[0].transpose(-1, -2) * dim**-0.5
    return merge(score.softmax(-1) @ near[1], (x, y), size)


def rivals(problem: Problem, index: Tensor, skip: set[str]) -> dict[str, Callable[..., Tensor]]:
    """Implementations by name: functions of heads-last q, k, v."""
    size = problem.size

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    found: dict[str, Callable[..., Tensor]] = {
        "vistoken": lambda q, k, v: routed_attention(q, k, v, index, size, distinct=True),
        "gather": lambda q, k, v: gathered(q, k, v, index, size),
        "sdpa full": sdpa,
    }
    if "flex" not in skip:
        found["flex"] = flex(problem, index)
    return {name: call for name, call in found.items() if name not in skip}


def flex(problem: Problem, index: Tensor) -> Callable[..., Tensor]:
    """FlexAttention, compiled, tokens in row-major order, a mask of the same regions."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (rows, columns), size = problem.grid, problem.size
    across = count_regions(problem.grid, size)[1]
    total = math.prod(count_regions(problem.grid, size))
    table = torch.zeros(problem.batch, total, total, dtype=torch.bool, device="cuda")
    table.scatter_(2, index[:, 0].long(), True)
    at = torch.arange(rows * columns, device="cuda")
    region = at // columns // size[0] * across + at % columns // size[1]

    def mask(b, h, i, j):
        return table[b, region[i], region[j]]

    n = rows * columns
    blocks = torch.compile(create_block_mask)(mask, problem.batch, None, n, n, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=blocks).transpose(1, 2)

    return call


def peak_mib(call: Callable[[], object]) -> float:
    """Memory that a call needs on top of what is there."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def paired(ours: Callable[[], None], other: Callable[[], None], rounds: int = 15) -> float:
    """Median over rounds of the other's time over ours, one after the other in each round."""
    ratios = []
    for turn in range(rounds):
        pair = (ours, other) if turn % 2 else (other, ours)
        times = {call: event_ms(call, 1) for call in pair}
        ratios.append(times[other] / times[ours])
    return statistics.median(ratios)


def times(problem: Problem, index: Tensor, skip: set[str]) -> Iterator[dict]:
    """Forward and forward with backward by graph replay, memory, and ratios in pairs."""
    q, k, v = problem.tensors()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    calls = rivals(problem, index, skip)
    ours = calls["vistoken"]
    exact = torch.autograd.grad(ours(*leaves), leaves, grad)
    for name, call in calls.items():
        try:

            def both(call=call):
                out = call(*leaves)
                return torch.autograd.grad(out, leaves, grad.view_as(out))

            def forward(call=call):
                with torch.no_grad():
                    return call(q, k, v)

            more = {}
            if name != "sdpa full":
                more["agrees"] = max(map(relative, both(), exact)) < 2e-2
            row = {"case": problem.name, "batch": problem.batch, "dtype": "bfloat16",
                   "method": name, "mode": "graph", **more}  # fmt: skip
            for direction, run, own in (
                ("fwd", forward, lambda: forward(ours)), ("fwd+bwd", both, lambda: both(ours))
            ):  # fmt: skip
                run()
                ms, memory = graph_ms(run, 5), peak_mib(run)
                ratio = 1.0 if name == "vistoken" else paired(replayed(own), replayed(run))
                say(f"{problem.name:36s} {name:10s} {direction:8s} {ms:.4f} ms {memory:8.1f} MiB "
                    f"x{ratio:.2f} {more}")  # fmt: skip
                yield {**row, "direction": direction, "ms": ms, "peak_mib": memory,
                       "times_ours": ratio}  # fmt: skip
        except Exception as error:
            say("  failed", problem.name, name, type(error).__name__, str(error)[:200])


def routing_time(problem: Problem) -> list[dict]:
    """The choice of regions, which comes before the operator, beside the whole layer."""
    shape = problem.heads * problem.dim, problem.heads, problem.n_win, problem.topk
    layer = BiLevelRoutingAttention(*shape).cuda().bfloat16()
    x = torch.randn(problem.batch, *problem.grid, shape[0], device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        q, k, _ = layer.qkv(x).unflatten(-1, (3, problem.heads, -1)).unbind(-3)
        ms = graph_ms(lambda: route(q, k, problem.size, problem.topk))
        whole = graph_ms(lambda: layer(x))
    say(f"{problem.name:36s} routing {ms:.4f} ms, {ms / whole:.1%} of the layer's {whole:.4f} ms")
    row = {"case": problem.name, "batch": problem.batch, "dtype": "bfloat16", "mode": "graph",
           "direction": "fwd"}  # fmt: skip
    return [{**row, "method": "vistoken routing", "ms": ms},
            {**row, "method": "vistoken layer", "ms": whole}]  # fmt: skip


def bench(problems: list[Problem], clock: Clock, skip: set[str], folder: str | None) -> None:
    """Times of all implementations; the slow compiler comes last, so that a limit cuts it."""
    rows: list[dict] = []
    for only in ({"flex"}, {"gather", "sdpa full"}):
        for problem in problems:
            if clock.over():
                say("out of time before", problem.name)
                return
            if only != {"flex"} and "flex" in skip:
                continue
            q, k, _ = problem.tensors()
            index = route(q, k, problem.size, problem.topk)
            del q, k
            found = list(times(problem, index, skip | only))
            if only == {"flex"}:
                rows += routing_time(problem)
            rows += [r for r in found if only == {"flex"} or r["method"] != "vistoken"]
            save(folder, "bra", rows)
            torch.cuda.empty_cache()


def bench_models(clock: Clock, folder: str | None) -> None:
    """BiFormer-B inference with the kernels and with the gather implementation."""
    import timm

    import vistoken.attention.routing as layer
    import vistoken.models.biformer  # noqa: F401 (registers the models)

    kept, rows = layer.routed_attention, []
    paths = {"vistoken": kept, "gather": lambda q, k, v, index, size, scale, pads, distinct: (
        gathered(q * (scale * q.shape[-1] ** 0.5), k, v, index, size))}  # fmt: skip
    for side, n_win in ((224, 7), (512, 8)):
        model = timm.create_model("biformer_base", n_win=n_win).eval().cuda().bfloat16()
        image = torch.randn(64, 3, side, side, device="cuda", dtype=torch.bfloat16)
        for name, call in paths.items():
            if clock.over():
                say("out of time before", side, name)
                return
            layer.routed_attention = call
            try:
                with torch.no_grad():
                    ms = graph_ms(lambda model=model, image=image: model(image), 1, 9)
                    memory = peak_mib(lambda model=model, image=image: model(image))
            finally:
                layer.routed_attention = kept
            say(f"biformer_base {side} {name} {ms:.2f} ms {memory:.0f} MiB")
            rows.append({"case": f"biformer_base {side}", "batch": 64, "dtype": "bfloat16",
                         "method": name, "mode": "graph", "ms": ms, "per_second": 64e3 / ms,
                         "peak_mib": memory})  # fmt: skip
        save(folder, "bra-models", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="errors against float64")
    parser.add_argument("--bench", action="store_true", help="times beside other implementations")
    parser.add_argument("--models", action="store_true", help="BiFormer-B on both paths")
    parser.add_argument("--tune", action="store_true", help="times of many tiles")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--problems", default="", help="indices of the problem list, e.g. 0,3")
    parser.add_argument("--more", action="store_true", help="the second problem list")
    parser.add_argument("--skip", default="", help="implementations to leave out, e.g. flex")
    parser.add_argument("--share", default="0/1", help="part of the checks, e.g. 3/8")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile tiles")
    parser.add_argument("--passes", default="", help="passes to tune, e.g. forward,bands backward")
    parser.add_argument("--out")
    args = parser.parse_args()
    clock = Clock(args.seconds)
    torch.manual_seed(0)
    known = MORE if args.more else PROBLEMS
    problems = [known[int(i)] for i in args.problems.split(",")] if args.problems else known
    say(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    good = check(clock, *map(int, args.share.split("/"))) if args.check else True
    if args.tune:
        kinds = [kind for kind in args.passes.split(",") if kind]
        tune(problems, kinds, clock, args.workers)
    if args.bench:
        bench(problems, clock, set(args.skip.split(",")) - {""}, args.out)
    if args.models:
        bench_models(clock, args.out)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
