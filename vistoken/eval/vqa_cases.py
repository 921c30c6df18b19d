"""Which settings of which methods to put on a vision-language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vistoken.api import unwrap, wrap
from vistoken.errors import ScheduleError, UnsupportedMethodError
from vistoken.methods import parse
from vistoken.models.llava import find_language
from vistoken.vlm import METHODS, FastV, LanguageMethod, LayerMethod, LayerRates, PyramidDrop
from vistoken.vlm.base import ImageMethod


@dataclass(frozen=True)
class VqaCase:
    """One row of the results.

    Attributes:
        method: the settings; None is the dense model.
        budget: wanted mean share of image tokens over the decoder's layers, or None.
        share: that share as the settings have it.
    """

    method: LanguageMethod | None
    budget: float | None = None
    share: float = 1.0

    @property
    def label(self) -> str:
        """The method's command-line form, or `dense`."""
        return "dense" if self.method is None else self.method.to_string()


def mean_share(method: LanguageMethod, depth: int) -> float:
    """Mean share of image tokens over the decoder's layers that a method asks for.

    Of methods that cut before the language model this is their budget, whatever follows inside it.
    """
    if not isinstance(method, LayerMethod) or isinstance(method, ImageMethod):
        return float(getattr(method, "budget", 1.0))
    stages, now, total = method.stages(depth), 1.0, 0.0
    for layer in range(depth):
        now = stages.get(layer, now)
        total += now
    return total / depth


@torch.inference_mode()
def kept_share(model: Any, inputs: dict[str, Any]) -> float:
    """Mean share of image tokens, row ends included, that the decoder's layers really see.

    Args:
        model: wrapped or plain.
        inputs: of its processor, one row with images and without padding.
    """
    host, lengths = find_language(model), list[int]()
    config: Any = host.base.config
    hooks = [
        block.register_forward_hook(
            lambda _, args, output: lengths.append(
                (output[0] if isinstance(output, tuple) else output).shape[1]
            )
        )
        for block in host.decoder
    ]
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    image = int((inputs["input_ids"] == config.image_token_id).sum())
    text = inputs["input_ids"].shape[1] - image
    seen = sum(length - text for length in lengths)
    return float(seen) / (image * len(lengths))


def at_budget(cls: type[LanguageMethod], budget: float, depth: int) -> LanguageMethod:
    """A method whose mean share over the layers is the budget.

    Raises:
        ScheduleError: no settings have it, since the first layers see every token.
    """
    if cls is FastV:
        for layer in (2, 1):
            rest = (budget * depth - layer) / (depth - layer) if depth > layer else 0.0
            if rest > 0.001:
                return FastV(budget=round(rest, 6), layer=layer)
    elif cls is PyramidDrop:

        def made(rate: float) -> PyramidDrop:
            return PyramidDrop(budgets=tuple(round(rate**stage, 4) for stage in (1, 2, 3)))

        low, high = 0.05, 1.0
        if mean_share(made(low), depth) < budget:
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (
                    (middle, high) if mean_share(made(middle), depth) < budget else (low, middle)
                )
            return made(high)
    else:
        method: Any = cls
        found: LanguageMethod = method(budget=budget)
        mean_share(found, depth)
        return found
    raise ScheduleError(
        f"{cls.name}: a mean share of {budget:g} is out of reach with {depth} layers"
    )


def plan_vqa_cases(
    model: Any, wanted: Sequence[str], budgets: Sequence[float]
) -> tuple[list[VqaCase], list[str]]:
    """The dense model, then every method at every budget.

    Args:
        model: a transformers vision-language model.
        wanted: methods; a bare name is set to each budget, with settings it is taken as it is.
            Empty means all.
        budgets: mean shares of image tokens over the decoder's layers.

    Returns:
        The cases, and one note for each that had to be left out.

    Raises:
        ConfigError: an unknown method or a wrong setting.
        UnsupportedMethodError: a method that was asked for cannot work on this model.
    """
    depth = model.config.get_text_config().num_hidden_layers
    cases, notes = [VqaCase(None)], []
    names = [name for name, cls in METHODS.items() if cls is not LayerRates]
    for text in wanted or names:
        try:
            if ":" in text:
                cases.append(_check(model, parse(text), None, depth))
                continue
            for budget in budgets:
                try:
                    method = at_budget(METHODS.get(text) or type(parse(text)), budget, depth)  # type: ignore[arg-type]
                    cases.append(_check(model, method, budget, depth))
                except ScheduleError as error:
                    notes.append(f"{text} at {budget:g} was left out: {error}")
        except UnsupportedMethodError as error:
            if wanted:
                raise
            notes.append(f"{text} was left out: {error}")
    return cases, notes


def _check(model: Any, method: Any, budget: float | None, depth: int) -> VqaCase:
    """A case that the model can carry."""
    wrap(model, method)
    unwrap(model)
    return VqaCase(method, budget, mean_share(method, depth))


def case_row(case: VqaCase) -> dict[str, Any]:
    """The fields of a case for the results file."""
    settings = {} if case.method is None else dataclasses.asdict(case.method)
    return {"method": case.label, "budget": case.budget, "share": case.share, "settings": settings}
