"""What a reduction costs the host: eager time at small batches, dense and wrapped, per block.

    python benchmarks/eager.py                       # CUDA: DeiT-S/224 in bf16; CPU: a narrow model
    python benchmarks/eager.py --chain # CPU: walk the fused chain with torch operators

At small batches the device waits for Python, so the time above that of the same tokens sliced off
for free is the overhead of hooks, tap, chain and matching. Runs take turns; medians are printed.
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
import vistoken.fast
from vistoken.eval.record import make_record, write_json

METHODS = {
    "deit_small_patch16_224": ("tome:r=13", "diffrate:gflops=2.9", "evit:keep_rate=0.7"),
    "narrow": ("tome:r=3", "diffrate:gflops=0.025", "evit:keep_rate=0.7"),
}
NARROW = {"img_size": 112, "embed_dim": 64, "num_heads": 2, "depth": 12}


class Free(torch.nn.Module):
    """The dense model with the counts of a schedule sliced off between the branches."""

    def __init__(self, model: Any, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.kept = model, kept

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        m = self.model
        x = m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(images))))
        for block, kept in zip(m.blocks, self.kept, strict=True):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            x = x[:, :kept]
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return m.forward_head(m.norm(x))


def paired_ms(runs: dict[str, Any], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of every run on the host's clock, taken in turns."""
    sync = torch.cuda.synchronize if x.is_cuda else lambda: None
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 3):
        for name, run in runs.items():
            sync()
            start = time.perf_counter()
            run(x)
            sync()
            if turn >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}


def launches(run: Any, x: torch.Tensor) -> int | None:
    """Kernels on the device (CUDA), or operators called (CPU), in one forward pass."""
    on = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[on.CUDA if x.is_cuda else on.CPU]) as profile:
        run(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if x.is_cuda else torch.autograd.DeviceType.CPU
    return sum(event.device_type == kind for event in profile.events())


def python_calls(run: Any, x: torch.Tensor) -> int:
    """Python functions entered in one forward pass."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        run(x)
    finally:
        sys.setprofile(None)
    return count


def measure(name: str, batch: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Rows of one batch size."""
    torch.manual_seed(0)
    narrow = NARROW if name == "narrow" else {}
    model: Any = timm.create_model(
        "deit_small_patch16_224" if narrow else name, num_classes=1000, **narrow
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = model.eval().to(device, dtype)
    size = model.patch_embed.img_size
    x = torch.randn(batch, 3, *size, device=device, dtype=dtype)
    runs: dict[str, Any] = {"dense": model}
    infos: dict[str, Any] = {}
    for method in METHODS[name]:
        runs[method] = vistoken.wrap(copy.deepcopy(model), method)
        infos[method] = vistoken.info(runs[method])
        runs[f"free {method}"] = Free(model, infos[method].counts).eval()
    rows = []
    with torch.inference_mode():
        ms = paired_ms(runs, x, rounds)
        for label, run in runs.items():
            info = infos.get(label)
            free = ms.get(f"free {label}")
            rows.append(
                {
                    "case": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."),
                    "method": label, "mode": "eager", "ms": ms[label],
                    "per_second": batch / ms[label] * 1e3, "dense_ms": ms["dense"],
                    "speedup": ms["dense"] / ms[label], "bound_ms": free,
                    "overhead_us_per_block": None if free is None else
                    (ms[label] - free) * 1e3 / len(model.blocks),
                    "launches": launches(run, x), "python_calls": python_calls(run, x),
                    "gflops": info.gflops if info else None,
                    "execution": info.execution if info else None,
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(METHODS), default=None)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--chain", action="store_true", help="CPU: the chain on torch operators")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
        if options.chain:
            # The kernels' own dispatch stays on torch operators: only the chain's Python runs.
            vistoken.fast.use_triton = lambda x: True
    name = options.model or ("narrow" if device.type == "cpu" else "deit_small_patch16_224")
    rows = []
    for batch in options.batch:
        rows += measure(name, batch, device, options.rounds)
    kind = "kernels" if device.type == "cuda" else "operators"
    print(f"{'batch':>5} {'method':28} {'ms':>8} {'us/image':>9} {'x dense':>8} "
          f"{'us/block over free':>19} {kind:>9} {'python calls':>13}")  # fmt: skip
    for row in rows:
        over = row["overhead_us_per_block"]
        print(f"{row['batch']:5d} {row['method']:28} {row['ms']:8.2f} "
              f"{row['ms'] / row['batch'] * 1e3:9.0f} {row['speedup']:8.2f} "
              f"{'' if over is None else format(over, '.0f'):>19} {row['launches']:9d} "
              f"{row['python_calls']:13d}")  # fmt: skip
    if options.json is not None:
        command = " ".join(["python", "benchmarks/eager.py", *sys.argv[1:]])
        write_json(make_record(device, rows, command, chain=options.chain), options.json)


if __name__ == "__main__":
    main()
