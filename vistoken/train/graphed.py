"""A learning step as two CUDA graphs, loss and gradient: it consists of many small launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Losses = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


class _Step(nn.Module):
    """The losses as a module that owns nothing but what is trained."""

    def __init__(self, losses: Losses, trained: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.losses = losses
        self.trained = nn.ParameterList(trained)
        self.names: tuple[str, ...] = ()

    def forward(self, images: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """The loss first, then its detached parts."""
        parts = self.losses(images, labels, weight)
        loss = parts.pop("loss")
        self.names = tuple(parts)
        return (loss, *(part.detach() for part in parts.values()))


class GraphedLosses:
    """Losses of batches of one shape, replayed from CUDA graphs.

    The first call captures. Batches of another shape, or on another device than a GPU, run the
    plain function. Everything inside must be free of host waits and of random numbers.

    Args:
        losses: from images, labels and the weight of the cost to `loss` and its parts.
        trained: parameters that get a gradient.
    """

    def __init__(self, losses: Losses, trained: Sequence[nn.Parameter]) -> None:
        self.losses = losses
        self.step = _Step(losses, trained)
        self.key: tuple[object, ...] | None = None

    def __call__(self, images: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """What `losses` returns; the values of parts are overwritten by the next call."""
        key = tuple((x.shape, x.dtype, x.device) for x in (images, labels, weight))
        if images.device.type != "cuda" or self.key not in (None, key):
            return self.losses(images, labels, weight)
        if self.key is None:
            self.capture(images, labels, weight)
            self.key = key
        loss, *parts = self.step(images, labels, weight)
        return {"loss": loss, **dict(zip(self.step.names, parts, strict=True))}

    def capture(self, *example: Tensor) -> None:
        """Record the step; casts of weights must not outlive it in autocast's cache."""
        on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
            torch.cuda.make_graphed_callables(
                self.step, tuple(x.clone() for x in example), allow_unused_input=True
            )
