"""What a token-reduction method is: settings, a schedule, and an assignment per block."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, ClassVar, Self

from torch import Tensor

from vistoken.errors import ConfigError, ScheduleError
from vistoken.flops import Where, count_macs
from vistoken.schedule import Clock, Schedule, Step, solve, weakest
from vistoken.shape import ModelShape
from vistoken.state import Assignment, TokenState


class Need(Enum):
    """A signal that the attention tap must collect in every block that reduces."""

    KEYS = "keys of all heads"
    CLASS_ROW = "attention paid by the class tokens"
    RECEIVED = "attention received by every token"
    ATTENTION = "queries and keys of all heads"
    STREAM = "values of the residual stream"


@dataclass(frozen=True)
class Features:
    """Signals of one block, all detached.

    Attributes:
        x: residual stream at the point of reduction `[B, N, C]`; its values count only for methods
            that declare `Need.STREAM`.
        class_row: attention of the class tokens, averaged over heads and class tokens `[B, N]`.
        received: attention received, averaged over heads and queries `[B, N]`.
        query: queries `[B, H, N, d]`.
        keys: keys of all heads `[B, H, N, d]`.
        bias: additive key bias `[B, N]`, the log sizes, or None.
        scale: softmax scale.
    """

    x: Tensor
    class_row: Tensor | None = None
    received: Tensor | None = None
    query: Tensor | None = None
    keys: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass of settings, checked when it is created.

    A method answers two questions: how many tokens each block keeps (`counts`, before the run,
    on the host) and which ones (`assign`, per block, on the device).

    Args:
        round_to: raise every count to the next multiple, prefix included; 1 is off.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    guarantees: ClassVar[str] = ""
    where: ClassVar[Where] = "mlp"
    proportional_attention: ClassVar[bool] = False

    round_to: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        require(self, "round_to", is_int(self.round_to) and self.round_to >= 1, "an integer >= 1")
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for settings that are wrong whatever the model."""

    @property
    def needs(self) -> frozenset[Need]:
        """Signals the tap must collect."""
        return frozenset()

    @property
    def proportional(self) -> bool:
        """Whether attention weighs every key by its token's size."""
        return self.proportional_attention

    def plan(self, shape: ModelShape) -> Schedule:
        """Token counts of every block for a model of this shape, after `round_to`.

        Raises:
            ScheduleError: counts that this shape cannot have.
        """
        return self.counts(shape).round_to(self.round_to)

    def counts(self, shape: ModelShape) -> Schedule:
        """Token counts before rounding."""
        raise NotImplementedError

    def assign(self, features: Features, state: TokenState, step: Step) -> Assignment:
        """Choose which tokens stay, merge and go; indices only, called without gradient."""
        raise NotImplementedError

    @classmethod
    def at_gflops(cls, shape: ModelShape, gflops: float) -> Self:
        """The method's settings for a cost of at most `gflops` G multiply-accumulates per image.

        Raises:
            ScheduleError: no setting is that cheap.
        """
        raise NotImplementedError

    @classmethod
    def at_speedup(cls, table: Clock, speedup: float, *, round_to: int = 1) -> Self:
        """The weakest settings that run `speedup` times as fast as the dense model by a table.

        Args:
            table: a `LatencyTable`, best measured with this very method.
            speedup: wanted speed-up, 1 or larger.
            round_to: of the settings.

        Raises:
            ConfigError: a speed-up below 1.
            ScheduleError: no setting is that fast; says how fast the fastest is.
        """
        if not speedup >= 1:
            raise ConfigError(f"speedup={speedup!r}: must be 1 or larger")
        shape, dense = table.shape, count_macs(table.shape) / 1e9

        def ms(share: float) -> float | None:
            try:
                method = cls.at_gflops(shape, share * dense)
            except ScheduleError:
                return None
            return table.predict(dataclasses.replace(method, round_to=round_to).plan(shape))

        share, fastest = weakest(table.dense_ms / speedup, ms)
        if share is None:
            raise ScheduleError(
                f"a speed-up of {speedup:.4g} is out of reach: by this table {cls.name} runs at "
                f"most {table.dense_ms / fastest:.4g} times as fast as the dense model "
                f"({fastest:.4g} of {table.dense_ms:.4g} ms)"
            )
        return dataclasses.replace(cls.at_gflops(shape, share * dense), round_to=round_to)

    def cost(self, shape: ModelShape) -> float:
        """Cost of one image under this method, in G."""
        return self.plan(shape).gflops(shape, self.where)

    def to_string(self) -> str:
        """The command-line form, `name:field=value,...`: first setting, and what is not default."""
        parts = []
        own = [field for field in dataclasses.fields(self) if not field.kw_only]
        for field in (*own, *(f for f in dataclasses.fields(self) if f.kw_only)):
            value = getattr(self, field.name)
            if value != field.default or (field is own[0] and value is not None):
                text = str(list(value)) if isinstance(value, tuple) else str(value)
                parts.append(f"{field.name}={text.replace(' ', '')}")
        return self.name + (":" + ",".join(parts) if parts else "")


def at_rate(
    cls: Callable[[float], Method], shape: ModelShape, gflops: float, lowest: float = 0.02
) -> float:
    """The highest keep rate, to four digits, at which `cls(rate)` costs at most `gflops` G."""
    rate = solve(gflops, 1.0, lowest, lambda keep: cls(keep).cost(shape))
    return max(lowest, int(rate * 1e4) / 1e4)


def at_count(cls: Callable[[int], Method], shape: ModelShape, gflops: float) -> int:
    """The smallest r, tokens removed per block, at which `cls(r)` costs at most `gflops` G."""
    most = shape.patches
    r = solve(gflops, 0, most, lambda value: cls(-int(-value // 1)).cost(shape))
    return -int(-r // 1)


def require(owner: object, field: str, ok: bool, allowed: str) -> None:
    """Raise `ConfigError` naming the class, the field, its value and what is allowed."""
    if not ok:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}({field}={value!r}): must be {allowed}")


def is_int(value: Any) -> bool:
    """True for whole numbers, not for booleans."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_rate(value: Any) -> bool:
    """True for numbers in (0, 1]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def as_blocks(owner: object, field: str) -> tuple[int, ...]:
    """Normalise a field of block indices to a tuple of distinct, rising, non-negative ints."""
    value = getattr(owner, field)
    if is_int(value):
        value = (value,)
    ok = isinstance(value, (list, tuple)) and all(is_int(b) and b >= 0 for b in value)
    ok = ok and len(value) > 0 and all(a < b for a, b in pairwise(value))
    require(owner, field, ok, "rising block indices, 0 is the first block")
    blocks = tuple(value)
    object.__setattr__(owner, field, blocks)
    return blocks


def parse_value(text: str) -> Any:
    """A number, list, boolean or None where the text is one, else the text itself."""
    words: Mapping[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return tuple(value) if isinstance(value, list) else value
