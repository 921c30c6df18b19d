"""Learned matching features: a projection per block that is used only to find partners."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vistoken.errors import ConfigError, ScheduleError
from vistoken.kernels.match import unit
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape


class MatchingFeatures:
    """Projections `[C, d]` by block (DTEM, Lee and Hong, NeurIPS 2024).

    Args:
        weights: block index to projection.
        source: file they came from, for messages and command lines.
    """

    def __init__(self, weights: Mapping[int, Tensor], source: str = "given") -> None:
        self.weights = {block: weight.detach() for block, weight in weights.items()}
        self.source = source

    def __repr__(self) -> str:
        return self.source

    @staticmethod
    def load(path: str | Path) -> MatchingFeatures:
        """Read a file that training exported.

        Raises:
            ConfigError: no such file, or its entries are no matrices named by block.
        """
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise ConfigError(f"features={str(path)!r}: there is no such file")
        found = load_file(path)
        if not found or not all(k.isdigit() and w.dim() == 2 for k, w in found.items()):
            raise ConfigError(
                f"features={str(path)!r}: must hold one matrix [C, d] per block, named by its index"
            )
        return MatchingFeatures({int(name): w for name, w in found.items()}, str(path))

    def check(self, shape: ModelShape, schedule: Schedule) -> None:
        """Raise `ScheduleError` unless every block that merges has a projection of its width."""
        for step in schedule.steps:
            weight = self.weights.get(step.block)
            if step.merged < step.pruned and (weight is None or weight.shape[0] != shape.width):
                got = "none" if weight is None else f"one for {weight.shape[0]} channels"
                raise ScheduleError(
                    f"block {step.block} merges, so the features in {self.source} need a "
                    f"projection of its {shape.width} channels; there is {got}"
                )

    def project(self, x: Tensor, block: int) -> Tensor:
        """Features `[B, N, d]` of the residual stream x `[B, N, C]`, in fp32 (fp64 for fp64)."""
        weight = self.weights[block]
        if weight.device != x.device:
            weight = self.weights[block] = weight.to(x.device)
        metric = unit(x)
        return metric @ weight.to(metric.dtype)


def as_features(value: object) -> MatchingFeatures | None:
    """A path, or features, as features.

    Raises:
        ConfigError: neither.
    """
    if value is None or isinstance(value, MatchingFeatures):
        return value
    if isinstance(value, str):
        return MatchingFeatures.load(value)
    raise ConfigError(f"features={value!r}: must be a file of learned features")
