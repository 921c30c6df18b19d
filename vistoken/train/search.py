"""Learned counts by one call, for a model and a loader of one's own."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn

from vistoken.errors import ConfigError
from vistoken.latency import LatencyTable
from vistoken.schedule import Schedule
from vistoken.train.judge import better
from vistoken.train.learn import RateLearning
from vistoken.train.masked import twin

LOWEST = {"lr": 0, "target_gflops": 0, "target_speedup": 1}
"""What numbers must be larger than; the others may be 0 too."""


def learn_schedule(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]] | LightningDataModule,
    *,
    target_gflops: float | None = None,
    target_speedup: float | None = None,
    operator: Literal["diffrate", "tome"] = "diffrate",
    cost: Literal["flops", "latency"] = "flops",
    table: LatencyTable | None = None,
    steps: int = 500,
    lr: float = 0.05,
    labels: float = 1.0,
    distill: float = 1.0,
    blocks: Sequence[int] | None = None,
    init: str = "target",
    folder: str | Path | None = None,
) -> Schedule:
    """Learn how many tokens each block of a classifier should keep; the model stays as it is.

    `vistoken.wrap(model, vistoken.DiffRate(schedule=learn_schedule(...)))` runs the result, or with
    `operator="tome"` `vistoken.wrap(model, vistoken.ToMe.from_schedule(learn_schedule(...)))`. It
    learns on a copy, where the model is, in bf16 autocast on a GPU and else in float32. Under
    `torch.no_grad()` it works all the same.

    Args:
        model: a supported classifier that carries no method; with a class token, unless the
            operator is `tome`.
        loader: batches of images `[B, 3, H, W]`, normalised, and classes `[B]`; begun again until
            there were enough. Without `labels` the classes are not looked at.
        target_gflops: wanted GFLOPs of one image; only with `cost="flops"`.
        target_speedup: wanted speed-up over the dense model, of FLOPs or of measured milliseconds.
        operator: whose counts are learned: `diffrate` prunes and merges what the class token
            attends least, `tome` merges what is most alike.
        cost: what the speed-up is of.
        table: block times of this model and operator for `cost="latency"`; None takes this
            machine's, measured at batch 256 if need be.
        steps: batches to learn on.
        lr: learning rate of the logits; falls to a tenth by a cosine.
        labels: weight of the cross-entropy.
        distill: weight of the divergence from the dense model's outputs.
        blocks: blocks whose counts are learned; None takes all that may be.
        init: first counts: `target`, `identity`, a schedule file, or a method like `tome:r=13`.
        folder: where `schedule.json` and `schedule.png` are left; None leaves nothing.

    Returns:
        A schedule that costs the target at most, and as little less as whole counts allow: the
        learned one or, where that is clearly worse on the first batches, the operator's own
        without learning (with a warning).

    Raises:
        ConfigError: an unknown operator, a number out of range, not exactly one target, a table
            without latency, a loader that ran out, or `torch.inference_mode()` here or where the
            model was built.
        ScheduleError: a target out of reach.
        AlreadyWrappedError: the model carries a method.
        UnsupportedBackboneError: no supported vision transformer is in the model.
        UnsupportedMethodError: no class token where the operator reads it, or a head that reads
            neither the class token nor an average.
    """
    _check_numbers(steps, blocks, lr=lr, labels=labels, distill=distill,
                   target_gflops=target_gflops, target_speedup=target_speedup)  # fmt: skip
    _check_gradients(model)
    if table is not None and cost != "latency":
        raise ConfigError("a table was given, but cost='flops'; pass cost='latency' to use it")
    settings = {
        "operator": operator, "cost": cost, "target_gflops": target_gflops,
        "target_speedup": target_speedup, "blocks": blocks, "init": init, "lr": lr,
        "labels": labels, "distill": distill,
    }  # fmt: skip
    return _learn(model, loader, settings, table, steps, folder)


def _learn(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]] | LightningDataModule,
    settings: dict[str, Any],
    table: LatencyTable | None,
    steps: int,
    folder: str | Path | None,
) -> Schedule:
    """The learning run of `learn_schedule`, whose arguments these are."""
    # Lightning turns gradients on and leaves them on; here they are again as the caller has them.
    with torch.enable_grad(), tempfile.TemporaryDirectory() as scratch:
        path = None if table is None else table.save(Path(scratch) / "table.json")
        module = RateLearning(
            backbone=twin(model, shared=False).float(),
            latency_table=None if path is None else str(path),
            cost_weight=0.1,
            cost_unit="share",
            carry="active",
            lr_min=settings["lr"] / 10,
            **settings,
        )
        trainer = _trainer(model, steps, Path(folder or scratch))
        trainer.fit(module, loader if isinstance(loader, LightningDataModule) else Passes(loader))
        assert module.cost is not None
        learned = module.rates.schedule()
        met = module.cost.meet(learned, module.target, module.rates.allowed)
        met = better(module, met, _batches(loader))
        if folder is not None:
            met.save(Path(folder) / "schedule.json")
    return met


def _batches(
    loader: Iterable[tuple[Tensor, Tensor]] | LightningDataModule,
) -> Iterable[tuple[Tensor, Tensor]]:
    """The training batches of a loader or of a module of data that was set up."""
    if isinstance(loader, LightningDataModule):
        found: Iterable[tuple[Tensor, Tensor]] = loader.train_dataloader()
        return found
    return loader


class Passes:
    """A loader as one object, whatever iterable it is: Lightning takes a list for several loaders.

    Args:
        loader: batches.
    """

    def __init__(self, loader: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        empty = True
        for batch in self.loader:
            empty = False
            yield batch
        if empty:
            raise ConfigError(
                "loader: a pass gave no batch, and more steps are wanted; must be an iterable that "
                "can be begun again, not an iterator that runs out"
            )


def _check_numbers(steps: int, blocks: Sequence[int] | None, **amounts: float | None) -> None:
    """Raise `ConfigError` for numbers of another kind or range, whatever the model."""
    if not _is_whole(steps) or steps < 1:
        raise ConfigError(f"steps={steps!r}: must be a whole number, 1 or larger")
    if blocks is not None and not (isinstance(blocks, Collection) and all(map(_is_whole, blocks))):
        raise ConfigError(f"blocks={blocks!r}: must be rising whole numbers, or None")
    for name, value in amounts.items():
        if value is None and name.startswith("target"):
            continue
        known = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        least = LOWEST.get(name)
        if not known or (value < 0 if least is None else value <= least):  # type: ignore[operator]
            allowed = "0 or larger" if least is None else f"larger than {least}"
            raise ConfigError(f"{name}={value!r}: must be a finite number, {allowed}")


def _is_whole(value: object) -> bool:
    """True for whole numbers, numpy's too, not for booleans."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_gradients(model: nn.Module) -> None:
    """Raise `ConfigError` where autograd can record nothing."""
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "learn_schedule was called under torch.inference_mode(), which records no gradients; "
            "call it outside, or under torch.no_grad()"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ConfigError(
                f"model: {name} was made under torch.inference_mode(), so that no gradient passes "
                "it; build or load the model outside"
            )


def _trainer(model: nn.Module, steps: int, folder: Path) -> Trainer:
    """A quiet trainer of one process on the device of the model."""
    device = next(model.parameters()).device
    on: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
    if device.type == "cuda":
        on = {"accelerator": "gpu", "devices": [device.index or 0], "precision": "bf16-mixed"}
    return Trainer(
        **on,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
