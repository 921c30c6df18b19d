"""Which settings of which methods to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vistoken.api import check_method
from vistoken.errors import ScheduleError, UnsupportedMethodError
from vistoken.flops import count_macs
from vistoken.methods import METHODS, Method, parse
from vistoken.models.detect import find
from vistoken.shape import ModelShape


@dataclass(frozen=True)
class Case:
    """One row of the results.

    Attributes:
        method: the settings; None is the dense model.
        gflops: cost of one image in G multiply-accumulates.
        tokens: tokens that leave the last block, prefix included.
        budget: wanted share of the dense cost, or None where the settings were given.
    """

    method: Method | None
    gflops: float
    tokens: int
    budget: float | None = None

    @property
    def label(self) -> str:
        """The method's command-line form, or `dense`."""
        return "dense" if self.method is None else self.method.to_string()


def plan_cases(
    model: nn.Module,
    wanted: Sequence[str],
    budgets: Sequence[float],
    *,
    strict: bool | None = None,
) -> tuple[list[Case], list[str]]:
    """The dense model, then every method at every budget.

    Args:
        model: the model, at the image size it was built for.
        wanted: methods; a bare name is set to each budget, with settings it is taken as it is.
            Empty means all of them.
        budgets: shares of the dense cost.
        strict: raise for a method that the model cannot carry instead of leaving it out; None does
            so for methods that were asked for.

    Returns:
        The cases, and one note for each that had to be left out.

    Raises:
        ConfigError: an unknown method or a wrong setting.
        UnsupportedMethodError: `strict`, and a method reads what the model lacks.
        ScheduleError: given settings do not fit the model.
    """
    strict = bool(wanted) if strict is None else strict
    backbone = find(model)
    shape = backbone.shape
    cases = [Case(None, count_macs(shape) / 1e9, shape.tokens)]
    notes: list[str] = []
    for text in wanted or METHODS:
        if ":" in text:
            method = parse(text)
            check_method(backbone, method)
            cases.append(_case(method, shape, None))
            continue
        cls = METHODS.get(text) or type(parse(text))
        for budget in budgets:
            try:
                method = cls.at_gflops(shape, budget * cases[0].gflops)
                check_method(backbone, method)
            except ScheduleError as error:
                notes.append(f"{text} at {budget:g} of the dense cost was left out: {error}")
                continue
            except UnsupportedMethodError as error:
                if strict:
                    raise
                notes.append(f"{text} was left out: {error}")
                break
            case = _case(method, shape, budget)
            if any(case.method == other.method for other in cases):
                notes.append(f"{text} has the same settings at {budget:g} as at a higher budget")
                continue
            cases.append(case)
    return cases, notes


def _case(method: Method, shape: ModelShape, budget: float | None) -> Case:
    """A case with its cost and length."""
    return Case(method, method.cost(shape), method.plan(shape).kept[-1], budget)
