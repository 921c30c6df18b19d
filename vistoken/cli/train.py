"""Command line of the trainer: every argument of the module, data and Trainer is an option."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

# Imported so that configurations may name them without their module.
from vistoken.train.classifier import Classifier as Classifier
from vistoken.train.images import ImagesData as ImagesData
from vistoken.train.learn import RateLearning as RateLearning
from vistoken.train.memory import MemoryImages as MemoryImages
from vistoken.train.scenes_data import ScenesData as ScenesData
from vistoken.train.vqa import VqaTraining as VqaTraining
from vistoken.train.vqa_data import EasyVqaData as EasyVqaData
from vistoken.train.vqa_data import FashionVqaData as FashionVqaData


class TrainCLI(LightningCLI):  # type: ignore[misc]
    """Lightning's command line that keeps `last.ckpt` in the run's folder."""

    def instantiate_trainer(self, **given: Any) -> Trainer:
        """Build the trainer; checkpoints without a folder of their own go to the run's."""
        trainer = super().instantiate_trainer(**given)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = trainer.default_root_dir
        return trainer

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
        LightningModule,
        LightningDataModule,
        args=None if args is None else list(args),
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
    )
