"""Order and randomness that depend on seed and epoch alone, so that a resumed run repeats them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

BASE_SEED = "PL_GLOBAL_SEED"
"""Where Lightning notes the seed of `seed_everything`."""


def seed_epoch(epoch: int, rank: int) -> None:
    """Seed every generator for an epoch; nothing happens where no seed was asked for."""
    base = os.environ.get(BASE_SEED)
    if base is not None:
        set_seeds((int(base) * 1_000_003 + epoch * 1_009 + rank) % 2**32)


def set_seeds(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class EpochOrder(DistributedSampler[Any]):
    """A shuffled share of the items per process, each as `epoch * len + item`.

    A subclass of `DistributedSampler`, so that Lightning sets its epoch and leaves it alone.
    """

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (start + item for item in super().__iter__())


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
