"""What training runs share: an average of the weights, a cosine over the run, seeded steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lightning.pytorch import LightningModule
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vistoken.train.order import StepSeeds
from vistoken.train.schedules import cosine_factor, time_progress


class Averaged(LightningModule):  # type: ignore[misc]
    """A module that trains `net` and validates a running average of it.

    Attributes:
        net: What is trained.
        ema: Its average, or None where none is kept.
    """

    net: Any
    ema: ModelEmaV3 | None

    def keep_average(self, decay: float) -> None:
        """Keep an average of `net` with this decay; 0 keeps none."""
        self.ema = None
        if decay > 0:
            self.ema = ModelEmaV3(self.net, decay=decay, use_warmup=True).requires_grad_(False)

    def evaluation_net(self) -> Any:
        """Return the averaged model, or the trained one where no average is kept."""
        net: nn.Module = self.net if self.ema is None else self.ema.module
        return net

    def configure_callbacks(self) -> list[Any]:
        """Seeds of every step, so that stochastic depth draws alike where a run resumes."""
        return [StepSeeds()]

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """A step, and the average towards the new weights before a checkpoint can be written."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update(self.net, step=self.global_step + 1)

    def with_cosine(self, optimizer: Optimizer, warmup: float) -> dict[str, Any]:
        """The optimiser with a cosine that follows steps or `max_time`, after a linear warm-up."""
        total = self.trainer.estimated_stepping_batches

        @lru_cache(maxsize=1)  # Every group asks at each step, and processes agree on the answer.
        def progress(step: int) -> float:
            return max(float(step / total), time_progress(self.trainer))

        scheduler = LambdaLR(optimizer, lambda step: cosine_factor(progress(step), warmup))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
