"""Images per second of wrapped ViTs against the dense model, in one run on one GPU.

    python benchmarks/vit.py --out benchmarks/results

Every row is paired: dense and reduced passes alternate and medians are compared, graph
against graph. `free` drops the same counts by slicing: the bound of a reduction that costs nothing
and fuses nothing. `free chain` drops them by fixed indices inside the fused chain: what the first
method takes longer is what choosing and merging tokens costs. `bypass` is the first method with the
chain off, `tome:r=0` the chain without any reduction.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import timm
import torch
import triton

import vistoken
from vistoken.api import attachment_of
from vistoken.graphs import Graphed
from vistoken.methods.base import Method
from vistoken.schedule import Schedule
from vistoken.state import Assignment

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
    "eva02_b_64": ("eva02_base_patch16_clip_224", 64, 224, ["tome:r=13"]),
    "dinov2_b_64": ("transformers/dinov2_base", 64, 224, ["tome:r=16", "evit:keep_rate=0.7"]),
    "clip_l_64": ("transformers/clip_vit_large_patch14", 64, 224, ["tome:r=8"]),
}  # fmt: skip


def build(name):
    """A model of random weights: of timm, or of transformers with a config's defaults."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        if not name.startswith("transformers/"):
            return timm.create_model(name, num_classes=1000).bfloat16().eval()
        import transformers as hf

        if "dinov2" in name:
            model = hf.Dinov2Model(hf.Dinov2Config(image_size=224, patch_size=14))
        else:
            model = hf.CLIPVisionModel(hf.CLIPVisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                num_attention_heads=16, patch_size=14))  # fmt: skip
        return model.bfloat16().eval()


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


@dataclass(frozen=True)
class FixedDrop(Method):
    """Drops the last tokens at the given counts; the indices are found beforehand."""

    name: ClassVar[str] = "fixed"
    paper: ClassVar[str] = "benchmark"
    guarantees: ClassVar[str] = "costs nothing to choose"
    kept: Sequence[int] = ()
    found: dict = field(default_factory=dict, compare=False)

    def counts(self, shape):
        return Schedule.pruning(shape, lambda block, n: self.kept[block] - shape.prefix)

    def assign(self, features, state, step):
        key = features.x.shape[0], step.merged
        if key not in self.found:
            at = torch.arange(step.merged, device=features.x.device)
            self.found[key] = at.repeat(key[0], 1)
        return Assignment(keep=self.found[key])


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
    model = build(name)
    x = torch.randn(batch, 3, size, size, device="cuda", dtype=torch.bfloat16)
    runs = {"dense eager": model, "dense graph": Graphed(model)}
    notes = {"dense eager": ("dense", "eager"), "dense graph": ("dense", "graph")}
    infos, ready = {}, {}
    for text in methods:
        wrapped = vistoken.wrap(copy.deepcopy(model), text)
        infos[text] = vistoken.info(wrapped)
        runs[f"{text} graph"], notes[f"{text} graph"] = Graphed(wrapped), (text, "graph")
        begin = time.perf_counter()
        runs[f"{text} graph"](x)
        torch.cuda.synchronize()
        ready[f"{text} graph"] = time.perf_counter() - begin
        if batch <= 8:
            runs[f"{text} eager"], notes[f"{text} eager"] = wrapped, (text, "eager")
    kept = infos[methods[0]].counts
    plain = "transformers" not in name and "eva" not in name
    if plain and batch > 8:
        bypass = vistoken.wrap(copy.deepcopy(model), methods[0])
        attachment_of(bypass).fused = "switched off for the comparison"
        infos["bypass"], runs["bypass graph"] = vistoken.info(bypass), Graphed(bypass)
        notes["bypass graph"] = ("bypass", "graph")
    if plain:
        runs["free graph"] = Graphed(Free(model, kept).eval())
        chain = vistoken.wrap(copy.deepcopy(model), FixedDrop(kept=tuple(kept)))
        runs["free chain graph"] = Graphed(chain)
        notes["free graph"], notes["free chain graph"] = ("free", "graph"), ("free chain", "graph")
    with torch.no_grad():
        if compiled:
            begin = time.perf_counter()
            runs["dense compiled"], notes["dense compiled"] = (
                torch.compile(model),
                ("dense", "compiled"),
            )
            runs["dense compiled"](x)
            torch.cuda.synchronize()
            ready["dense compiled"] = time.perf_counter() - begin
        ms = paired_ms(runs, x)
    rows = []
    for label, (method, mode) in notes.items():
        info = infos.get(method)
        dense = ms["dense eager" if mode == "eager" else "dense graph"]
        row = {
            "case": name, "batch": batch, "image_size": size, "dtype": "bfloat16",
            "method": method, "mode": mode, "ms": ms[label],
            "per_second": batch / ms[label] * 1e3, "dense_ms": dense, "speedup": dense / ms[label],
            "bound_ms": ms.get("free graph") if method in (methods[0], "free") else None,
            "gflops": info.gflops if info else None,
            "execution": info.execution if info else None,
            "ready_s": ready.get(label),
        }  # fmt: skip
        if method == methods[0] and mode == "graph" and "free chain graph" in ms:
            cost = ms[label] - ms["free chain graph"]
            row["reduction_us_per_block"] = cost * 1e3 / len(kept)
            row["reduction_share_of_dense"] = cost / dense
        rows.append(row)
        extra = f" ready in {ready[label]:.1f} s" if label in ready else ""
        print(f"{key:12s} {label:32s} {ms[label]:9.3f} ms {batch / ms[label] * 1e3:9.0f}/s "
              f"x{dense / ms[label]:.2f}{extra}", flush=True)  # fmt: skip
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
        record(options.out, rows)
        torch.cuda.empty_cache()


def record(folder, rows):
    """Write what there is so far."""
    device = torch.cuda.get_device_name()
    result = {
        "device": device,
        "versions": {"torch": torch.__version__, "triton": triton.__version__,
                     "timm": timm.__version__, "vistoken": vistoken.__version__},
        "command": "python " + " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }  # fmt: skip
    tag = "h100" if "H100" in device else device.lower().replace(" ", "-")
    (folder / f"vit-{tag}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
