"""Triton kernels and the fused chain on a GPU: agreement with float64, then times.

python benchmarks/gpu_check.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import triton
from operators import replayed

import vistoken
from vistoken.api import attachment_of
from vistoken.fast import gelu_linear
from vistoken.kernels.attention import log_normalizer
from vistoken.kernels.biased_attention import biased_attention
from vistoken.kernels.bipartite import bipartite, cosine_scores, head_mean, pair_up
from vistoken.kernels.chain import Slots, add_reduce_norm, add_reduce_norm_reference
from vistoken.kernels.match import best_match, best_match_at
from vistoken.kernels.ranking import rank_tokens, rank_tokens_reference
from vistoken.kernels.reduce import take
from vistoken.patches import unfold_linear

METHODS = ["tome:r=13", "evit:keep_rate=0.7", "diffrate:gflops=2.9", "tofu:r=13", "pool",
           "zero_tprune", "mctf:r=8"]  # fmt: skip
BANDWIDTH = 3.0e12
"""Bytes per second that a large copy reaches on an H100."""


def qkv(batch, tokens, heads, dim):
    packed = torch.randn(batch, tokens, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def relative(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def graph_us(call, repeats=20):
    """Median microseconds of one call inside a CUDA graph of several."""
    run = replayed(call, repeats)
    ms = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
    return ms * 1e3 / repeats


def check_attention():
    for shape in [(4, 197, 6, 64), (2, 577, 12, 64), (3, 41, 3, 64), (2, 130, 4, 80)]:
        q, k, v = qkv(*shape)
        scale = shape[3] ** -0.5
        bias = torch.randint(1, 9, shape[:2], device="cuda").float().log()
        out, row = biased_attention(q, k, v, bias, scale, 1)
        score = q.double() @ k.double().transpose(-1, -2) * scale + bias[:, None, None].double()
        a = score.softmax(-1)
        mask = bias[:, None, None].bfloat16()
        own = relative(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), a @ v.double())
        assert relative(out, a @ v.double()) < 2 * own
        assert relative(row, a[:, :, 0].mean(1)) < 1e-2
        assert (log_normalizer(q, k, bias, scale) - score.logsumexp(-1)).abs().max() < 1e-2


def check_matching():
    for shape, prefix, r in [((8, 197, 6, 64), 1, 13), ((4, 577, 12, 64), 1, 23),
                             ((3, 41, 3, 64), 0, 20), ((2, 130, 4, 80), 5, 9)]:  # fmt: skip
        _, keys, _ = qkv(*shape)
        exact = pair_up(cosine_scores(head_mean(keys.double())), prefix, r)
        for mine, reference in zip(bipartite(keys, prefix, r), exact, strict=True):
            assert (mine == reference).float().mean() > 0.999
        score = torch.rand(shape[:2], device="cuda")
        assert torch.equal(rank_tokens(score, prefix), rank_tokens_reference(score, prefix))
        x = torch.randn(*shape[:2], 200, device="cuda", dtype=torch.bfloat16)
        order = torch.rand(shape[:2], device="cuda").argsort(-1)
        src, dst = order[:, :9], order[:, 9:]
        value, at = best_match_at(x, src, dst)
        exact_value, exact_at = best_match(take(x.double(), src), take(x.double(), dst))
        assert (value - exact_value).abs().max() < 1e-3
        assert (at == exact_at).float().mean() > 0.98


def check_chain():
    b, n, c, m, s = 4, 197, 384, 100, 60
    x, y = (torch.randn(b, n, c, device="cuda", dtype=torch.bfloat16) for _ in "xy")
    gamma, weight, bias = (torch.randn(c, device="cuda", dtype=torch.bfloat16) for _ in "gwb")
    order = torch.rand(b, n, device="cuda").argsort(-1)
    keep, src = order[:, :m], order[:, m : m + s]
    dst = torch.randint(0, m, (b, s), device="cuda")
    size = torch.randint(1, 5, (b, n), device="cuda").float()
    merge, fuse = Slots(keep, src, dst, size), Slots(keep, src, dst, size, None, "sum")
    long = Slots(keep, src, dst, size, None, "mlerp")
    for slots in (None, Slots(keep), merge, fuse, long):
        got = add_reduce_norm(x, y, gamma, slots, size, (weight, bias, 1e-6))
        wide = (x.double(), y.double(), gamma.double())
        norm = (weight.double(), bias.double(), 1e-6)
        exact = add_reduce_norm_reference(*wide, slots, size, norm)
        assert all(relative(g, w) < 6e-3 for g, w in zip(got, exact, strict=True))
        again = add_reduce_norm(x, y, gamma, slots, size, (weight, bias, 1e-6))
        assert all(torch.equal(g, w) for g, w in zip(got, again, strict=True)), "must repeat itself"


def model_rows():
    """Distance of bf16 logits to fp32 logits, by the chain and by the model's own blocks."""
    for text in METHODS:
        torch.manual_seed(0)
        model = timm.create_model("deit3_small_patch16_224").cuda().eval()
        for block in model.blocks:
            block.ls1.gamma.data.uniform_(0.5, 1.5)
            block.ls2.gamma.data.uniform_(0.5, 1.5)
        images = torch.randn(8, 3, 224, 224, device="cuda")
        vistoken.wrap(model, text)
        with torch.no_grad():
            exact = model(images).double()
            half = model.bfloat16()
            chain = relative(half(images.bfloat16()), exact)
            attachment_of(half).fused = "switched off for the comparison"
            own = relative(half(images.bfloat16()), exact)
        assert chain < 1.5 * own
        yield {"case": "deit3_small logits to fp32", "method": text, "chain": chain, "own": own}


def time_rows():
    """Kernel times inside a graph, beside their floors by bytes."""
    for heads, tokens, batch in [(6, 197, 256), (12, 197, 256), (6, 577, 64), (12, 577, 64)]:
        q, k, v = qkv(batch, tokens, heads, 64)
        bias = torch.rand(batch, tokens, device="cuda")
        mask = bias[:, None, None].bfloat16()
        floor = 4 * q.numel() * 2 / BANDWIDTH * 1e6
        case = f"attention B{batch} H{heads} N{tokens} D64"
        size = bias.exp()
        runs = {
            "vistoken": lambda: biased_attention(q, k, v, None, 0.125, size=size),  # noqa: B023
            "sdpa without bias": lambda: F.scaled_dot_product_attention(q, k, v),  # noqa: B023
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),  # noqa: B023
        }
        for name, run in runs.items():
            yield {"case": case, "method": name, "us": graph_us(run), "floor_us": floor}
    b, n, c = 256, 197, 384
    q, keys, _ = qkv(b, n, 6, 64)
    x, y = (torch.randn(b, n, c, device="cuda", dtype=torch.bfloat16) for _ in "xy")
    norm = (torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0]), 1e-6)
    keep, src, dst = bipartite(keys, 1, 13)
    size = torch.ones(b, n, device="cuda")
    slots, order = Slots(keep, src, dst, size), rank_tokens(size, 1)
    layer = torch.nn.Linear(c, 4 * c, device="cuda", dtype=torch.bfloat16)
    one = x.numel() * 2 / BANDWIDTH * 1e6
    images = torch.randn(b, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    conv = torch.nn.Conv2d(3, c, 16, 16, device="cuda", dtype=torch.bfloat16)
    moved = (images.numel() + x.numel()) * 2 / BANDWIDTH * 1e6
    runs = {
        "patches": (lambda: unfold_linear(images, conv.weight, conv.bias), moved),
        "patches in torch": (lambda: conv(images), moved),
        "match r13": (lambda: bipartite(keys, 1, 13), one),
        "match r13 batch 1": (lambda: bipartite(keys[:1], 1, 13), one / b),
        "rank": (lambda: rank_tokens(size, 1), None),
        "partner 10 of 170": (lambda: best_match_at(x, order[:, 171:181], order[:, 1:171]), one),
        "normalizer": (lambda: log_normalizer(q, keys, None, 0.125), 2 * one),
        "add, merge r13, norm": (
            lambda: add_reduce_norm(x, y, None, slots, size, norm),
            3.87 * one,
        ),
        "add, norm": (lambda: add_reduce_norm(x, y, None, None, None, norm), 4 * one),
        "add, norm in torch": (lambda: F.layer_norm(x + y, (c,), *norm), 4 * one),
        "linear, gelu": (lambda: gelu_linear(x, layer), None),
        "linear, gelu in torch": (lambda: F.gelu(layer(x)), None),
    }
    with torch.no_grad():
        for name, (run, floor) in runs.items():
            yield {"case": f"{name} B256 N197 C384", "us": graph_us(run), "floor_us": floor}


def profile_rows(name="deit_small_patch16_224", method="tome:r=13", batch=256):
    """Where one wrapped forward pass spends its device time."""
    model = timm.create_model(name).cuda().bfloat16().eval()
    vistoken.wrap(model, method)
    x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            model(x)
            torch.cuda.synchronize()
    events = sorted(prof.key_averages(), key=lambda e: -e.device_time_total)
    for event in events[:14]:
        yield {"case": f"profile {name} {method}", "kernel": event.key[:90],
               "us": event.device_time_total, "calls": event.count}  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.manual_seed(0)
    check_attention()
    check_matching()
    check_chain()
    print("all kernels agree with float64")
    rows = []
    for source in (model_rows, time_rows, profile_rows):
        for row in source():
            rows.append(row)
            print(*(f"{v:.4g}" if isinstance(v, float) else v for v in row.values()), flush=True)
    record = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__,
                     "timm": timm.__version__, "vistoken": vistoken.__version__},
        "command": "python " + " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }  # fmt: skip
    tag = "h100" if "H100" in record["device"] else record["device"].lower().replace(" ", "-")
    (options.out / f"kernels-{tag}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
