"""What a sweep trains: counts for a budget, and weights under a method."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer, seed_everything
from pareto_bench import Bench, Task
from torch import nn

from vistoken.api import attachment_of, unwrap
from vistoken.methods import Method
from vistoken.train.classifier import Classifier
from vistoken.train.learn import RateLearning
from vistoken.train.memory import MemoryImages

Row = dict[str, Any]


def fit(
    bench: Bench, module: LightningModule, data: MemoryImages, folder: Path | None, **limits: Any
) -> Row:
    """Train; returns steps and seconds."""
    begin = time.perf_counter()
    trainer = Trainer(
        accelerator="gpu" if bench.on_gpu else "cpu", devices=1, default_root_dir=folder,
        precision="bf16-mixed" if bench.on_gpu else "32-true", limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **limits,
    )  # fmt: skip
    trainer.fit(module, data)
    return {"steps": trainer.global_step, "train_seconds": time.perf_counter() - begin}


def learn_counts(bench: Bench, task: Task, folder: Path, target: Row) -> tuple[Method, Row]:
    """Learn counts that meet a target, on the task's training pictures.

    Args:
        bench: model and device.
        task: data set and weights.
        folder: where schedule and picture go.
        target: options of `RateLearning` that say what is to be met.

    Returns:
        The method, and what is to be noted about the run.
    """
    options, config = bench.config["learn"], bench.config
    seed_everything(config["seed"], verbose=False)
    module = RateLearning(
        bench.name, checkpoint=task.checkpoint, num_classes=config["num_classes"],
        model_args=config["model_args"], **options["recipe"], **target,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    limit = {"seconds": max(1, round(options["seconds"]))}
    data = task.training(options["batch"], options["scale"])
    notes = fit(bench, module, data, folder, max_epochs=-1, max_time=limit)
    module.cpu()
    assert module.cost is not None
    counts = module.cost.meet(module.rates.schedule(), module.target, module.rates.allowed)
    notes |= {"target": module.target, "met": module.cost.exactly(counts),
              "unit": module.cost.unit}  # fmt: skip
    return module.operator.build(counts), notes


def tune(bench: Bench, task: Task, method: Method | None) -> tuple[nn.Module, Row]:
    """Train the task's weights further under a method; returns the model without it."""
    options, config = bench.config["tune"], bench.config
    seed_everything(config["seed"], verbose=False)
    module = Classifier(
        bench.name, config["num_classes"], config["model_args"], checkpoint=task.checkpoint,
        method=None if method is None else method.to_string(), **options["recipe"],
    )  # fmt: skip
    data = task.training(options["batch"], options["scale"])
    notes = fit(bench, module, data, None, max_epochs=options["epochs"])
    model = module.evaluation_net()
    if attachment_of(model) is not None:
        unwrap(model)
    return model.eval().requires_grad_(False).to(bench.device, bench.dtype), notes
