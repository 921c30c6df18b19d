"""Methods that drop image tokens inside the language model: settings and layer schedules."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from vistoken.errors import ConfigError, ScheduleError
from vistoken.methods.base import is_int, is_rate, require
from vistoken.vlm.base import LanguageMethod

Stages = dict[int, float]
"""Share of a prompt's image tokens that enters a layer and the ones after it, by layer."""


@dataclass(frozen=True)
class LayerMethod(LanguageMethod):
    """A method that drops image tokens at the entry of some decoder layers.

    Tokens are ranked by the attention of the prompt's last token, averaged over heads; the kept
    ones stay in order and keep their positions; sets of deeper layers lie in those of earlier ones.
    """

    reads: ClassVar[str] = "the last token's attention row in the language model"
    row: ClassVar[Literal["before", "own", "text"]] = "before"
    """Attention of the last token one layer earlier, in the layer itself, or of all text after
    the first image one layer earlier."""
    evicts: ClassVar[bool] = False
    """Whether the caches of earlier layers shrink to what the last stage left."""
    guarantees: ClassVar[str] = "exactly floor(share * image tokens) per prompt and layer"

    def stages(self, depth: int) -> Stages:
        """Where tokens go, and what share of all image tokens stays, for `depth` layers.

        Raises:
            ScheduleError: the settings name a layer that the model does not have.
        """
        raise NotImplementedError

    @property
    def by_threshold(self) -> bool:
        """Whether tokens of a worth of 1 or more stay, however many; else shares are kept."""
        return False

    def worth(self, total: Tensor, peak: Tensor) -> Tensor:
        """Worth of every token `[B, L]`, from sum and maximum of the text's attention to it."""
        raise NotImplementedError

    @property
    def idle(self) -> bool:
        return False


@dataclass(frozen=True)
class FastV(LayerMethod):
    """Drop once, by the attention one layer earlier (Chen et al., ECCV 2024, 2403.06764).

    Args:
        budget: share of image tokens that enters `layer` and all later ones, in (0, 1].
        layer: 0-based decoder layer, at least 1.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "Chen et al., ECCV 2024"

    budget: float = 0.5
    layer: int = 2

    def check(self) -> None:
        require(self, "budget", is_rate(self.budget), "a number in (0, 1]")
        require(self, "layer", is_int(self.layer) and self.layer >= 1, "an integer >= 1")

    @property
    def idle(self) -> bool:
        return self.budget == 1

    def stages(self, depth: int) -> Stages:
        return checked_stages(self.name, {self.layer: self.budget}, depth)


@dataclass(frozen=True)
class PyramidDrop(LayerMethod):
    """Drop in stages, by the row the layer itself is about to compute (Xing et al., CVPR 2025).

    Args:
        budgets: share of all image tokens left after each stage, falling (2410.17247).
        layers: rising 0-based decoder layers; None spreads the stages evenly over the depth.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "Xing et al., CVPR 2025"
    row: ClassVar[Literal["before", "own", "text"]] = "own"

    budgets: Sequence[float] = (0.5, 0.25, 0.125)
    layers: Sequence[int] | None = None

    def check(self) -> None:
        object.__setattr__(self, "budgets", _rates(self, "budgets", self.budgets))
        if self.layers is not None:
            layers = self.layers if isinstance(self.layers, (list, tuple)) else (self.layers,)
            ok = len(layers) == len(self.budgets) and all(is_int(x) and x >= 1 for x in layers)
            ok = ok and list(layers) == sorted(set(layers))
            require(self, "layers", ok, "one rising layer >= 1 per budget")
            object.__setattr__(self, "layers", tuple(layers))

    def stages(self, depth: int) -> Stages:
        count = len(self.budgets)
        even = tuple(max(1, depth * (i + 1) // (count + 1)) for i in range(count))
        layers = even if self.layers is None else self.layers
        return checked_stages(self.name, dict(zip(layers, self.budgets, strict=True)), depth)


@dataclass(frozen=True)
class PSigmoid(LayerMethod):
    """Keep rates that fall along a sigmoid over the layers (Zhao et al., CVPR 2025, 2412.00556).

    `r_l = lowest + (1 - lowest) / (1 + exp(sharpness (l - l0)))`, with `l0` solved so that the mean
    over layers is the budget; layer 0 always sees everything.

    Args:
        budget: mean share of image tokens over the layers.
        sharpness: slope of the fall per layer.
        lowest: share that the last layers approach.
    """

    name: ClassVar[str] = "psigmoid"
    paper: ClassVar[str] = "Zhao et al., CVPR 2025"

    budget: float = 0.3
    sharpness: float = 1.0
    lowest: float = 0.02

    def check(self) -> None:
        require(self, "budget", is_rate(self.budget), "a number in (0, 1]")
        ok = isinstance(self.sharpness, (int, float)) and self.sharpness > 0
        require(self, "sharpness", ok, "a number above 0")
        require(self, "lowest", is_rate(self.lowest), "a number in (0, 1]")

    @property
    def idle(self) -> bool:
        return self.budget == 1

    def rates(self, depth: int) -> tuple[float, ...]:
        """Keep rate of every layer.

        Raises:
            ScheduleError: no sigmoid has this mean.
        """

        def at(middle: float) -> list[float]:
            steps = [min(700.0, self.sharpness * (layer - middle)) for layer in range(depth)]
            falling = [self.lowest + (1 - self.lowest) / (1 + math.exp(x)) for x in steps]
            return [1.0, *falling[1:]]

        low, high = -depth - 60 / self.sharpness, 2 * depth + 60 / self.sharpness
        if sum(at(low)) / depth > self.budget + 1e-9:
            least = sum(at(low)) / depth
            raise ScheduleError(
                f"psigmoid: a mean rate of {self.budget} is out of reach with {depth} layers and "
                f"lowest={self.lowest}; the least is {least:.3g}"
            )
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(at(middle)) / depth < self.budget else (low, middle)
        return tuple(at(high))

    def stages(self, depth: int) -> Stages:
        return checked_stages(self.name, dict(enumerate(self.rates(depth))), depth)


@dataclass(frozen=True)
class LayerRates(LayerMethod):
    """Keep rates per layer, given or from a file that `vistoken search-vlm` wrote.

    Args:
        rates: one rate per decoder layer, the first 1, never rising; or
        file: JSON with `{"rates": [1.0, ...]}`.
    """

    name: ClassVar[str] = "layer_rates"
    paper: ClassVar[str] = "G-Search of Zhao et al., CVPR 2025"

    rates: Sequence[float] | None = None
    file: str | None = None

    def check(self) -> None:
        if self.rates is not None:
            require(self, "file", self.file is None, "None where rates are given")
            object.__setattr__(self, "rates", _rates(self, "rates", self.rates))

    def values(self) -> tuple[float, ...]:
        """The rates, read from the file where there is one.

        Raises:
            ConfigError: neither given, no such file, or not a list of falling rates.
        """
        if self.rates is not None:
            return tuple(self.rates)
        if self.file is None:
            raise ConfigError("LayerRates(rates=None, file=None): one of them must be given")
        try:
            found = json.loads(Path(self.file).read_text())["rates"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"LayerRates(file={self.file!r}): must be JSON with a list 'rates' ({error})"
            ) from error
        return _rates(self, "file", found)

    def stages(self, depth: int) -> Stages:
        rates = self.values()
        if len(rates) != depth:
            raise ScheduleError(f"layer_rates: {len(rates)} rates for a model of {depth} layers")
        return checked_stages(self.name, dict(enumerate(rates)), depth)


def _rates(owner: object, field: str, values: Any) -> tuple[float, ...]:
    """Falling rates as a tuple."""
    found = (values,) if isinstance(values, (int, float)) else values
    ok = isinstance(found, (list, tuple)) and len(found) > 0 and all(map(is_rate, found))
    ok = ok and list(found) == sorted(found, reverse=True)
    require(owner, field, ok, "falling rates in (0, 1]")
    return tuple(float(value) for value in found)


def checked_stages(name: str, stages: Stages, depth: int) -> Stages:
    """Stages that change something, after a check against the model's depth."""
    if max(stages) >= depth:
        raise ScheduleError(f"{name} drops at layer {max(stages)}, but the model has {depth}")
    if stages.get(0, 1.0) < 1:
        raise ScheduleError(f"{name}: layer 0 must see every token; nothing ranked them yet")
    found, before = {}, 1.0
    for layer, share in sorted(stages.items()):
        if share < before:
            found[layer] = before = share
    return found
