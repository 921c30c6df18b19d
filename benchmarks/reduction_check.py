"""Kernels that reduce tokens against float64 on a GPU, and what reducing adds to a block.

    python benchmarks/reduction_check.py

MLERP in the kernel of residual, reduction and norm; matching with a factor per token; attention
received; heads joined. Then block times of ToMe, ToFu, MCTF and Zero-TPrune on a ViT-S/14.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from vistoken.eval.record import make_record, write_json
from vistoken.kernels.attention import (
    join_heads,
    join_heads_reference,
    log_normalizer,
    received,
)
from vistoken.kernels.bipartite import bipartite, bipartite_reference
from vistoken.kernels.chain import Slots, add_reduce_norm_reference
from vistoken.kernels.triton_chain import add_reduce_norm_triton
from vistoken.latency import LatencyTable

Row = dict[str, Any]
SHAPES = ((16, 257, 384), (8, 197, 768), (4, 1025, 1024), (3, 51, 192))
METHODS = ("tome", "tofu", "mctf", "zero_tprune")


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(name: str, shape: tuple[int, ...], dtype: torch.dtype, error: float, limit: float) -> Row:
    """One compared call."""
    text = str(dtype).removeprefix("torch.")
    print("ok   " if error < limit else "WRONG", name, text, shape, f"{error:.1e}", flush=True)
    return {"case": name, "shape": list(shape), "dtype": text, "error": error, "ok": error < limit}


def chain() -> Iterator[Row]:
    """MLERP, relative errors of tokens, norms and sizes."""
    for dtype, limit in ((torch.bfloat16, 6e-3), (torch.float32, 1e-5)):
        for batch, tokens, width in SHAPES:
            x, y = (torch.randn(batch, tokens, width, device="cuda").to(dtype) for _ in "xy")
            gamma, w, b = (torch.randn(width, device="cuda").to(dtype) for _ in "gwb")
            r = tokens // 4
            order = torch.rand(batch, tokens, device="cuda").argsort(-1)
            keep, src = order[:, : tokens - r].contiguous(), order[:, tokens - r :].contiguous()
            dst = torch.randint(0, tokens - r, (batch, r), device="cuda")
            size = torch.randint(1, 5, (batch, tokens), device="cuda").float()
            slots = Slots(keep, src, dst, size, None, "mlerp")
            got = add_reduce_norm_triton(x, y, gamma, slots, size, (w, b, 1e-6))
            wide = (x.double(), y.double(), gamma.double())
            norm = (w.double(), b.double(), 1e-6)
            want = add_reduce_norm_reference(*wide, slots, size, norm)
            errors = [
                relative(a, c)
                for a, c in zip(got, want, strict=True)
                if a is not None and c is not None
            ]
            yield check("mlerp", (batch, tokens, width), dtype, max(errors), limit)


def match() -> Iterator[Row]:
    """Matching with a factor: the share of indices that differ from float64's."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for batch, tokens, width in SHAPES:
            x = torch.randn(batch, 1, tokens, width, device="cuda").to(dtype)
            factor = (0.1 * torch.randn(batch, tokens, device="cuda")).exp()
            for prefix, exponent in ((1, 1.0), (5, 0.7)):
                given = (prefix, tokens // 8)
                got = bipartite(x, *given, factor, exponent)
                want = bipartite_reference(x.double(), *given, factor.double(), exponent)
                same = [float((a == c).float().mean()) for a, c in zip(got, want, strict=True)]
                yield check("match", (batch, tokens, width), dtype, 1 - min(same), 0.03)


def signals() -> Iterator[Row]:
    """Attention received and joined heads, relative errors."""
    for dtype in (torch.bfloat16, torch.float16):
        for batch, heads, tokens, dim in ((4, 6, 257, 64), (2, 12, 197, 64), (2, 3, 51, 48)):
            packed = torch.randn(batch, tokens, 3, heads, dim, device="cuda").to(dtype)
            q, k, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
            for bias in (None, torch.rand(batch, tokens, device="cuda")):
                score = q.double() @ k.double().mT * dim**-0.5
                score = score if bias is None else score + bias[:, None, None].double()
                want = score.softmax(-1).mean((1, 2))
                for norm in (None, log_normalizer(q, k, bias, dim**-0.5)):
                    error = relative(received(q, k, bias, dim**-0.5, norm), want)
                    yield check("received", (batch, heads, tokens, dim), dtype, error, 1e-3)
    for shape in ((16, 6, 257), (3, 12, 51), (2, 16, 1025)):
        spread = torch.linspace(0.3, 3, shape[1], device="cuda")[:, None]
        score = torch.rand(shape, device="cuda") / shape[2] * spread
        error = relative(
            join_heads(score, 0.01, 0.7), join_heads_reference(score.double(), 0.01, 0.7)
        )
        yield check("joined heads", shape, score.dtype, error, 1e-5)


def tables() -> Iterator[Row]:
    """Milliseconds that reducing adds to a block, by the tokens that enter it."""
    options: dict[str, Any] = {"img_size": 224, "dynamic_img_size": False, "num_classes": 10}
    model = timm.create_model("vit_small_patch14_dinov2", **options).cuda().bfloat16().eval()
    for name in METHODS:
        table = LatencyTable.measure(model, batch=256, method=name, step=64, repeats=5)
        for tokens, ms in zip(table.tokens, table.reduce_ms, strict=True):
            yield {"case": "reducing, per block", "method": name, "batch": 256, "tokens": tokens,
                   "dtype": "bfloat16", "ms": ms}  # fmt: skip
        cells = ", ".join(f"{t:.3f}" for t in table.reduce_ms)
        print(f"{name}: {cells} ms at {table.tokens} tokens", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.no_grad():
        for part in (chain, match, signals, tables):
            rows += part()
    command = " ".join(["python", "benchmarks/reduction_check.py", *sys.argv[1:]])
    record = make_record(torch.device("cuda"), rows, command)
    tag = "h100" if "H100" in record["device"] else record["device"].lower().replace(" ", "-")
    print(write_json(record, given.out / f"reduction-{tag}.json"))
    sys.exit(any(not row.get("ok", True) for row in rows))


if __name__ == "__main__":
    main()
