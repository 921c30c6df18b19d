"""G-Search: the lowest keep rate of every decoder layer that a calibration set allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from vistoken.api import unwrap, wrap
from vistoken.errors import ConfigError
from vistoken.models.llava import find_language
from vistoken.vlm.inside import LayerRates


def search_rates(
    model: nn.Module,
    quality: Callable[[nn.Module], float],
    *,
    tolerance: float = 0.01,
    steps: int = 16,
) -> tuple[float, ...]:
    """Keep rates, layer by layer (greedy search of Zhao et al., CVPR 2025, 2412.00556).

    From layer 1 on, with the deeper layers at the same rate, the lowest rate is kept whose quality
    stays within the tolerance of the whole model's. Quality is taken to rise with the rate, so a
    binary search over `steps` levels is enough: about `layers * log2(steps)` evaluations.

    Args:
        model: an unwrapped vision-language model; left as it was.
        quality: a score of the model on calibration data, larger is better.
        tolerance: loss of quality allowed, at least 0.
        steps: levels of a rate; the lowest is `1 / steps`.

    Returns:
        One rate per decoder layer.

    Raises:
        ConfigError: a negative tolerance or fewer than two steps.
    """
    if not tolerance >= 0 or steps < 2:
        raise ConfigError(f"tolerance={tolerance}, steps={steps}: must be >= 0 and >= 2")
    depth = len(find_language(model).decoder)
    least = quality(model) - tolerance
    levels = [steps] * depth

    def good(layer: int, level: int) -> bool:
        tried = levels[:layer] + [level] * (depth - layer)
        wrap(model, LayerRates(tuple(value / steps for value in tried)))
        try:
            return quality(model) >= least
        finally:
            unwrap(model)

    for layer in range(1, depth):
        low, high = 1, levels[layer - 1]  # high is known to be good
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if good(layer, middle) else (middle + 1, high)
        levels[layer:] = [high] * (depth - layer)
    return tuple(level / steps for level in levels)


def save_rates(path: str | Path, rates: tuple[float, ...], note: str = "") -> None:
    """Write rates for `layer_rates:file=PATH`."""
    mean = sum(rates) / len(rates)
    Path(path).write_text(json.dumps({"rates": rates, "mean": mean, "note": note}, indent=1) + "\n")
