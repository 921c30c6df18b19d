"""What learning counts costs, and what it brings on the embedded scenes.

    python benchmarks/rates.py --out benchmarks/results

`steps` times one learning step of DeiT-S (batch 128, bf16 autocast) against a dense forward and
backward pass. `learn` starts from the embedded model, learns on scenes of one half of the embedded
garments and is judged on scenes of the other half, against schedules of equal or higher cost.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

import vistoken
from vistoken.eval.record import make_record, write_json
from vistoken.eval.reference import ReferenceScenes, load_reference_model
from vistoken.eval.scenes import TEST_SEED, normalise, render_scenes
from vistoken.graphs import Graphed
from vistoken.latency import LatencyTable
from vistoken.methods import DiffRate, EViT, Method, ToMe
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape
from vistoken.train.costs import FlopsCost
from vistoken.train.learn import RateLearning
from vistoken.train.scenes_data import ScenesData

IMAGENET = 1_281_167
EPOCHS = 3
RECIPE = '{"lr": 0.05, "lr_min": 0.005, "cost_weight": 0.1, "distill": 1.0, "carry": "active"}'
Row = dict[str, Any]


# Steps --------------------------------------------------------------------------------------------


def time_step(step: Callable[[], None], seconds: float, device: torch.device) -> tuple[float, int]:
    """Median milliseconds of a step, and its peak memory in MiB."""
    gpu = device.type == "cuda"
    sync = torch.cuda.synchronize if gpu else (lambda: None)
    for _ in range(3):
        step()
    sync()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        for _ in range(2):
            step()
        sync()
        times.append((time.perf_counter() - start) * 500)
    peak = torch.cuda.max_memory_allocated() // 2**20 if gpu else 0
    return statistics.median(times), peak


def learner(name: str, **options: Any) -> RateLearning:
    """A module without a trainer, ready for steps."""
    module = RateLearning(name, target_speedup=1.6, num_classes=1000, **options)
    module.setup("fit")
    return module


def bench_steps(
    name: str, batch: int, seconds: float, device: torch.device, wanted: list[str] | None
) -> list[Row]:
    """Time and memory of dense and learning steps."""
    torch.manual_seed(0)
    size = 224
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    half = device.type == "cuda"
    cases = {
        "dense forward+backward": None,
        "learn": {},
        "learn, without graphs": {"graph": False},
        "learn, distilled": {"distill": 1.0},
        "learn, features": {"matching": 64},
        "learn, fine-tuned": {"finetune": True},
    }
    rows: list[Row] = []
    for label, options in cases.items():
        if wanted is not None and options is not None and label not in wanted:
            continue
        if options is None:
            model: Any = timm.create_model(name, num_classes=1000).to(device).train()
            optimizer: Any = None
            run: Any = None
        else:
            model = learner(name, **options).to(device).train()
            model._to_device()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            run = model.graphed()

        def step(model: Any = model, optimizer: Any = optimizer, run: Any = run) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                if run is not None:
                    loss = run(images, labels, model.weight)["loss"]
                else:
                    loss = F.cross_entropy(model(images), labels)
            loss.backward()
            if optimizer is not None:
                optimizer.step()
            model.zero_grad(set_to_none=True)

        ms, peak = time_step(step, seconds, device)
        first = rows[0] if rows else {"ms": ms, "peak_mib": peak}
        rows.append({
            "case": f"{name} step", "batch": batch, "dtype": "bf16 autocast" if half else "fp32",
            "method": label, "mode": "eager", "ms": ms, "per_second": batch / ms * 1e3,
            "dense_ms": first["ms"], "times_dense": ms / first["ms"], "peak_mib": peak,
            "times_memory": peak / max(1, first["peak_mib"]),
            "gpu_hours_3_epochs": EPOCHS * IMAGENET / (batch / ms * 1e3) / 3600,
        })  # fmt: skip
        row = rows[-1]
        print(f"{label:24} {ms:8.2f} ms  {row['times_dense']:.2f}x  {peak} MiB "
              f"{row['times_memory']:.2f}x  {row['gpu_hours_3_epochs']:.2f} GPU-hours",
              flush=True)  # fmt: skip
        del model, optimizer, step, run
        if half:
            torch.cuda.empty_cache()
    return rows


# Learning -----------------------------------------------------------------------------------------


class HeldOut:
    """Scenes of the garments that no learning run saw, `per_garment` of each.

    Args:
        per_garment: scenes of every garment.
        limit: garments; None is all 500.
        device: where they are drawn and classified.
    """

    def __init__(self, per_garment: int, limit: int | None, device: torch.device) -> None:
        known = ReferenceScenes()
        self.garments = known.garments[1::2][:limit].to(device)
        self.labels = known.labels[1::2][:limit].to(device)
        self.per_garment = per_garment
        self.model = load_reference_model().to(device)

    @torch.inference_mode()
    def hits(self, method: Method | None) -> tuple[Tensor, Tensor]:
        """Hits and chosen classes `[garments, per_garment]` under a method, in fp32."""
        count = len(self.garments)
        if method is not None:
            vistoken.wrap(self.model, method)
        chosen = []
        for start in range(0, count * self.per_garment, 250):
            end = min(start + 250, count * self.per_garment)
            index = torch.arange(start, end, device=self.garments.device)
            images, _ = render_scenes(self.garments, self.labels, index, TEST_SEED)
            chosen.append(self.model(normalise(images)).argmax(1))
        if method is not None:
            vistoken.unwrap(self.model)
        found = torch.cat(chosen).view(self.per_garment, count).T
        return (found == self.labels[:, None]).double().cpu(), found.cpu()


def paired(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean difference of hits and half its 95 % interval, garments taken as clusters."""
    by_garment = (a - b).mean(1)
    return float(by_garment.mean()), 1.96 * float(by_garment.std()) / math.sqrt(len(by_garment))


def learn(
    label: str, seconds: float, batch: int, device: torch.device, seed: int, **options: Any
) -> tuple[RateLearning, int]:
    """Learn counts of the embedded model; returns the module and its steps."""
    seed_everything(seed, verbose=False)
    module = RateLearning("reference", cost_unit="share", **options)
    data = ScenesData(root="embedded", batch_size=batch, repeats=64)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=-1,
        max_time={"seconds": max(1, round(seconds))}, limit_val_batches=0, logger=False,
        precision="bf16-mixed" if device.type == "cuda" else "32-true", barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    module.cpu()
    counts = module.rates.schedule()
    print(f"  learned {label}: {trainer.global_step} steps, {module.cost.exactly(counts):.4g} "
          f"{module.cost.unit} (target {module.target:.4g}), kept {counts.kept}, removed by "
          f"pruning and merging {counts.removed}", flush=True)  # fmt: skip
    return module, trainer.global_step


def rivals(shape: ModelShape, gflops: float) -> dict[str, Method]:
    """Schedules nobody learned that cost at least as much, or less by rounding of a keep rate."""
    r = next(r for r in range(64, -1, -1) if ToMe(r=r).cost(shape) >= gflops)
    constant = ToMe(r=r).plan(shape)
    halves = [(n + (m - n) // 2, n) for n, m in zip(constant.kept, (shape.tokens, *constant.kept),
                                                    strict=False)]  # fmt: skip
    return {
        "constant r, ToMe": ToMe(r=r),
        "constant r, same operator": DiffRate(
            schedule=Schedule(shape.tokens, shape.prefix, tuple(halves))
        ),
        "keep rate, EViT": EViT.at_gflops(shape, gflops * 1.002),
        "closed form, same operator": DiffRate(schedule=FlopsCost(shape).closest(gflops * 1.002)),
    }


def speed(methods: dict[str, Method], batch: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of the embedded model under each method, bf16 graphs, in turns."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    x = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    runs: dict[str, Any] = {}
    for name, method in {"dense": None, **methods}.items():
        model: nn.Module = load_reference_model().to(device, dtype)
        if method is not None:
            vistoken.wrap(model, method)
        runs[name] = Graphed(model) if on_gpu else model
    sync = torch.cuda.synchronize if on_gpu else (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for turn in range(33 if on_gpu else 3):
            for name, run in runs.items():
                sync()
                start = time.perf_counter()
                for _ in range(5 if on_gpu else 1):
                    run(x)
                sync()
                if turn >= 3 or not on_gpu:
                    times[name].append((time.perf_counter() - start) * (200 if on_gpu else 1e3))
    return {name: statistics.median(taken) for name, taken in times.items()}


def bench_learning(given: argparse.Namespace, device: torch.device) -> list[Row]:
    """Learn at three budgets, by FLOPs and by milliseconds, and judge on held-out garments."""
    shape = vistoken.api.shape_of(load_reference_model())
    held = HeldOut(given.scenes, given.garments, device)
    table, table_file = None, Path(tempfile.mkdtemp()) / "table.json"
    if not given.flops_only:
        model = load_reference_model().to(device, torch.bfloat16 if device.type == "cuda" else None)
        table = LatencyTable.measure(model, batch=given.speed_batch, method="diffrate")
        table.save(table_file)
        print(f"table: dense {table.dense_ms:.3f} ms at batch {given.speed_batch}, "
              f"{table.seconds:.1f} s; {table.execution}")  # fmt: skip
        del model
    dense_hits, dense_classes = held.hits(None)
    print(f"dense top-1 {dense_hits.mean():.4f} on {dense_hits.numel()} scenes of "
          f"{len(dense_hits)} garments", flush=True)  # fmt: skip
    recipe: dict[str, Any] = json.loads(given.recipe)
    rows: list[Row] = []
    for share in given.shares:
        wanted = share * FlopsCost(shape).dense
        module, steps = learn(f"FLOPs {share}", given.seconds, given.batch, device, given.seed,
                              target_gflops=wanted, **recipe)  # fmt: skip
        by_flops = module.method()
        schedule = by_flops.plan(shape)
        methods: dict[str, Method] = {"learned by FLOPs": by_flops}
        more = {"learned by FLOPs": steps}
        for label, change in json.loads(given.variants).items():
            module, steps = learn(label, given.seconds, given.batch, device, given.seed,
                                  target_gflops=wanted, **{**recipe, **change})  # fmt: skip
            methods[label], more[label] = module.method(), steps
        if table is not None:
            module, steps = learn(f"milliseconds of {share}", given.seconds, given.batch, device,
                                  given.seed, cost="latency", latency_table=str(table_file),
                                  target_speedup=table.speedup(schedule), **recipe)  # fmt: skip
            methods["learned by milliseconds"] = module.method()
            more["learned by milliseconds"] = steps
        methods |= rivals(shape, schedule.gflops(shape))
        ms: dict[str, float | None] = dict.fromkeys(("dense", *methods))
        if table is not None:
            ms |= speed(methods, given.speed_batch, device)
        hits = {name: held.hits(method) for name, method in methods.items()}
        for name, method in methods.items():
            own, classes = hits[name]
            gain, half = paired(hits["learned by FLOPs"][0], own)
            plan = method.plan(shape)
            rows.append({
                "case": "reference scenes", "share": share, "method": name,
                "gflops": plan.gflops(shape), "top1": float(own.mean()),
                "agreement": float((classes == dense_classes).double().mean()),
                "dense_top1": float(dense_hits.mean()), "n": own.numel(), "garments": len(own),
                "flops_learned_minus_this": gain, "half_interval95": half, "seed": given.seed,
                "ms": ms[name], "dense_ms": ms["dense"],
                "speedup": ms[name] and ms["dense"] / ms[name],
                "per_second": ms[name] and given.speed_batch / ms[name] * 1e3,
                "batch": given.speed_batch,
                "predicted_ms": table and table.predict(plan), "steps": more.get(name),
                "schedule": plan.to_dict(),
            })  # fmt: skip
            print(f"{share} {name:28} {plan.gflops(shape):.4f} G  top-1 {own.mean():.4f}  "
                  f"agreement {rows[-1]['agreement']:.4f}  {rows[-1]['speedup'] or 0:.3f}x  "
                  f"learned - this {gain:+.4f} +- {half:.4f}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["steps", "learn"])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--step_cases", nargs="*", default=None, help="some of the timed cases")
    parser.add_argument("--step_batch", type=int, default=128)
    parser.add_argument("--step_seconds", type=float, default=3.0, help="per timed case")
    parser.add_argument("--seconds", type=float, default=12.0, help="per learning run")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--speed_batch", type=int, default=256)
    parser.add_argument("--shares", nargs="*", type=float, default=[0.7, 0.55, 0.4])
    parser.add_argument("--scenes", type=int, default=8, help="held-out scenes per garment")
    parser.add_argument("--garments", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default=RECIPE, help="options of RateLearning as JSON")
    parser.add_argument("--flops_only", action="store_true", help="measure no milliseconds")
    parser.add_argument("--variants", default="{}", help="further recipes as JSON, by name")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    if "steps" in given.parts:
        rows += bench_steps(
            given.model, given.step_batch, given.step_seconds, device, given.step_cases
        )
    if "learn" in given.parts:
        rows += bench_learning(given, device)
    record = make_record(device, rows, " ".join(["python", "benchmarks/rates.py", *sys.argv[1:]]))
    name = record["device"]
    tag = "h100" if "H100" in name else name.lower().replace(" ", "-").replace(",", "")
    print(write_json(record, given.out / f"rates-{tag}.json"))


if __name__ == "__main__":
    main()
