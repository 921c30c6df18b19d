"""Order and randomness that depend on seed and step alone, so that a resumed run repeats them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from vistoken.errors import ConfigError

BASE_SEED = "PL_GLOBAL_SEED"
"""Where Lightning notes the seed of `seed_everything`."""


def set_seeds(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class StepSeeds(Callback):  # type: ignore[misc]
    """Seeds every generator after each step of the optimizer, by seed, process and step.

    A run that resumes after that step draws what the whole run drew. Nothing happens where no seed
    was asked for.
    """

    def __init__(self) -> None:
        self.step = -1

    def seed(self, trainer: Trainer) -> None:
        """Seed for the step that comes next."""
        base, self.step = os.environ.get(BASE_SEED), trainer.global_step
        if base is not None:
            set_seeds((int(base) * 1_000_003 + self.step * 1_009 + trainer.global_rank) % 2**32)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The first step of an epoch; loaders may have drawn before."""
        self.seed(trainer)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The first step of a run that resumes inside an epoch."""
        self.seed(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """The next step, once gradients have been applied."""
        if trainer.global_step != self.step:
            self.seed(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Validation inside an epoch may have drawn."""
        self.seed(trainer)


class ShareOrder(DistributedSampler[Any]):
    """A shuffled share of the items per process; `skip` of them are left out once.

    A subclass of `DistributedSampler`, so that Lightning sets its epoch and leaves it alone.
    """

    skip = 0

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), skip, None)


class EpochOrder(ShareOrder):
    """The same, each item as `epoch * len + item`."""

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (start + item for item in super().__iter__())


class ResumableLoader(DataLoader[Any]):
    """Whole batches in the order of a sampler; a checkpoint holds how many were handed out.

    After `load_state_dict` the next pass begins behind them. Neither items nor draws of this
    process's generators are spent on what was seen.

    Args:
        data: items by number.
        order: which items, and in which order.
        batch_size: items a batch; the last ones that fill none are left out.
        options: of the workers, as `torch.utils.data.DataLoader` takes them.
    """

    def __init__(
        self,
        data: Dataset[Any],
        order: ShareOrder,
        batch_size: int,
        options: dict[str, Any] | None = None,
    ) -> None:
        # Its own generator: seeds of workers must not come out of the run's.
        super().__init__(
            data, batch_size, sampler=order, drop_last=True, generator=torch.Generator(),
            **(options or {}),
        )  # fmt: skip
        self.order = order
        self.handed_out = self.behind = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: the sampler is asked at the first batch, when its epoch has been set.
        self.handed_out, self.behind = self.behind, 0
        self.order.skip = self.handed_out * int(self.batch_size or 1)
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def _layout(self) -> dict[str, int]:
        """What the meaning of a number of batches depends on."""
        return {
            "batch_size": int(self.batch_size or 1),
            "processes": self.order.num_replicas,
            "batches": len(self),
        }

    def state_dict(self) -> dict[str, int]:
        """Batches of this pass that were handed out, 0 at its end."""
        return {"handed_out": self.handed_out % max(1, len(self)), **self._layout()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass behind the batches that were handed out.

        Raises:
            ConfigError: the run stopped inside an epoch of another batch size, number of processes
                or number of items.
        """
        wrong = {key: state[key] for key, own in self._layout().items() if state[key] != own}
        if state["handed_out"] and wrong:
            raise ConfigError(
                f"the checkpoint was written inside an epoch of {wrong}, this run has "
                f"{ {key: self._layout()[key] for key in wrong} }; resume with the same, or from "
                "the end of an epoch"
            )
        self.behind = state["handed_out"]


class ResumableData(LightningDataModule):  # type: ignore[misc]
    """Data whose place inside an epoch goes into checkpoints and comes back out of them.

    Lightning restores loaders by itself only where no learning rate asked for their length before.
    """

    loader: ResumableLoader | None = None
    place: dict[str, int] | None = None

    def resumable(self, loader: ResumableLoader) -> ResumableLoader:
        """The training loader, put where a checkpoint stopped."""
        self.loader, place, self.place = loader, self.place, None
        if place is not None:
            loader.load_state_dict(place)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where training is inside its epoch."""
        return {} if self.loader is None else {"loader": self.loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note it for the loader that will be asked for."""
        self.place = state_dict.get("loader")


class Numbered(Dataset[tuple[Tensor, int]]):
    """Pictures under a random transform whose draws depend on seed, epoch and item only.

    Args:
        source: items are (PIL image, class).
        transform: image to tensor.
        seed: of the draws.
    """

    def __init__(self, source: Any, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image, label = self.source[number % len(self.source)]
        before = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            set_seeds((self.seed * 1_000_003 + number) % 2**32)
            tensor = self.transform(image.convert("RGB"))
        random.setstate(before[0])
        np.random.set_state(before[1])
        return tensor, int(label)
