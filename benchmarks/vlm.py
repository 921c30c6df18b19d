"""Generation with a 7B LLaVA-NeXT of random weights, most telling rows first, within a time.

    python benchmarks/vlm.py --seconds 500 --json benchmarks/results/vlm-h100.json

Baselines: plain `generate`, and transformers' static cache with its own compile.
"""

import argparse
import gc
import json
import logging
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
from vistoken.vlm.decode_plan import PRODUCTS, Stopwatch
from vistoken.vlm.timing import Case, measure_row

NEXT, OLD = "hired:budget=0.2", "hired:budget=0.25"
ROWS: dict[str, tuple[str, list[tuple[int, str, str | None]]]] = {
    # group: shape, rows of batch, mode, method
    "one": ("llava-next", [
        (1, "graph", NEXT), (1, "graph", None), (1, "eager", None), (1, "static", None),
        (1, "modules", NEXT), (1, "eager", NEXT), (1, "eager", "hired:budget=1.0"),
    ]),
    "eight": ("llava-next", [
        (8, "graph", NEXT), (8, "eager", None), (8, "graph", None), (8, "static", None),
        (8, "eager", NEXT),
    ]),
    "old": ("llava-1.5", [
        (8, "graph", OLD), (8, "static", None), (8, "eager", None), (8, "graph", None),
    ]),
    "large": ("llava-next", [(0, "graph", None), (0, "graph", NEXT)]),
    "profile": ("llava-next", [
        (1, "profile", NEXT), (1, "tiles", None), (8, "tiles", None), (8, "profile", NEXT),
    ]),
}  # fmt: skip
"""A batch of 0 is the largest that fits in memory."""
TILE_SECONDS = 14
STATIC_SECONDS = 40


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
    start = Plan(*(tiles(batch, name)[0] for name in PRODUCTS), early=batch == 1)
    clock = Stopwatch(parts, batch)
    clock(start)
    clock(replace(start, early=batch != 1))
    for tile in VECTORS if batch == 1 else MATRICES:
        for name in PRODUCTS:
            if time.monotonic() < end:
                clock(replace(start, **{name: tile}))


def largest(model, options, case, total):
    """The row of the largest batch that fits: guessed from a batch of 8, then less where needed."""
    inputs, images = make_inputs(model, 8, options.words)
    weights = torch.cuda.memory_allocated() / 2**20
    small = measure_row(model, inputs, images, replace(case, batch=8, seconds=0.1))
    if "error" in small:
        return small
    batch = int(0.97 * 8 * (total - weights) / (small["peak_mib"] - weights))
    while True:
        inputs, images = make_inputs(model, batch, options.words)
        row = measure_row(model, inputs, images, replace(case, batch=batch))
        if "OutOfMemory" not in row.get("error", ""):
            return row | {"batch": batch, "largest": True}
        print(f"{batch} rows do not fit", flush=True)
        batch = int(batch * 0.94)


def run_row(model, options, name, case):
    """One row of the results file, or None for rows that only print."""
    torch.manual_seed(0)
    if case.batch == 0:
        total = torch.cuda.get_device_properties(0).total_memory / 2**20
        measured = largest(model, options, case, total)
    else:
        inputs, images = make_inputs(model, case.batch, options.words)
        if case.mode == "tiles":
            return explore(model, case.batch)
        if case.mode == "profile":
            return profile(model, inputs, case.new_tokens)
        measured = measure_row(model, inputs, images, case)
    row = {"case": name, "batch": case.batch, "dtype": options.dtype,
           "method": case.method or "dense", "mode": case.mode, **measured}  # fmt: skip
    print(f"{describe(row)} | {row.get('first_ids')}", flush=True)
    return row


def add_row(rows, row):
    """Put a row in, instead of an older one of the same case."""
    keys = ("case", "method", "mode", "largest")
    keys += () if row.get("largest") else ("batch",)
    rows[:] = [r for r in rows if any(r.get(k) != row.get(k) for k in keys)] + [row]


def main():
    """Time row after row until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--row-seconds", type=float, default=1.5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--size", default="7b")
    parser.add_argument("--rows", default="one,eight,old,large", help=", ".join(ROWS))
    parser.add_argument("--json", type=Path, default=None, help="rows are added to this file")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vistoken").setLevel(logging.DEBUG)
    old = given.json is not None and given.json.exists()
    before = json.loads(given.json.read_text()) if old else {"rows": []}
    rows, command = before["rows"], " ".join(["python", *sys.argv])
    command = f"{before['command']} && {command}" if old else command
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model, shape = None, None
    for group in given.rows.split(","):
        wanted, cases = ROWS[group]
        options = make_parser().parse_args(["--random", given.size, "--shape", wanted])
        options.dtype = "bfloat16" if cuda else "float32"
        if wanted != shape:
            model = None
            gc.collect()
            model, name = make_model(options, device)
            shape = wanted
        for batch, mode, method in cases:
            left = end - time.monotonic()
            if left < (STATIC_SECONDS if mode == "static" else 4):
                print(f"{left:.0f} s left: no {mode} b{batch} {method or 'dense'}", flush=True)
                continue
            case = Case(batch, mode, method, 0, given.new_tokens, given.row_seconds)
            row = run_row(model, options, name, case)
            gc.collect()
            if row is None:
                continue
            add_row(rows, row)
            if given.json is not None:
                write_json(make_record(device, rows, command), given.json)


if __name__ == "__main__":
    main()
