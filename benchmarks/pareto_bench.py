"""What a sweep measures with: models, pictures on the device, graphs, clocks and scores."""

from __future__ import annotations

import base64
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import vistoken
from vistoken.api import attachment_of, shape_of
from vistoken.errors import ConfigError
from vistoken.eval.intervals import wilson_interval
from vistoken.flops import count_macs
from vistoken.graphs import Graphed
from vistoken.latency import LatencyTable
from vistoken.methods import Method
from vistoken.train.memory import MemoryImages, normalised, read_images

Run = Callable[[Tensor], Tensor]
Row = dict[str, Any]
MIB = 2**20


class Bench:
    """The model on its device, its latency tables, and how it is run.

    Args:
        config: the configuration file's content.
        device: where everything runs; on CUDA in bf16 and as CUDA graphs.
        folder: where latency tables are kept.
        seconds: timing of a row.
    """

    def __init__(self, config: dict[str, Any], device: str, folder: Path, seconds: float) -> None:
        self.config, self.device, self.folder = config, torch.device(device), folder
        self.seconds, self.batch = seconds, int(config["batch"])
        self.name, self.size = str(config["model"]), int(config["image_size"])
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.model = self._build(None)
        self.shape = shape_of(self.model)
        self.dense_gflops = count_macs(self.shape) / 1e9
        self.tables: dict[str, LatencyTable] = {}
        self.loaded: str | None = None
        self.dense: Run | None = None

    def _build(self, checkpoint: str | None) -> nn.Module:
        """A model of the configuration in fp32 on the host."""
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise ConfigError(f"checkpoint={checkpoint!r}: there is no such file")
        options = {"num_classes": self.config["num_classes"], **self.config["model_args"]}
        model: nn.Module = timm.create_model(self.name, checkpoint_path=checkpoint, **options)
        return model.eval().requires_grad_(False)

    def load(self, task: Task) -> nn.Module:
        """The model with a task's weights, without a method; one model for all rows of a task."""
        if self.loaded != task.name:
            self.model = self._build(task.checkpoint).to(self.device, self.dtype)
            self.loaded = task.name
            self.dense = capture(self.model, self.on_gpu)
        elif attachment_of(self.model) is not None:
            vistoken.unwrap(self.model)
        return self.model

    def run(self, model: nn.Module, method: Method | None, compiled: bool = False) -> Run:
        """A model under a method, ready to run; `compiled` is for the dense model."""
        if compiled:
            built: nn.Module = torch.compile(model)  # type: ignore[assignment]
            return capture(built, self.on_gpu)
        if method is None:
            return self.dense if model is self.model and self.dense else capture(model, self.on_gpu)
        return capture(vistoken.wrap(model, method), self.on_gpu)

    def table(self, method: str) -> LatencyTable:
        """Block times of this model under a method, measured once per machine."""
        if method not in self.tables:
            if attachment_of(self.model) is not None:
                vistoken.unwrap(self.model)
            self.model.to(self.device, self.dtype)
            x = torch.randn(self.batch, 3, self.size, self.size).to(self.device, self.dtype)
            table = LatencyTable.cached(
                self.model, x, method=method, folder=self.folder, **self.config["table"]
            )
            self.tables[method] = table
            table.save(self.table_file(method))
            print(
                f"table {method}: dense {table.dense_ms:.3f} ms, {table.seconds:.1f} s", flush=True
            )
        return self.tables[method]

    def table_file(self, method: str) -> Path:
        """Where a table lies."""
        return self.folder / f"{method}.json"


@dataclass
class Task:
    """One data set: pictures to judge by, and where its weights and training pictures are.

    Attributes:
        name: its name in the configuration.
        checkpoint: fine-tuned weights.
        images: `[n, 3, H, W]`, normalised, on the device in the model's dtype.
        labels: `[n]` on the host.
        data: its part of the configuration.
        dense_classes: what the dense model says, `[n]`.
    """

    name: str
    checkpoint: str
    images: Tensor
    labels: Tensor
    data: dict[str, Any]
    bench: Bench
    limit: int | None = None
    dense_classes: Tensor | None = None
    tables: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(name: str, config: dict[str, Any], limit: int | None, bench: Bench) -> Task:
        """Read a data set's pictures."""
        data = config["data"][name]
        read = [read_images(data["root"], split, data["stored"], config["num_workers"], limit)
                for split in data["splits"]]  # fmt: skip
        images, labels = (torch.cat(part) for part in zip(*read, strict=True))
        ready = [normalised(part.to(bench.device), bench.size).to(bench.dtype)
                 for part in images.split(500)]  # fmt: skip
        return Task(name, data["checkpoint"], torch.cat(ready), labels, data, bench, limit)

    def training(self, batch: int, scale: list[float]) -> MemoryImages:
        """Its training pictures, read once."""
        config = self.bench.config
        data = MemoryImages(
            self.data["root"], num_classes=config["num_classes"], stored=self.data["stored"],
            image_size=self.bench.size, batch_size=batch, num_workers=config["num_workers"],
            limit=self.limit, scale=scale,
        )  # fmt: skip
        data.tables = self.tables
        return data


@torch.no_grad()
def predictions(run: Run, images: Tensor, batch: int, seed: int) -> Tensor:
    """Classes `[n]` on the host; the last batch is filled up, so that one graph serves all."""
    torch.manual_seed(seed)
    found = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        missing = batch - len(part)
        if missing:
            part = torch.cat([part, images[torch.arange(missing) % len(images)]])
        found.append(run(part).argmax(1)[: batch - missing])
    return torch.cat(found).cpu()


def score(classes: Tensor, task: Task) -> Row:
    """Top-1 with its 95 % interval, and the paired comparison with the dense model."""
    assert task.dense_classes is not None
    hits, dense = ((c == task.labels).double() for c in (classes, task.dense_classes))
    count = len(hits)
    low, high = wilson_interval(int(hits.sum()), count)
    gain = hits - dense
    half = 1.96 * float(gain.std(unbiased=False)) / math.sqrt(count)
    return {
        "top1": float(hits.mean()), "top1_low95": low, "top1_high95": high,
        "dense_top1": float(dense.mean()), "minus_dense": float(gain.mean()),
        "minus_dense_half95": half, "n": count,
        "agreement": float((classes == task.dense_classes).double().mean()),
        "hits": pack(hits > 0),
    }  # fmt: skip


def pack(hits: Tensor) -> str:
    """Which pictures were hit, `[n]` bool, as text: bits, eight to a byte, in base64."""
    return base64.b64encode(np.packbits(hits.numpy()).tobytes()).decode()


@torch.no_grad()
def measure_speed(dense: Run, run: Run, model: nn.Module, x: Tensor, seconds: float) -> Row:
    """Medians of a run and of the dense run, taken in turns, and the memory of one plain pass.

    Args:
        dense: the dense model, ready to run.
        run: the other.
        model: the module behind `run`.
        x: one batch.
        seconds: how long to take turns.
    """
    times: tuple[list[float], list[float]] = ([], [])
    on_gpu = x.device.type == "cuda"
    clock = _cuda_ms if on_gpu else _wall_ms
    for call in (dense, run, dense, run):
        clock(call, x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for call, taken in zip((dense, run), times, strict=True):
            taken.append(clock(call, x))
    dense_ms, own = map(statistics.median, times)
    return {
        "mode": "graph" if isinstance(run, Graphed) else "eager", "ms": own,
        "per_second": len(x) / own * 1e3, "dense_ms": dense_ms,
        "speedup": statistics.median(d / o for d, o in zip(*times, strict=True)),
        "peak_mib": peak_mib(model, x) if on_gpu else None,
    }  # fmt: skip


def capture(model: nn.Module, on_gpu: bool) -> Run:
    """A model as it is run: a CUDA graph, or plain calls without gradient."""
    return Graphed(model) if on_gpu else torch.no_grad()(model.forward)


def peak_mib(model: nn.Module, x: Tensor) -> float:
    """Memory of one plain pass in MiB: weights, and the most that the pass allocates."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(x)
    torch.cuda.synchronize()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (torch.cuda.max_memory_allocated() - before + weights) / MIB


def _cuda_ms(run: Run, x: Tensor) -> float:
    """Device time of one call in milliseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run(x)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _wall_ms(run: Run, x: Tensor) -> float:
    """Wall time of one call in milliseconds."""
    begin = time.perf_counter()
    run(x)
    return (time.perf_counter() - begin) * 1e3
