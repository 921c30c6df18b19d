"""Scenes for training: loaders hand out numbers, the device draws the pictures."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vistoken.eval.reference import ReferenceScenes
from vistoken.eval.scenes import (
    TEST_SEED,
    TRAIN_SEED,
    VAL_SEED,
    load_fashion_mnist,
    normalise,
    paint_scenes,
    render_scenes,
)
from vistoken.train.order import ResumableData, ResumableLoader, ShareOrder

Part = Literal["train", "val", "test"]


class SceneNumbers(Dataset[int]):
    """The numbers of the scenes of one pass, `0` to `count - 1`.

    Args:
        count: Scenes in the pass.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> int:
        return item


class ScenesData(ResumableData):
    """Training scenes that are new in every epoch, fixed validation and test scenes.

    Validation holds out the last garments of the training split, so that nothing is chosen on the
    test split.

    Args:
        root: Folder with Fashion-MNIST; None means the folder of the Debian package. `embedded`
            takes the garments in the package: every other one trains, the rest validate and test.
        batch_size: Scenes a step.
        size: Side of the canvas in pixels.
        val_garments: Garments of the training split kept for validation.
        limit: Use only this many garments of each part; None means all.
        compile: Whether to compile the renderer of the training scenes with `torch.compile`.
        repeats: Scenes of every garment in one pass over the training part.
        val_repeats: Scenes of every garment in one pass over the other parts.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 512,
        size: int = 224,
        val_garments: int = 2000,
        limit: int | None = None,
        compile: bool = False,
        repeats: int = 1,
        val_repeats: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tables: dict[Part, tuple[Tensor, Tensor]] = {}
        self.paint = torch.compile(paint_scenes) if compile else None

    def setup(self, stage: str) -> None:
        """Read both splits and hold out the validation garments."""
        root, held = self.hparams["root"], self.hparams["val_garments"]
        if root == "embedded":
            self.tables = self._embedded()
            return
        images, labels = load_fashion_mnist(root, "train")
        limit = self.hparams["limit"]
        self.tables = {
            "train": (images[:-held][:limit], labels[:-held][:limit]),
            "val": (images[-held:][:limit], labels[-held:][:limit]),
        }
        if stage == "test":
            images, labels = load_fashion_mnist(root, "test")
            self.tables["test"] = (images[:limit], labels[:limit])

    def _embedded(self) -> dict[Part, tuple[Tensor, Tensor]]:
        """The garments of the package in two halves."""
        known, limit = ReferenceScenes(), self.hparams["limit"]
        halves = [(known.garments[i::2][:limit], known.labels[i::2][:limit]) for i in (0, 1)]
        return {"train": halves[0], "val": halves[1], "test": halves[1]}

    def _count(self, part: Part) -> int:
        """Scenes in one pass."""
        repeats: int = self.hparams["repeats" if part == "train" else "val_repeats"]
        return repeats * len(self.tables[part][0])

    def _loader(self, part: Part) -> DataLoader[int]:
        training = part == "train"
        numbers = SceneNumbers(self._count(part))
        batch = self.hparams["batch_size"]
        if not training:
            return DataLoader(numbers, batch)
        world = 1 if self.trainer is None else self.trainer.world_size
        rank = 0 if self.trainer is None else self.trainer.global_rank
        order = ShareOrder(numbers, world, rank, drop_last=True)
        return self.resumable(ResumableLoader(numbers, order, batch))

    def train_dataloader(self) -> DataLoader[int]:
        """Return shuffled scene numbers."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[int]:
        """Return the validation scene numbers in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[int]:
        """Return the test scene numbers in order."""
        return self._loader("test")

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Draw scenes `[B]` on the device that their numbers are on.

        Returns:
            Normalised images `[B, 3, size, size]` float32 and labels `[B]`.
        """
        part, seed, epoch = self._part()
        garments, labels = self._table_on(part, batch.device)
        numbers = batch + epoch * self._count(part)
        training = part == "train"
        paint = self.paint if training else None
        with torch.no_grad():
            images, targets = render_scenes(
                garments, labels, numbers, seed, self.hparams["size"], training, paint
            )
            return normalise(images), targets

    def _part(self) -> tuple[Part, int, int]:
        """Return the part in use, its seed and the epoch that makes its scenes new."""
        trainer = self.trainer
        if trainer is None or trainer.testing:
            return "test", TEST_SEED, 0
        if trainer.training:
            return "train", TRAIN_SEED, trainer.current_epoch
        return "val", VAL_SEED, 0

    def _table_on(self, part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
        """Move a part's garments to the device once."""
        garments, labels = self.tables[part]
        if garments.device != device:
            self.tables[part] = (garments.to(device), labels.to(device))
        return self.tables[part]
