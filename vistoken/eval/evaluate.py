"""The evaluation itself: one pass over the data, every method on every batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from vistoken.api import unwrap, wrap
from vistoken.errors import ConfigError
from vistoken.eval.cases import Case
from vistoken.eval.fidelity import Scores
from vistoken.eval.options import EvalOptions
from vistoken.eval.sources import make_loader
from vistoken.methods import Method
from vistoken.models.load import Classifier
from vistoken.state import Fill

Tick = Callable[[], None]


class Evaluation(LightningModule):  # type: ignore[misc]
    """Runs the dense model and every case on each batch and keeps their metrics.

    Dense logits are computed once a batch; each method is put on the same model and taken off
    again, so there is one set of weights.

    Args:
        model: images `[B, 3, H, W]` to logits `[B, classes]`.
        cases: the dense case first.
        num_classes: length of a row of logits.
        seed: seed of methods that draw at random; each batch has its own, whatever the other cases.
        fill: see `vistoken.wrap`.
        limit: images to use of a stream; None is all.
        tick: called after every case of every batch.
    """

    def __init__(
        self,
        model: nn.Module,
        cases: Sequence[Case],
        num_classes: int,
        *,
        seed: int = 0,
        fill: Fill = "nearest",
        limit: int | None = None,
        tick: Tick = lambda: None,
    ) -> None:
        super().__init__()
        self.model = model
        self.cases = list(cases)
        self.num_classes = num_classes
        self.scores: Sequence[Scores] = nn.ModuleList(Scores(num_classes) for _ in cases)  # type: ignore[assignment]
        self.base_seed = seed
        self.fill: Fill = fill
        self.left = limit
        self.tick = tick
        self.results: list[dict[str, float | int]] = []

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Dense logits, then those of every case."""
        images, labels = batch
        if self.left is not None:
            images, labels = images[: self.left], labels[: self.left]
            self.left -= len(images)
        if len(images) == 0:
            return
        self.check_labels(labels)
        dense: Tensor = self.model(images)
        for case, scores in zip(self.cases, self.scores, strict=True):
            logits = dense if case.method is None else self.reduced(case.method, images, batch_idx)
            scores.update(logits, labels, dense)
            self.tick()

    def reduced(self, method: Method, images: Tensor, batch_idx: int) -> Tensor:
        """Logits `[B, classes]` of the model under a method."""
        devices = [images.device] if images.device.type == "cuda" else []
        wrap(self.model, method, fill=self.fill)
        try:
            with torch.random.fork_rng(devices):
                seed = self.base_seed + batch_idx * self.trainer.world_size + self.global_rank
                torch.manual_seed(seed)
                logits: Tensor = self.model(images)
        finally:
            unwrap(self.model)
        return logits

    def check_labels(self, labels: Tensor) -> None:
        """Raise `ConfigError` for classes that the model does not have."""
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise ConfigError(
                f"the data has class {low if low < 0 else high}, the model tells "
                f"{self.num_classes} classes apart (0 is the first); check --class_map, "
                "--num_classes and the labels"
            )

    def on_test_epoch_end(self) -> None:
        """Join the metrics of all processes."""
        self.results = [scores.compute() for scores in self.scores]


def make_trainer(options: EvalOptions) -> Trainer:
    """A quiet Lightning trainer that leaves the sharing of the data to `Share`.

    Raises:
        ConfigError: Lightning refuses accelerator, devices or precision.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    devices: Any = options.devices if not options.devices.isdigit() else int(options.devices)
    try:
        return Trainer(
            accelerator=options.accelerator,
            devices=devices,
            precision=options.precision,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except Exception as error:
        raise ConfigError(
            f"--accelerator {options.accelerator} --devices {options.devices} --precision "
            f"{options.precision}: {error}"
        ) from error


def evaluate(
    classifier: Classifier,
    data: Any,
    cases: Sequence[Case],
    options: EvalOptions,
    trainer: Trainer,
    tick: Tick = lambda: None,
) -> list[dict[str, float | int]]:
    """Metrics of every case over the data set.

    Args:
        classifier: the model, without a method.
        data: a data set (or stream) of images `[3, H, W]` and classes.
        cases: the dense case first.
        options: batch size, workers, seed, limit.
        trainer: from `make_trainer`; several processes share the data without repeats.
        tick: called after every case of every batch.

    Returns:
        For each case `top1`, `top5`, `agreement`, `kl` and `n`.

    Raises:
        ConfigError: labels that the model does not have, or a data set without images.
    """
    stream = isinstance(data, IterableDataset)
    module = Evaluation(
        classifier.model,
        cases,
        classifier.num_classes,
        seed=options.seed,
        fill=options.fill,  # type: ignore[arg-type]
        limit=options.limit if stream else None,
        tick=tick,
    )
    loader = make_loader(data, options, trainer.global_rank, trainer.world_size)
    if stream and options.limit is not None:
        trainer.limit_test_batches = -(-options.limit // options.batch_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer.test(module, dataloaders=loader, verbose=False)
    if not module.results or module.results[0]["n"] == 0:
        raise ConfigError(f"--data {options.data} --split {options.split} holds no images")
    return module.results
