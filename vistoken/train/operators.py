"""What counts can be learned of: a method, its counts, and its simulation in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vistoken.errors import ConfigError
from vistoken.methods import DiffRate, Method, ToMe
from vistoken.schedule import Schedule
from vistoken.train.masked import Simulation
from vistoken.train.masked_merge import MergeSimulation
from vistoken.train.merge_rates import MergeRates
from vistoken.train.rates import Rates


@dataclass(frozen=True)
class Operator:
    """One way of removing tokens whose counts can be learned.

    Attributes:
        method: the method; its unlearned counts are the start, its block times the cost.
        rates: the counts.
        simulation: what stands in for it in training.
        build: the method with given counts, as inference runs it.
    """

    method: type[Method]
    rates: type[Rates]
    simulation: type[Simulation]
    build: Callable[[Schedule], Method]


OPERATORS = {
    "diffrate": Operator(DiffRate, Rates, Simulation, lambda counts: DiffRate(schedule=counts)),
    "tome": Operator(ToMe, MergeRates, MergeSimulation, ToMe.from_schedule),
}
"""By the name that configurations use."""


def operator_named(name: str) -> Operator:
    """An operator by name, or a `ConfigError`."""
    if name not in tuple(OPERATORS):
        raise ConfigError(f"operator={name!r}: must be one of {', '.join(OPERATORS)}")
    return OPERATORS[name]
