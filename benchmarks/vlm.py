"""Generation with a 7B LLaVA-NeXT of random weights, most telling rows first, within a time.

    python benchmarks/vlm.py --seconds 120 --json rows.json

Baselines: plain `generate`, and transformers' static cache with its own compile.
"""

import argparse
import gc
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from decode_kernels import MATRICES, VECTORS

from vistoken.cli.bench_vlm import describe, make_inputs, make_model, make_parser
from vistoken.eval.record import make_record, write_json
from vistoken.kernels.decode_linear import tiles
from vistoken.vlm.accelerate import accelerate
from vistoken.vlm.decode_layers import Plan, find_parts
from vistoken.vlm.decode_plan import Stopwatch
from vistoken.vlm.timing import Case, measure_row

REDUCED = "hired:budget=0.2"
ROWS = [
    # batch, mode, method
    (1, "graph", REDUCED), (1, "graph", None), (8, "graph", REDUCED), (1, "eager", None),
    (1, "profile", REDUCED), (1, "tiles", None), (8, "graph", None), (8, "tiles", None),
    (1, "modules", REDUCED), (1, "eager", REDUCED), (8, "eager", REDUCED), (8, "eager", None),
    (8, "profile", REDUCED), (1, "static", None), (8, "static", None),
]  # fmt: skip
TILE_SECONDS = 14
SAFE = [(1, "modules", REDUCED), (1, "eager", None), (1, "modules", None), (8, "modules", REDUCED)]


def profile(model, inputs, new_tokens):
    """Kernels by their time over one call, prefill and decoding together."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    fast = accelerate(model, max_new_tokens=new_tokens)
    fast.generate(**inputs)
    with record(activities=[ProfilerActivity.CUDA]) as trace:
        fast.generate(**inputs)
        torch.cuda.synchronize()
    table = trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=24)
    for line in table.splitlines():
        print(line[:70], line[-70:])


def explore(model, batch):
    """Times of many more tiles than the tuner tries, one product at a time; they are logged."""
    end = time.monotonic() + TILE_SECONDS
    parts = find_parts(model)
    plain, gate = tiles(batch, False)[0], tiles(batch, True)[0]
    start = Plan(plain, plain, gate, plain, early=True)
    clock = Stopwatch(parts, batch)
    clock(start)
    clock(replace(start, early=False))
    for tile in VECTORS if batch == 1 else MATRICES:
        for name in ("back", "gate", "qkv"):
            if time.monotonic() < end:
                clock(replace(start, **{name: tile}))


def main():
    """Time row after row until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--row-seconds", type=float, default=1.5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--size", default="7b")
    parser.add_argument("--shape", default="llava-next")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--safe", action="store_true", help="without own kernels")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vistoken").setLevel(logging.DEBUG)
    options = make_parser().parse_args(["--random", given.size, "--shape", given.shape])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    options.dtype = "bfloat16" if cuda else "float32"
    model, name = make_model(options, device)
    print(f"model ready, {end - time.monotonic():.0f} s left", flush=True)
    rows = []
    for batch, mode, method in SAFE if given.safe else ROWS:
        left = end - time.monotonic()
        if left < (40 if mode == "static" else 4):
            print(f"{left:.0f} s left: no {mode} b{batch} {method or 'dense'}", flush=True)
            continue
        torch.manual_seed(0)
        try:
            inputs, images = make_inputs(model, batch, options.words)
            if mode in ("profile", "tiles"):
                if cuda and mode == "profile":
                    profile(model, inputs, given.new_tokens)
                elif cuda:
                    explore(model, batch)
                gc.collect()
                torch.cuda.empty_cache()
                continue
            case = Case(batch, mode, method, 0, given.new_tokens, given.row_seconds)
            row = {
                "case": name, "batch": batch, "dtype": options.dtype, "method": method or "dense",
                "mode": mode, **measure_row(model, inputs, images, case),
            }  # fmt: skip
            rows.append(row)
            print(f"{describe(row)} | {row.get('first_ids')}", flush=True)
            if given.json is not None:
                write_json(make_record(device, rows, " ".join(sys.argv)), given.json)
            if cuda:
                torch.cuda.synchronize()
        except Exception as error:
            print(f"{mode} b{batch} {method}: {type(error).__name__}: {error}", flush=True)
            if "CUDA error" in str(error) and not given.safe:
                # The device is lost to this process; a new one goes on without own kernels.
                seconds = str(end - time.monotonic())
                again = [sys.executable, *sys.argv, "--safe", "--seconds", seconds]
                if given.json is not None:
                    again += ["--json", str(given.json.with_suffix(".safe.json"))]
                os.execv(sys.executable, again)


if __name__ == "__main__":
    main()
