"""Images per second of wrapped ViTs against the dense model, in one run on one GPU.

    python benchmarks/vit.py --out benchmarks/results

Every row is paired: dense and reduced passes alternate and medians are compared, graph
against graph. `free` drops the same counts by slicing: the bound of a reduction that costs nothing
and fuses nothing. `tome:r=0` is the fused chain without any reduction.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
from pathlib import Path

import timm
import torch
import triton

import vistoken
from vistoken.graphs import Graphed

CASES = {
    "deit_s_256": ("deit_small_patch16_224", 256, 224, ["tome:r=13", "diffrate:gflops=2.9",
                   "diffrate:gflops=2.3", "evit:keep_rate=0.7", "zero_tprune:keep_rate=0.8",
                   "tome:r=0"]),
    "vit_b_256": ("vit_base_patch16_224", 256, 224, 
                  ["tome:r=13", "diffrate:gflops=11.5", "tome:r=0"]),
    "vit_l_128": ("vit_large_patch16_224", 128, 224, ["tome:r=8", "tome:r=0"]),
    "vit_b_384_64": ("vit_base_patch16_384", 64, 384, ["tome:r=23", "tome:r=0"]),
    "deit_s_1": ("deit_small_patch16_224", 1, 224, ["tome:r=13"]),
    "vit_b_8": ("vit_base_patch16_224", 8, 224, ["tome:r=13"]),
}  # fmt: skip


class Free(torch.nn.Module):
    """The dense model with the counts of a schedule sliced off between the branches."""

    def __init__(self, model, kept):
        super().__init__()
        self.model, self.kept = model, kept

    def forward(self, images):
        m = self.model
        x = m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(images))))
        for block, kept in zip(m.blocks, self.kept, strict=True):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            x = x[:, :kept]
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return m.forward_head(m.norm(x))


def paired_ms(runs, x, seconds=0.6):
    """Median milliseconds of every run, taken in turns."""
    times = {name: [] for name in runs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for run in runs.values():
        for _ in range(3):
            run(x)
    torch.cuda.synchronize()
    begin = datetime.datetime.now()
    while (datetime.datetime.now() - begin).total_seconds() < seconds * len(runs):
        for name, run in runs.items():
            start.record()
            run(x)
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def measure(key, compiled):
    name, batch, size, methods = CASES[key]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = timm.create_model(name, num_classes=1000).bfloat16().eval()
    x = torch.randn(batch, 3, size, size, device="cuda", dtype=torch.bfloat16)
    runs = {"dense eager": model, "dense graph": Graphed(model)}
    notes = {"dense eager": (None, "eager"), "dense graph": (None, "graph")}
    kept_by, counts = {}, {}
    for text in methods:
        wrapped = vistoken.wrap(copy.deepcopy(model), text)
        kept_by[text] = vistoken.info(wrapped)
        for mode, run in (("graph", Graphed(wrapped)), ("eager", wrapped)):
            if mode == "eager" and batch > 1:
                continue
            runs[f"{text} {mode}"] = run
            notes[f"{text} {mode}"] = (text, mode)
        counts[text] = kept_by[text].counts
    free = Free(model, counts[methods[0]]).eval()
    runs["free graph"], notes["free graph"] = Graphed(free), ("free", "graph")
    with torch.no_grad():
        if compiled:
            fast = torch.compile(model)
            runs["dense compiled"], notes["dense compiled"] = fast, (None, "compiled")
        ms = paired_ms(runs, x)
    rows = []
    bound = ms["free graph"]
    for label, (method, mode) in notes.items():
        info = kept_by.get(method) if method else None
        dense = ms["dense graph" if mode != "eager" else "dense eager"]
        rows.append({
            "case": name, "batch": batch, "image_size": size, "dtype": "bfloat16",
            "method": method or "dense", "mode": mode, "ms": ms[label],
            "per_second": batch / ms[label] * 1e3, "dense_ms": dense, "speedup": dense / ms[label],
            "bound_ms": bound if method in (methods[0], "free") else None,
            "gflops": info.gflops if info else None,
            "execution": info.execution if info else None,
        })  # fmt: skip
        print(f"{key:14s} {label:34s} {ms[label]:9.3f} ms {batch / ms[label] * 1e3:10.0f}/s "
              f"x{dense / ms[label]:.2f}", flush=True)  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--compiled", nargs="*", default=[])
    options = parser.parse_args()
    rows = []
    for key in options.cases:
        rows += measure(key, key in options.compiled)
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    record = {
        "device": device,
        "versions": {"torch": torch.__version__, "triton": triton.__version__,
                     "timm": timm.__version__, "vistoken": vistoken.__version__},
        "command": "python " + " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }  # fmt: skip
    tag = "h100" if "H100" in device else device.lower().replace(" ", "-")
    path = options.out / f"vit-{tag}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
