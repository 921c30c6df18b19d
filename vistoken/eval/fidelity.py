"""Metrics: accuracy against labels, and closeness of a reduced model to its dense self."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


def divergence(dense: Tensor, reduced: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(dense || reduced) of each image.

    Args:
        dense: logits `[B, classes]` of the dense model.
        reduced: logits `[B, classes]` of the reduced one.

    Returns:
        `[B]` in nats, computed in float64 where the device has it.
    """
    dtype = torch.float32 if dense.device.type == "mps" else torch.float64
    p, q = (logits.to(dtype).log_softmax(-1) for logits in (dense, reduced))
    return (p.exp() * (p - q)).sum(-1)


class Fidelity(Metric):  # type: ignore[misc]
    """Agreement of the top class with the dense model, and mean KL(dense || reduced).

    Its result has `agreement` in 0..1, `kl` in nats and `n` images.
    """

    full_state_update = False
    agree: Tensor
    kl: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("agree", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("kl", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, reduced: Tensor, dense: Tensor) -> None:
        """Count one batch of logits `[B, classes]` of both models."""
        self.agree += (reduced.argmax(-1) == dense.argmax(-1)).sum()
        total = divergence(dense, reduced).sum()
        # Half-precision runs turn the module's buffers into half precision; a sum must not be.
        self.kl = self.kl.to(total.dtype) + total
        self.seen += len(dense)

    def compute(self) -> dict[str, float | int]:
        """The means over all images of all processes."""
        n = max(1, int(self.seen))
        return {
            "agreement": int(self.agree) / n,
            "kl": max(0.0, float(self.kl) / n),
            "n": int(self.seen),
        }


class Scores(nn.Module):
    """All metrics of one model: top-1 and top-5 accuracy, agreement and KL.

    Args:
        num_classes: length of a row of logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        many: dict[str, Any] = {"average": "micro", "validate_args": False}
        self.top1 = MulticlassAccuracy(num_classes, **many)
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), **many)
        self.fidelity = Fidelity()

    def update(self, logits: Tensor, labels: Tensor, dense: Tensor) -> None:
        """Count one batch.

        Args:
            logits: `[B, classes]` of the model that is judged.
            labels: `[B]` classes.
            dense: `[B, classes]` of the dense model on the same images.
        """
        logits, dense = logits.float(), dense.float()
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)
        self.fidelity.update(logits, dense)

    def compute(self) -> dict[str, float | int]:
        """`top1`, `top5`, `agreement` in 0..1, `kl` in nats, `n` images; over all processes."""
        return {
            "top1": float(self.top1.compute()),
            "top5": float(self.top5.compute()),
            **self.fidelity.compute(),
        }
