"""Pictures and turns for training: loaders hand out numbers, the device makes the rest."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from vistoken.eval.easy_vqa import SIDE, EasyVqa, enlarge, load_easy_vqa
from vistoken.eval.fashion import load_fashion_mnist
from vistoken.eval.hashing import hash_integers
from vistoken.eval.reference import ReferenceScenes
from vistoken.eval.vqa_plan import Garments, plan_layout, sort_garments
from vistoken.eval.vqa_questions import ask
from vistoken.eval.vqa_scenes import cut_tiles, draw, patch_names
from vistoken.eval.vqa_words import NAMES
from vistoken.train.scenes_data import SceneNumbers

Part = Literal["train", "val"]
SEEDS: dict[Part, int] = {"train": 11, "val": 12}
PATCHES_SHOWN = 2
"""Patches of a tile that a garment must lie under for the tile to show it."""


class VqaBatch(NamedTuple):
    """One training batch.

    Attributes:
        tiles: thumbnail and crops `[B, 5, 3, h, w]`.
        ids: turns `[B, Q, L]`.
        labels: the same where it is answer or end, else -100.
        patches: label of every patch `[B, 5, N]`, or None.
        shown: 1, 0 or -1 for unknown, per tile and label `[B, 5, K]`, or None.
    """

    tiles: Tensor
    ids: Tensor
    labels: Tensor
    patches: Tensor | None = None
    shown: Tensor | None = None


class NumbersData(LightningDataModule):  # type: ignore[misc]
    """Loaders of numbers, which subclasses turn into batches on the device.

    Args:
        batch_size: pictures a step.
        pictures: pictures of an epoch.
        val_pictures: pictures of a validation.
    """

    def __init__(self, batch_size: int, pictures: int, val_pictures: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.pictures = pictures
        self.val_pictures = val_pictures

    def train_dataloader(self) -> DataLoader[int]:
        """Shuffled numbers."""
        numbers = SceneNumbers(self.pictures)
        world = 1 if self.trainer is None else self.trainer.world_size
        rank = 0 if self.trainer is None else self.trainer.global_rank
        order: DistributedSampler[int] = DistributedSampler(numbers, world, rank, drop_last=True)
        return DataLoader(numbers, self.batch_size, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[int]:
        """Numbers in order."""
        return DataLoader(SceneNumbers(self.val_pictures), self.batch_size)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> VqaBatch:
        """Make the batch of these numbers `[B]` on the device that they are on."""
        training = self.trainer is not None and self.trainer.training
        with torch.no_grad():
            if not training:
                return self.make(batch, "val")
            return self.make(batch + self.trainer.current_epoch * self.pictures, "train")

    def make(self, numbers: Tensor, part: Part) -> VqaBatch:
        """The batch of these numbers."""
        raise NotImplementedError


class FashionVqaData(NumbersData):
    """Fashion scenes that never repeat in training, with questions.

    Args:
        root: folder with Fashion-MNIST; None means that of the Debian package. `embedded` takes the
            garments in the package: every other one trains, the rest validate.
        batch_size: scenes a step.
        turns: questions per scene.
        scenes: scenes of an epoch.
        val_scenes: scenes of a validation.
        val_garments: garments of the training split kept for validation.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        turns: int = 8,
        scenes: int = 65536,
        val_scenes: int = 1024,
        val_garments: int = 2000,
    ) -> None:
        super().__init__(batch_size, scenes, val_scenes)
        self.save_hyperparameters()
        self.root, self.count, self.held = root, turns, val_garments
        self.tables: dict[Part, Garments] = {}

    def setup(self, stage: str) -> None:
        """Read the garments and hold some out."""
        if self.root == "embedded":
            known = ReferenceScenes()
            halves = [(known.garments[i::2], known.labels[i::2]) for i in (0, 1)]
        else:
            images, labels = load_fashion_mnist(self.root, "train")
            cut = len(images) - self.held
            halves = [(images[:cut], labels[:cut]), (images[cut:], labels[cut:])]
        self.tables = {"train": sort_garments(*halves[0]), "val": sort_garments(*halves[1])}

    def make(self, numbers: Tensor, part: Part) -> VqaBatch:
        """Scenes, questions and tower labels."""
        if self.tables[part].images.device != numbers.device:
            self.tables[part] = self.tables[part].to(numbers.device)
        table, seed = self.tables[part], SEEDS[part]
        layout = plan_layout(numbers, seed, table)
        asked = ask(layout, numbers, seed, self.count)
        patches = patch_names(layout, table)
        names = torch.arange(len(NAMES), device=numbers.device)
        shown = (patches[..., None] == names).sum(2) >= PATCHES_SHOWN
        tiles = cut_tiles(draw(layout, table, numbers, seed))
        return VqaBatch(tiles, asked.ids, asked.labels, patches, shown.float())


class EasyVqaData(NumbersData):
    """easy-vqa (PyPI `easy-vqa`): pictures of one shape, mirrored and turned in training.

    Args:
        root: folder of the data (the package's `data`); None finds the installed package.
        batch_size: pictures a step.
        turns: questions per picture and step.
        held: training pictures kept for validation.
    """

    def __init__(
        self, root: str | None = None, batch_size: int = 128, turns: int = 8, held: int = 400
    ) -> None:
        super().__init__(batch_size, 0, held)
        self.save_hyperparameters()
        self.root, self.count, self.held = root, turns, held
        self.data: EasyVqa | None = None

    def setup(self, stage: str) -> None:
        """Read the training split."""
        self.data = load_easy_vqa(self.root, "train")
        self.pictures = len(self.data.images) - self.held

    def make(self, numbers: Tensor, part: Part) -> VqaBatch:
        """Pictures, questions, and what the whole picture shows."""
        assert self.data is not None
        if self.data.images.device != numbers.device:
            self.data = self.data.to(numbers.device)
        data, training = self.data, part == "train"
        at = numbers % self.pictures if training else self.pictures + numbers
        images = data.images[at]
        draws = hash_integers(SEEDS[part], numbers, 0, 3 + self.count)
        if training:
            for bit, axis in ((0, -1), (1, -2)):
                images = torch.where(_on(draws, bit), images.flip(axis), images)
            images = torch.where(_on(draws, 2), images.transpose(-1, -2), images)
        asked = draws[:, 3:] % data.counts[at, None]
        small, canvas = enlarge(images)
        shown = torch.full((len(at), 5, SIDE), -1.0, device=at.device)
        shown[:, 0] = data.shown[at]
        turns = data.ids[at].gather(1, asked[..., None].expand(-1, -1, data.ids.shape[-1]))
        labels = data.labels[at].gather(1, asked[..., None].expand(-1, -1, data.ids.shape[-1]))
        return VqaBatch(cut_tiles(canvas, small), turns, labels, None, shown)


def _on(draws: Tensor, column: int) -> Tensor:
    """Whether a picture is changed `[B, 1, 1, 1]`."""
    return (draws[:, column] % 2 == 1)[:, None, None, None]
