"""Learning-rate schedules over the progress of a run, counted in steps or in time."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer


def cosine_factor(progress: float, warmup: float, floor: float = 0.01) -> float:
    """Return the share of the highest learning rate to use.

    Args:
        progress: Share of the run that is done, in 0..1; more counts as 1.
        warmup: Share of the run in which the factor rises linearly, in 0..1.
        floor: Factor at the end of the cosine.

    Returns:
        A factor in 0..1.
    """
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    done = min((progress - warmup) / max(1 - warmup, 1e-9), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def time_progress(trainer: Trainer) -> float:
    """Return the share of `max_time` that is used up, 0 where the trainer has no time limit.

    It is the first process's share: every process has its own clock, but one learning rate.
    """
    for callback in trainer.callbacks:
        remaining = callback.time_remaining() if isinstance(callback, Timer) else None
        if remaining is not None:
            elapsed = callback.time_elapsed()
            share = elapsed / max(elapsed + remaining, 1e-9)
            return float(trainer.strategy.broadcast(share))
    return 0.0
