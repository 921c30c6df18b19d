"""Command line of the trainer: every argument of the module, data and Trainer is an option."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.cli import LightningCLI

from vistoken.train.classifier import Classifier
from vistoken.train.scenes_data import ScenesData


class TrainCLI(LightningCLI):  # type: ignore[misc]
    """Lightning's command line that leaves `last.ckpt` in the run's folder after a fit."""

    def after_fit(self) -> None:
        """Save the last state, also where a step or time limit ended the run inside an epoch."""
        self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "last.ckpt")


def main(args: Sequence[str] | None = None) -> TrainCLI:
    """Run `fit`, `validate` or `test` as the command line says.

    Args:
        args: Arguments to use instead of those of the process.

    Returns:
        The finished command line with its `trainer`, `model` and `datamodule`.
    """
    torch.set_float32_matmul_precision("high")
    return TrainCLI(
        Classifier,
        ScenesData,
        args=None if args is None else list(args),
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
    )
