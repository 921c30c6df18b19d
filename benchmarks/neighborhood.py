"""Neighborhood attention on a GPU: agreement with float64, choice of tiles, times beside others.

python benchmarks/neighborhood.py --check --seconds 200
python benchmarks/neighborhood.py --tune --seconds 500 --out benchmarks/results
python benchmarks/neighborhood.py --bench --seconds 400 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from neighborhood_tune import MORE, PROBLEMS, Problem, square, tune
from operators import Clock, event_ms, graph_ms, relative, save, say

from vistoken.kernels import neighborhood_reference as reference
from vistoken.kernels.neighborhood import na1d, na2d, na3d
from vistoken.kernels.neighborhood_windows import Neighborhood

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


def check(clock: Clock, part: int, parts: int) -> bool:
    """Every `parts`-th check, so that processes side by side share the compiling."""
    good = True
    for problem, dtype, options in list(checks())[part::parts]:
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
    # Shapes of problems before this one must not count as recompilations.
    torch.compiler.reset()
    blocks = torch.compile(create_block_mask)(mask, None, None, tokens, tokens, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)

    def call(q, k, v):
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=blocks).transpose(1, 2)

    return call


def warm(problems: list[Problem], skip: set[str]) -> None:
    """Build every kernel once; processes of their own fill the caches side by side."""
    for problem in problems:
        leaves = [x.requires_grad_() for x in problem.tensors()[:3]]
        for name, call in rivals(problem, skip).items():
            try:
                call(*leaves).float().sum().backward()
            except Exception as error:
                say("failed", problem.name, name, type(error).__name__)


def bench(
    problems: list[Problem], clock: Clock, skip: set[str], folder: str | None, add: bool
) -> None:
    """Times of all implementations; the slow compilers come last, so that a limit cuts them."""
    rows: list[dict] = []
    for late in (False, True):
        for problem in problems:
            for name, call in rivals(problem, skip if late else skip | {"flex"}).items():
                if clock.over():
                    say("out of time before", problem.name, name)
                    return
                if late and name != "flex":
                    continue
                try:
                    rows += times(problem, name, call)
                except Exception as error:
                    say("  failed", problem.name, name, type(error).__name__, str(error)[:200])
            save(folder, "na", rows, add)


def times(problem: Problem, name: str, call: Callable[..., torch.Tensor]) -> list[dict]:
    """Forward and forward with backward by graph replay, plain calls, and the error."""
    q, k, v = problem.tensors()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)

    def both():
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, grad.view_as(out))

    more = {}
    if name == "vistoken":
        errors = check_problem(problem, torch.bfloat16)
        more = {"error": errors["out"], "gradient_error": max(errors[n] for n in "qkv")}
    elif name == "sdpa full":
        more = {"error": own_error(q, k, v, call)}
    else:
        ours = rivals(problem, {"flex"})["vistoken"]
        mine = torch.autograd.grad(ours(*leaves), leaves, grad)
        more = {"gradients_agree": max(map(relative, both(), mine)) < 2e-2}
    with torch.no_grad():
        forward = graph_ms(lambda: call(q, k, v))
        plain = event_ms(lambda: [call(q, k, v) for _ in range(10)]) / 10
    total = graph_ms(both, 5)
    text = " ".join(f"{n} {e if e is True else f'{e:.1e}'}" for n, e in more.items())
    say(f"{problem.name:36s} {name:10s} fwd {forward:.4f} fwd+bwd {total:.4f} "
        f"plain fwd {plain:.3f} {text}")  # fmt: skip
    return [
        {"case": problem.name, "batch": problem.batch, "dtype": "bfloat16", "method": name,
         "mode": mode, "direction": direction, "ms": ms, **more}
        for direction, mode, ms in (("fwd", "graph", forward), ("fwd+bwd", "graph", total),
                                    ("fwd", "eager", plain))
    ]  # fmt: skip


def own_error(q, k, v, call) -> float:
    """Relative error of full attention against float64, at 64 queries of one image and head."""
    rows = torch.randint(q[0, ..., 0, 0].numel(), (64,), device=q.device)
    exact_q, exact_k, exact_v = (x[0, ..., 0, :].flatten(0, -2).double() for x in (q, k, v))
    score = exact_q[rows] @ exact_k.mT * q.shape[-1] ** -0.5
    out = call(q[:1], k[:1], v[:1])[0, :, 0]
    return relative(out[rows], score.softmax(-1) @ exact_v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="errors against float64")
    parser.add_argument("--share", default="0/1", help="part of the checks, e.g. 3/8")
    parser.add_argument("--tune", action="store_true", help="times of many tiles")
    parser.add_argument("--bench", action="store_true", help="times beside other implementations")
    parser.add_argument("--warm", action="store_true", help="only build what --bench needs")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--problems", default="", help="indices of the problem list, e.g. 0,3")
    parser.add_argument("--more", action="store_true", help="the second problem list")
    parser.add_argument("--passes", default="forward,query,key")
    parser.add_argument("--tiles", type=int, default=24, help="tiles to try per pass")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--skip", default="", help="implementations to leave out, e.g. flex")
    parser.add_argument("--out", help="folder of the results file")
    parser.add_argument("--add", action="store_true", help="keep what the file has of other cases")
    args = parser.parse_args()
    clock = Clock(args.seconds)
    torch.manual_seed(0)
    random.seed(0)
    known = MORE if args.more else PROBLEMS
    problems = [known[int(i)] for i in args.problems.split(",")] if args.problems else known
    say(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    good = True
    if args.warm:
        warm(problems, set(args.skip.split(",")))
    if args.check:
        good = check(clock, *map(int, args.share.split("/")))
    if args.tune:
        rows = tune(problems, args.passes.split(","), args.tiles, clock, args.workers)
        save(args.out, "na-tiles", rows)
    if args.bench:
        bench(problems, clock, set(args.skip.split(",")), args.out, args.add)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
