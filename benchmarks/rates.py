"""What learning counts costs, and what it brings on scenes of garments.

    python benchmarks/rates.py --out benchmarks/results --root path/to/fashion-mnist

`steps` times one learning step of DeiT-S (batch 128, bf16 autocast) against a dense forward and
backward pass, and compares the memory. `learn` takes the embedded model and learns counts by FLOPs
and by milliseconds; both are judged on garments that neither model nor counts have seen, against
schedules of equal or higher cost. Rows are written as they come; `--resume FILE` keeps the rows of
an earlier file and does the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from rates_figure import draw
from torch import Tensor, nn

import vistoken
from vistoken.eval.record import make_record, write_json
from vistoken.eval.reference import ReferenceScenes, load_reference_model
from vistoken.eval.scenes import TEST_SEED, load_fashion_mnist, normalise, render_scenes
from vistoken.graphs import Graphed
from vistoken.latency import LatencyTable
from vistoken.methods import DiffRate, EViT, Method, ToMe
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape
from vistoken.train.costs import FlopsCost
from vistoken.train.learn import RateLearning
from vistoken.train.operators import OPERATORS
from vistoken.train.scenes_data import ScenesData
from vistoken.train.search import learn_schedule

IMAGENET = 1_281_167
EPOCHS = 3
MIB = 2**20
BY_FLOPS, BY_MS = "learned by FLOPs", "learned by milliseconds"
Row = dict[str, Any]


class Journal:
    """The rows so far, in a file that is whole at any time.

    Args:
        path: the file.
        device: where the rows come from.
        rows: of an earlier run.
        seconds: time for everything.
    """

    def __init__(self, path: Path, device: torch.device, rows: Sequence[Row], seconds: float):
        self.path, self.device, self.rows = path, device, list(rows)
        self.end = time.perf_counter() + seconds
        self.words = " ".join(["python", "benchmarks/rates.py", *sys.argv[1:]])

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.perf_counter()

    def find(self, **key: Any) -> list[Row]:
        """Rows with these values."""
        return [row for row in self.rows if all(row.get(k) == v for k, v in key.items())]

    def put(self, rows: Sequence[Row], *key: str) -> None:
        """Write rows; those of the same `key` go."""
        new = {tuple(row[k] for k in key) for row in rows}
        self.rows = [r for r in self.rows if tuple(r.get(k) for k in key) not in new] + list(rows)
        write_json(make_record(self.device, self.rows, self.words), self.path)


# Steps --------------------------------------------------------------------------------------------


def time_step(step: Callable[[], None], seconds: float, device: torch.device) -> float:
    """Median milliseconds of a step, the first three aside."""
    sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for _ in range(3):
        step()
    sync()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        for _ in range(2):
            step()
        sync()
        times.append((time.perf_counter() - start) * 500)
    return statistics.median(times)


def make_step(
    name: str, options: dict[str, Any] | None, batch: int, device: torch.device
) -> Callable[[], None]:
    """A learning step, or with options None a dense forward and backward pass."""
    half = device.type == "cuda"
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    if options is None:
        dense = timm.create_model(name, num_classes=1000).to(device).train()

        def dense_step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = F.cross_entropy(dense(images), labels)
            loss.backward()
            dense.zero_grad(set_to_none=True)

        return dense_step
    model: Any = RateLearning(name, target_speedup=1.6, num_classes=1000, **options)
    model.setup("fit")
    model = model.to(device).train()
    model._to_device()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    run = model.graphed()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = run(images, labels, model.weight)["loss"]
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


STEPS: dict[str, dict[str, Any] | None] = {
    "dense forward+backward": None,
    "learn": {},
    "learn, distilled": {"distill": 1.0},
    "learn, features": {"matching": 64},
    "learn, fine-tuned": {"finetune": True},
    "learn, without graphs": {"graph": False},
}


def bench_steps(given: argparse.Namespace, device: torch.device, journal: Journal) -> None:
    """Time and memory of dense and learning steps."""
    gpu, case, dense = device.type == "cuda", f"{given.model} step", "dense forward+backward"
    for label in [dense, *(case for case in given.step_cases if case != dense)]:
        if journal.find(case=case, method=label) or journal.left < 10:
            continue
        torch.manual_seed(0)
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        # What another case left behind is not this one's.
        before = torch.cuda.memory_reserved() if gpu else 0
        step = make_step(given.model, STEPS[label], given.step_batch, device)
        ms = time_step(step, given.step_seconds, device)
        reserved = (torch.cuda.max_memory_reserved() - before) // MIB if gpu else 0
        allocated = torch.cuda.max_memory_allocated() // MIB if gpu else 0
        del step
        found = journal.find(case=case, method=dense)
        first = found[0] if found else {"ms": ms, "reserved_mib": reserved}
        row = {
            "case": case, "batch": given.step_batch, "method": label, "mode": "eager",
            "dtype": "bf16 autocast" if gpu else "fp32", "ms": ms,
            "per_second": given.step_batch / ms * 1e3,
            "dense_ms": first["ms"], "times_dense": ms / first["ms"],
            "reserved_mib": reserved, "allocated_mib": allocated,
            "times_memory": reserved / max(1, first["reserved_mib"]),
            "gpu_hours_3_epochs": EPOCHS * IMAGENET / (given.step_batch / ms * 1e3) / 3600,
        }  # fmt: skip
        journal.put([row], "case", "method")
        print(f"{label:24} {ms:8.2f} ms  {row['times_dense']:.2f}x  reserved {reserved} MiB "
              f"({row['times_memory']:.2f}x), allocated {allocated} MiB  "
              f"{row['gpu_hours_3_epochs']:.2f} GPU-hours", flush=True)  # fmt: skip


# Learning -----------------------------------------------------------------------------------------


class HeldOut:
    """Scenes that no learning run saw, drawn once and kept.

    Args:
        root: folder of Fashion-MNIST, whose test garments are taken; None takes every other
            garment of the package.
        per_garment: scenes of every garment.
        limit: garments; None is all.
        device: where they are drawn and classified.
    """

    def __init__(
        self, root: str | None, per_garment: int, limit: int | None, device: torch.device
    ) -> None:
        if root is None:
            known = ReferenceScenes()
            garments, labels = known.garments[1::2], known.labels[1::2]
        else:
            garments, labels = load_fashion_mnist(root, "test")
        garments, self.labels = garments[:limit].to(device), labels[:limit].to(device)
        self.per_garment = per_garment
        self.model = load_reference_model().to(device)
        total = len(garments) * per_garment
        self.images = [
            normalise(render_scenes(garments, self.labels, index, TEST_SEED)[0])
            for index in torch.arange(total, device=device).split(250)
        ]
        self.dense = self.outputs(None)

    @torch.inference_mode()
    def outputs(self, method: Method | None) -> Tensor:
        """Log-probabilities `[garments * scenes, classes]` under a method, in fp32."""
        if method is not None:
            vistoken.wrap(self.model, method)
        found = torch.cat([self.model(images) for images in self.images]).log_softmax(-1)
        if method is not None:
            vistoken.unwrap(self.model)
        return found

    def scores(self, found: Tensor) -> dict[str, Tensor]:
        """`[garments, scenes]`: hits, agreement with dense, divergence from dense, loss."""
        labels = self.labels.repeat(self.per_garment)
        values = {
            "top1": (found.argmax(1) == labels).double(),
            "agreement": (found.argmax(1) == self.dense.argmax(1)).double(),
            "divergence": F.kl_div(found, self.dense, log_target=True, reduction="none").sum(1),
            "loss": F.nll_loss(found, labels, reduction="none"),
        }
        shape = (self.per_garment, len(self.labels))
        return {name: value.view(shape).T.double().cpu() for name, value in values.items()}


def paired(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean difference and half its 95 % interval, garments taken as clusters."""
    by_garment = (a - b).mean(1)
    return float(by_garment.mean()), 1.96 * float(by_garment.std()) / math.sqrt(len(by_garment))


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
        for turn in range(43 if on_gpu else 2):
            for name, run in runs.items():
                sync()
                start = time.perf_counter()
                for _ in range(5 if on_gpu else 1):
                    run(x)
                sync()
                if turn >= 3 or not on_gpu:
                    times[name].append((time.perf_counter() - start) * (200 if on_gpu else 1e3))
    return {name: statistics.median(taken) for name, taken in times.items()}


class Learning:
    """Counts at several budgets, judged on the same scenes.

    Args:
        given: options of the command line.
        device: where to learn.
        journal: takes the rows.
    """

    def __init__(self, given: argparse.Namespace, device: torch.device, journal: Journal) -> None:
        self.given, self.device, self.journal = given, device, journal
        self.operator = OPERATORS[given.operator]
        self.shape = vistoken.api.shape_of(load_reference_model())
        self.held = HeldOut(given.root, given.scenes, given.garments, device)
        self.table: LatencyTable | None = None
        self.scores: dict[str, dict[str, Tensor]] = {}
        hits = self.held.scores(self.held.dense)["top1"]
        self.dense_top1 = float(hits.mean())
        print(f"dense top-1 {hits.mean():.4f} on {hits.numel()} scenes of {len(hits)} garments",
              flush=True)  # fmt: skip

    def measure_table(self) -> None:
        """The block times of the embedded model on this machine."""
        if self.given.flops_only:
            return
        dtype = torch.bfloat16 if self.device.type == "cuda" else None
        model = load_reference_model().to(self.device, dtype)
        batch = self.given.speed_batch
        self.table = LatencyTable.measure(model, batch=batch, method=self.given.operator)
        print(f"table: dense {self.table.dense_ms:.3f} ms at batch {batch}, "
              f"{self.table.seconds:.1f} s; {self.table.execution}", flush=True)  # fmt: skip

    def learn(self, label: str, **target: Any) -> Schedule:
        """Counts for a target."""
        given, start = self.given, time.perf_counter()
        seed_everything(given.seed, verbose=False)
        data = ScenesData(root=given.root or "embedded", batch_size=given.batch,
                          repeats=1 if given.root else 64)  # fmt: skip
        counts = learn_schedule(load_reference_model().to(self.device), data, steps=given.steps,
                                labels=given.labels, operator=given.operator,
                                **target)  # fmt: skip
        print(f"  {label}: {time.perf_counter() - start:.1f} s for {given.steps} steps, "
              f"{counts.gflops(self.shape):.4f} G, kept {counts.kept}, removed by pruning and "
              f"merging {counts.removed}", flush=True)  # fmt: skip
        return counts

    def budget(self, share: float) -> None:
        """Learn at one budget, twice, and judge."""
        wanted = share * FlopsCost(self.shape).dense
        counts = self.learn(f"FLOPs {share}", target_gflops=wanted)
        methods: dict[str, Method] = {BY_FLOPS: self.operator.build(counts)}
        methods |= rivals(self.shape, counts.gflops(self.shape))
        self.scores = {name: self.judge(method) for name, method in methods.items()}
        self.note(share, methods, {})
        if self.table is None or self.journal.left < 20:
            return
        counts = self.learn(f"milliseconds of {share}", cost="latency", table=self.table,
                            target_speedup=self.table.speedup(counts))  # fmt: skip
        methods[BY_MS] = self.operator.build(counts)
        self.scores[BY_MS] = self.judge(methods[BY_MS])
        timed = self.journal.left > 15
        ms = speed(methods, self.given.speed_batch, self.device) if timed else {}
        self.note(share, methods, ms)

    def judge(self, method: Method) -> dict[str, Tensor]:
        """Scores on the held-out scenes."""
        return self.held.scores(self.held.outputs(method))

    def note(self, share: float, methods: dict[str, Method], ms: dict[str, float]) -> None:
        """Write the rows of methods that were judged."""
        best, rows, given = self.scores[BY_FLOPS], [], self.given
        for name, method in methods.items():
            own, plan = self.scores[name], method.plan(self.shape)
            row: Row = {
                "case": case_of(given), "share": share, "method": name, "seed": given.seed,
                "gflops": plan.gflops(self.shape), "n": own["top1"].numel(),
                "garments": len(own["top1"]), "steps": given.steps if "learned" in name else None,
                **{key: float(value.mean()) for key, value in own.items()},
                "dense_top1": self.dense_top1,
                "batch": given.speed_batch, "ms": ms.get(name), "dense_ms": ms.get("dense"),
                "speedup": ms["dense"] / ms[name] if ms else None,
                "per_second": given.speed_batch / ms[name] * 1e3 if ms else None,
                "predicted_ms": self.table and self.table.predict(plan),
                "schedule": plan.to_dict(),
            }  # fmt: skip
            for key in ("top1", "divergence", "loss"):
                gain, half = paired(best[key], own[key])
                row[f"{key}_flops_learned_minus_this"], row[f"{key}_half_interval95"] = gain, half
            rows.append(row)
            print(f"{share} {name:28} {row['gflops']:.4f} G  top-1 {row['top1']:.4f}  "
                  f"{row['speedup'] or 0:.3f}x  learned - this: top-1 "
                  f"{row['top1_flops_learned_minus_this']:+.4f} +- "
                  f"{row['top1_half_interval95']:.4f}, divergence "
                  f"{row['divergence_flops_learned_minus_this']:+.5f} +- "
                  f"{row['divergence_half_interval95']:.5f}", flush=True)  # fmt: skip
        self.journal.put(rows, "case", "share", "method", "seed")


def case_of(given: argparse.Namespace) -> str:
    """Name of the rows of learning runs."""
    return "reference scenes" + ("" if given.operator == "diffrate" else f", {given.operator}")


def bench_learning(given: argparse.Namespace, device: torch.device, journal: Journal) -> None:
    """Learn at every budget that has no rows yet, while there is time."""
    wanted = BY_FLOPS if given.flops_only else BY_MS
    key = {"case": case_of(given), "method": wanted, "seed": given.seed}
    todo = [share for share in given.shares if not journal.find(share=share, **key)]
    if not todo or journal.left < 30:
        return
    learning = Learning(given, device, journal)
    learning.measure_table()
    longest = 0.0
    for share in todo:
        if journal.left < max(30.0, 0.6 * longest):
            print(f"{share}: left out, {journal.left:.0f} s remain", flush=True)
            continue
        start = time.perf_counter()
        learning.budget(share)
        longest = max(longest, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["steps", "learn"])
    parser.add_argument("--seconds", type=float, default=350.0, help="for everything")
    parser.add_argument("--resume", type=Path, default=None, help="results to go on from")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--step_cases", nargs="*", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--step_batch", type=int, default=128)
    parser.add_argument("--step_seconds", type=float, default=1.0, help="per timed case")
    parser.add_argument("--root", default=None, help="Fashion-MNIST; None: the embedded garments")
    parser.add_argument("--operator", choices=list(OPERATORS), default="diffrate")
    parser.add_argument("--steps", type=int, default=500, help="per learning run")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--labels", type=float, default=1.0, help="weight of the cross-entropy")
    parser.add_argument("--speed_batch", type=int, default=256)
    parser.add_argument("--shares", nargs="*", type=float, default=[0.4, 0.55, 0.7])
    parser.add_argument("--scenes", type=int, default=2, help="held-out scenes per garment")
    parser.add_argument("--garments", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flops_only", action="store_true", help="measure no milliseconds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    tag = "h100" if "H100" in name else name.lower().replace(" ", "-")
    rows = json.loads(given.resume.read_text())["rows"] if given.resume else []
    journal = Journal(given.out / f"rates-{tag}.json", device, rows, given.seconds)
    if "steps" in given.parts:
        bench_steps(given, device, journal)
    if "learn" in given.parts:
        bench_learning(given, device, journal)
    draw(journal.rows, given.out / f"rates-{tag}.png")
    print(journal.path)


if __name__ == "__main__":
    main()
