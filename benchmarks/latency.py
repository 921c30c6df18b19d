"""Is a speed-up planned from the latency table the one that is measured?

    python benchmarks/latency.py --out benchmarks/results

For every model the table is measured (not read from a cache), counts are chosen for wanted
speed-ups with ToMe and with a DiffRate schedule, and the wrapped model is timed against the dense
one, CUDA graph against CUDA graph, taking turns. On a CPU a narrow model runs without graphs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch

import vistoken
from vistoken.eval.record import make_record, write_json
from vistoken.graphs import Graphed
from vistoken.latency import LatencyTable
from vistoken.methods import METHODS

CASES = {
    "deit_s_256": ("deit_small_patch16_224", 256, {}),
    "vit_b_256": ("vit_base_patch16_224", 256, {}),
    "narrow_8": ("deit_small_patch16_224", 8, {"embed_dim": 128, "num_heads": 2, "depth": 6}),
}
GPU_CASES = ("deit_s_256", "vit_b_256")
REDUCERS = ("tome", "diffrate")


def paired_ms(runs: dict[str, Any], x: torch.Tensor, seconds: float = 0.6) -> dict[str, float]:
    """Median milliseconds of every run, taken in turns."""
    sync = torch.cuda.synchronize if x.is_cuda else lambda: None
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run(x)
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or len(times[next(iter(runs))]) < 5:
        for name, run in runs.items():
            sync()
            start = time.perf_counter()
            run(x)
            sync()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}


def measure(key: str, wanted: list[float], round_to: int, tables: Path) -> list[dict[str, Any]]:
    """Rows of one model: per method and wanted speed-up the predicted and the measured one."""
    name, batch, extra = CASES[key]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000, **extra).eval().to(device, dtype)
    x = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    graph = Graphed if on_gpu else (lambda module: module)
    runs: dict[str, Any] = {"dense": graph(model)}
    rows: dict[str, dict[str, Any]] = {}
    for reducer in REDUCERS:
        table = LatencyTable.measure(model, x, method=reducer)
        table.save(tables / f"{key}-{reducer}.json")
        print(f"{key} {reducer}: dense {table.dense_ms:.3f} ms, outside blocks "
              f"{table.rest_ms:.3f} ms, {table.seconds:.1f} s; {table.execution}")  # fmt: skip
        print("  tokens  dense  idle  attn   mlp  reduce")
        columns = (table.tokens, table.block_ms, table.attn_ms, table.mlp_ms, table.reduce_ms)
        for n, block, attn, mlp, adds in zip(*columns, strict=True):
            print(f"  {n:6d} {block:6.3f} {attn + mlp:6.3f} {attn:6.3f} {mlp:6.3f} {adds:6.3f}")
        for speedup in wanted:
            try:
                method = METHODS[reducer].at_speedup(table, speedup, round_to=round_to)
            except vistoken.ScheduleError as error:
                print(f"  {speedup}x: {error}")
                continue
            label = f"{speedup}x {method.to_string()}"
            wrapped = vistoken.wrap(copy.deepcopy(model), method)
            runs[label] = graph(wrapped)
            predicted = table.speedup(method.plan(table.shape))
            rows[label] = {
                "case": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."),
                "method": method.to_string(), "mode": "graph" if on_gpu else "eager",
                "wanted_speedup": speedup, "predicted_speedup": predicted,
                "predicted_ms": table.predict(method.plan(table.shape)),
                "gflops": vistoken.info(wrapped).gflops, "counts": vistoken.info(wrapped).counts,
                "table_seconds": table.seconds, "peak_mib": None, "bound_ms": None,
            }  # fmt: skip
    with torch.no_grad():
        ms = paired_ms(runs, x)
    for label, row in rows.items():
        row.update(
            ms=ms[label], per_second=batch / ms[label] * 1e3, dense_ms=ms["dense"],
            speedup=ms["dense"] / ms[label],
        )  # fmt: skip
        row["error"] = row["predicted_speedup"] / row["speedup"] - 1
        print(f"{key:12} {label:52} predicted {row['predicted_speedup']:.3f}x measured "
              f"{row['speedup']:.3f}x ({row['error']:+.1%})", flush=True)  # fmt: skip
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--cases", nargs="*", default=GPU_CASES if gpu else ("narrow_8",))
    parser.add_argument("--wanted", nargs="*", type=float, default=[1.3, 1.5, 1.8])
    parser.add_argument("--round_to", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    rows = []
    for key in options.cases:
        rows += measure(key, options.wanted, options.round_to, options.out / "latency-tables")
    record = make_record(device, rows, " ".join(["python", "benchmarks/latency.py", *sys.argv[1:]]))
    name = record["device"]
    tag = "h100" if "H100" in name else name.lower().replace(" ", "-").replace(",", "")
    print(write_json(record, options.out / f"latency-{tag}.json"))


if __name__ == "__main__":
    main()
