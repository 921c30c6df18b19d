"""The operators on a GPU: forward and backward against float64, times, and compiled models.

python benchmarks/ops_check.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import warnings
from pathlib import Path

import timm
import torch
import torch._dynamo
import torch.nn.functional as F
import triton

import vistoken
from vistoken.kernels.attention import log_normalizer, received
from vistoken.kernels.biased_attention import biased_attention, biased_attention_reference
from vistoken.kernels.bipartite import bipartite, cosine_scores, head_mean, pair_up
from vistoken.kernels.chain import Slots, add_reduce_norm, add_reduce_norm_reference
from vistoken.kernels.match import best_match, best_match_at
from vistoken.kernels.ranking import rank_tokens, rank_tokens_reference
from vistoken.kernels.reduce import take

SHAPES = [(8, 197, 6, 64), (8, 197, 12, 64), (8, 577, 12, 64), (8, 50, 12, 64), (3, 130, 4, 80)]
TIMED = [(64, 197, 6, 64), (128, 197, 12, 64), (256, 197, 6, 64), (256, 197, 12, 64)]
FAILED: list[str] = []


def row(case, direction, method, **more):
    """One line of the results file, printed too."""
    shown = "  ".join(f"{k} {f'{v:.3g}' if type(v) is float else v}" for k, v in more.items())
    print(f"{case:34} {direction:8} {method:20} {shown}", flush=True)
    return {"case": case, "dtype": "bfloat16", "direction": direction, "method": method, **more}


def expect(holds, what):
    """Note a failure and go on."""
    if not holds:
        FAILED.append(what)
        print(f"FAILED {what}", flush=True)


def relative(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def name_of(shape):
    return "B{} N{} H{} D{}".format(*shape)


def problem(batch, tokens, heads, dim):
    """One projection's output, a bias, a mask and a gradient."""
    qkv = torch.randn(batch, tokens, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    bias = torch.randint(1, 9, (batch, tokens), device="cuda").float().log()
    alive = (torch.rand(batch, tokens, device="cuda") > 0.4).float()
    grad = torch.randn(batch, tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
    return qkv, bias, alive, grad.transpose(1, 2)


def gradients(call, qkv, bias, alive, grad):
    """Output and gradients of qkv, bias and, where it is given, alive."""
    leaves = [t.detach().clone().requires_grad_() for t in (qkv, bias, alive) if t is not None]
    q, k, v = leaves[0].permute(2, 0, 3, 1, 4).unbind(0)
    out = call(q, k, v, leaves[1], q.shape[-1] ** -0.5, leaves[2] if len(leaves) > 2 else None)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def ours(q, k, v, bias, scale, alive):
    return biased_attention(q, k, v, bias, scale, alive=alive)[0]


def torchs(q, k, v, bias, scale, alive):
    return biased_attention_reference(q, k, v, bias, scale, 0, alive)[0]


def naive(q, k, v, bias, scale, alive):
    scores = q @ k.transpose(-1, -2) * scale + bias[:, None, None]
    if alive is None:
        return scores.softmax(-1) @ v
    own = torch.eye(q.shape[2], device=q.device, dtype=q.dtype)
    power = (scores - scores.amax(-1, True).detach()).exp()
    power = power * (alive[:, None, None] * (1 - own) + own)
    return power / power.sum(-1, keepdim=True) @ v


def check_attention():
    """Output and gradients, no further from float64 than torch's own operators."""
    rows = []
    for shape in SHAPES:
        for masked in (False, True):
            qkv, bias, alive, grad = problem(*shape)
            alive = alive if masked else None
            wide = [None if t is None else t.double() for t in (qkv, bias, alive, grad)]
            exact = gradients(naive, *wide)
            mine = gradients(ours, qkv, bias, alive, grad)
            again = gradients(ours, qkv, bias, alive, grad)
            other = gradients(torchs, qkv, bias, alive, grad)
            case = f"attention {name_of(shape)}" + (" masked" if masked else "")
            errors = [relative(a, b) for a, b in zip(mine, exact, strict=True)]
            theirs = [relative(a, b) for a, b in zip(other, exact, strict=True)]
            rows.append(row(case, "fwd+bwd", "vistoken", error=max(errors), torch=max(theirs)))
            for index, (own, bound) in enumerate(zip(errors, theirs, strict=True)):
                expect(own < 2 * bound + 2e-3, f"{case} value {index}: {own} against {bound}")
            same = all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
            expect(same, f"{case} is not deterministic")
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = q.shape[-1] ** -0.5
        scores = q.double() @ k.double().transpose(-1, -2) * scale + bias[:, None, None].double()
        out, paid, lse = biased_attention(q, k, v, bias, scale, 1, return_lse=True)
        attention = scores.softmax(-1)
        expect(relative(out, attention @ v.double()) < 5e-3, f"{case} output without gradient")
        expect(relative(paid, attention[:, :, 0].mean(1)) < 5e-3, f"{case} class row")
        expect(relative(lse, scores.logsumexp(-1)) < 1e-3, f"{case} log-sum-exp")
        columns = received(q, k, bias, scale, lse)
        expect(relative(columns, attention.mean((1, 2))) < 5e-3, f"{case} column means")
        norm = log_normalizer(q, k, bias, scale)
        expect(relative(norm, scores.logsumexp(-1)) < 1e-3, f"{case} normalizer")
    return rows


def check_others():
    """Matching, ranking and the chain with its gradients."""
    rows = []
    for batch, tokens, heads, dim in SHAPES:
        case = name_of((batch, tokens, heads, dim))
        keys = problem(batch, tokens, heads, dim)[0][:, :, 1].transpose(1, 2)
        found = bipartite(keys, 1, tokens // 8)
        exact = pair_up(cosine_scores(head_mean(keys.double())), 1, tokens // 8)
        share = min((a == b).float().mean().item() for a, b in zip(found, exact, strict=True))
        expect(share > 0.999, f"bipartite {case}: {share}")
        score = torch.rand(batch, tokens, device="cuda")
        order = rank_tokens(score, 1)
        expect(torch.equal(order, rank_tokens_reference(score, 1)), f"ranking {case}")
        x = keys.transpose(1, 2).flatten(2)
        kept, merged = order[:, : tokens // 2], order[:, tokens // 2 : tokens * 3 // 4]
        cosine, partner = best_match_at(x, merged, kept)
        cosine_exact, partner_exact = best_match(take(x.double(), merged), take(x.double(), kept))
        expect((cosine - cosine_exact).abs().max() < 1e-3, f"best_match_at {case} cosine")
        expect((partner == partner_exact).float().mean() > 0.999, f"best_match_at {case}")
        error = chain_error(x.contiguous(), kept, merged, partner)
        expect(error < 1e-2, f"chain {case}: {error}")
        rows.append(row(f"others {case}", "fwd+bwd", "vistoken", chain=error, bipartite=share))
    return rows


def chain_error(x, keep, src, dst):
    """Largest relative error of the chain's outputs and gradients."""
    batch, tokens, width = x.shape
    drawn = [torch.randn_like(x), *torch.randn(3, width, device="cuda", dtype=x.dtype)]
    size = torch.randint(1, 5, (batch, tokens), device="cuda").float()

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *drawn)]
        branch, gamma, scale, shift = leaves[1:]
        slots = Slots(keep, src, dst, size)
        y, h, total = function(leaves[0], branch, gamma, slots, size, (scale, shift, 1e-6))
        loss = (y * y.detach().sin()).sum() + (h * h.detach().cos()).sum()
        return [y, h, total, *torch.autograd.grad(loss, leaves)]

    mine, exact = run(add_reduce_norm, x.dtype), run(add_reduce_norm_reference, torch.float64)
    return max(relative(a, b) for a, b in zip(mine, exact, strict=True))


def measure(call, qkv, bias, grad, backward):
    """Median milliseconds of a pass in a CUDA graph, and peak memory."""
    leaf = qkv.detach().requires_grad_(backward)

    def once():
        q, k, v = leaf.permute(2, 0, 3, 1, 4).unbind(0)
        out = call(q, k, v, bias, q.shape[-1] ** -0.5, None)
        if backward:
            torch.autograd.grad(out, leaf, grad)

    once()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return triton.testing.do_bench_cudagraph(once, rep=40, return_mode="median"), peak


def plain(q, k, v, bias, scale, alive):
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def time_attention():
    """Against torch's attention with the bias as a mask, and without any bias."""
    rows = []
    calls = {"sdpa mask": torchs, "sdpa without bias": plain, "vistoken": ours}
    for shape in TIMED:
        qkv, bias, _, grad = problem(*shape)
        for backward in (False, True):
            base = None
            for method, call in calls.items():
                ms, peak = measure(call, qkv, bias, grad, backward)
                base = ms if base is None else base
                direction = "fwd+bwd" if backward else "fwd"
                more = {"batch": shape[0], "ms": ms, "dense_ms": base, "speedup": base / ms}
                case = f"attention {name_of(shape)}"
                rows.append(row(case, direction, method, **more, peak_mib=peak))
    return rows


def held_by(model, backend, held):
    """The model compiled in one graph; `held` receives the operators in it."""

    def compile_graph(graph, inputs):
        targets = (str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        held.update(t for t in targets if t.startswith("vistoken."))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return torch.compile(model, backend=compile_graph, fullgraph=True)


def check_compiled():
    """Two blocks of DeiT-S with ToMe: the compiled model holds the kernels and agrees."""
    rows = []
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224", depth=2).cuda().bfloat16()
    vistoken.wrap(model, "tome:r=13")
    image = torch.randn(64, 3, 224, 224, device="cuda", dtype=torch.bfloat16)

    def train(run):
        model.zero_grad()
        run(image).float().square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with torch.no_grad():
        expected = model.eval()(image)
    gradient = train(model.train())
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        held: set[str] = set()
        with torch.no_grad():
            compiled = held_by(model.eval(), backend, held)
            error = relative(compiled(image), expected)
            ms = triton.testing.do_bench(lambda run=compiled: run(image), warmup=10, rep=50)
        trained = 0.0
        if backend == "aot_eager":  # Inductor takes minutes for both passes
            torch._dynamo.reset()
            trained = relative(train(held_by(model.train(), backend, held)), gradient)
        names = {name.split(".")[1] for name in held}
        expect(names >= {"biased_attention", "bipartite"}, f"{backend} holds {sorted(held)} only")
        expect(error < 3e-2, f"{backend} output: {error}")
        expect(trained < 6e-2, f"{backend} gradients: {trained}")
        more = {"ms": ms, "error": error, "gradient_error": trained, "ops": len(names)}
        rows.append(row("deit_small 2 blocks", "fwd", f"tome {backend}", **more))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--skip-compile", action="store_true", help="leave out compiled models")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*lru_cache.*")
    torch.manual_seed(0)
    rows = check_attention() + check_others() + time_attention()
    if not options.skip_compile:
        rows += check_compiled()
    device = torch.cuda.get_device_name()
    versions = {m.__name__: m.__version__ for m in (torch, triton, timm)}
    head = {
        "device": device,
        "versions": versions,
        "command": " ".join(["python", "benchmarks/ops_check.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    short = next((name for name in ("h100", "h200", "a100") if name in device.lower()), "gpu")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"ops-{short}.json"
    path.write_text(json.dumps({**head, "failed": FAILED, "rows": rows}, indent=1) + "\n")
    print(f"{len(FAILED)} failed; written to {path}")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
