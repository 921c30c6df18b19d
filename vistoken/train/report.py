"""What a run leaves behind: counts over time, the schedule and its picture, the wait for data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from vistoken.schedule import Schedule

History = list[tuple[int, list[list[int]]]]
CLOSE = 0.02
"""Share of the target that the learned counts may cost more without a warning."""


class RateReport(Callback):  # type: ignore[misc]
    """Logs the counts of every block, and writes schedule, features and picture at the end.

    Args:
        every: steps between two notes; each waits for the device.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self.history: History = []

    def state_dict(self) -> dict[str, Any]:
        """The counts noted so far."""
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the counts noted before."""
        self.history = state["history"]

    def note(self, trainer: Trainer, module: Any) -> None:
        """Read the counts from the device and hand them to every logger."""
        counts = module.rates.counts.tolist()
        if self.history and self.history[-1][0] == trainer.global_step:
            return
        self.history.append((trainer.global_step, counts))
        values: dict[str, float] = {}
        for block, own in zip(module.rates.blocks, counts, strict=True):
            for name, count in zip(("prune", "merge")[-len(own) :], own, strict=True):
                values[f"counts/{name}_{block:02d}"] = count
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Say what the run starts from and aims at."""
        self.note(trainer, module)
        own: Any = module
        counts = own.rates.schedule()
        rank_zero_info(
            f"learning counts of blocks {own.rates.blocks[0]} to {own.rates.blocks[-1]}: from "
            f"{own.cost.exactly(counts):.4g} {own.cost.unit} towards {own.target:.4g} (dense "
            f"{own.cost.dense:.4g})"
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Note the counts now and then."""
        if trainer.global_step % self.every == 0:
            self.note(trainer, module)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Export, draw, and warn where the target was missed."""
        own: Any = module
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        path = own.export(folder)
        # Loggers are closed by now; the last counts go into the picture and the file.
        self.history.append((trainer.global_step, own.rates.counts.tolist()))
        schedule = own.rates.schedule()
        spent = own.cost.exactly(schedule)
        draw_schedule(schedule, self.history, own.rates.blocks, folder / "schedule.png")
        rank_zero_info(
            f"{path}: kept {schedule.kept}, removed by pruning and merging {schedule.removed}, "
            f"{spent:.4g} {own.cost.unit}"
        )
        if spent > own.target * (1 + CLOSE):
            rank_zero_warn(
                f"the learned counts cost {spent:.4g} {own.cost.unit}, the target was "
                f"{own.target:.4g}: train longer, or raise cost_weight or lr"
            )


class DataWait(Callback):  # type: ignore[misc]
    """Measures the share of an epoch that the host waits for the next batch."""

    def __init__(self) -> None:
        self.started = self.ended = time.perf_counter()
        self.waited = 0.0

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock."""
        self.started = self.ended = time.perf_counter()
        self.waited = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, index: int
    ) -> None:
        """The batch is there."""
        self.waited += time.perf_counter() - self.ended

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """The next wait begins."""
        self.ended = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Validation, which runs inside the epoch, is neither work nor wait."""
        pause = time.perf_counter() - self.ended
        self.started, self.ended = self.started + pause, self.ended + pause

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the share."""
        whole = max(time.perf_counter() - self.started, 1e-9)
        module.log("train/data_wait", self.waited / whole, prog_bar=True)


def draw_schedule(
    schedule: Schedule, history: History, blocks: tuple[int, ...], path: Path
) -> None:
    """A PNG of the tokens left in every block, and of how the counts moved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    at = range(schedule.depth)
    pruned, merged = zip(*schedule.counts, strict=True)
    entering = [step.tokens for step in schedule.steps]
    left.bar(at, entering, color="#d9d9d9", label="pruned")
    left.bar(at, pruned, color="#8fb8de", label="merged")
    left.bar(at, merged, color="#1f5a99", label="left")
    left.set(xlabel="block", ylabel="tokens", title="tokens of every block")
    left.legend()
    steps = [step for step, _ in history]
    for place, block in enumerate(blocks):
        shade = (0.1 + 0.8 * place / max(1, len(blocks) - 1), 0.35, 0.6)
        lowest = [min(counts[place]) for _, counts in history]
        right.plot(steps, lowest, color=shade, label=f"block {block}")
    right.set(xlabel="step", ylabel="tokens", title="counts over time")
    right.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=120)
