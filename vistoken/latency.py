"""A measured table of block time against token count, one per machine, model and batch.

FLOPs do not tell what a reduction saves: small matrices leave a GPU idle, and matching and merging
cost time themselves. The table holds what the model's own blocks took, so that a schedule can be
planned for a wanted time. A block that n tokens enter and m leave takes

    attn(n) + [n > m] reduce(n) + mlp(m)        (mlp(n) where tokens go after the whole block)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.clock import Mode, versions
from vistoken.errors import ConfigError, ScheduleError
from vistoken.flops import Where
from vistoken.methods import METHODS, Method
from vistoken.probe import Case, Probe, at_least
from vistoken.schedule import Schedule
from vistoken.shape import BlockCost, ModelShape


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one block by the tokens that enter it, measured on one machine.

    Attributes:
        case: model, batch, device and method that the times are valid for.
        shape: lengths and costs of the model.
        where: whether tokens go before the MLP branch or after the block.
        tokens: token counts measured, rising; the last is N0.
        block_ms: the model's own block, at each count; all columns are scaled so that it makes up
            `dense_ms` at N0.
        attn_ms: the wrapped block up to the point of reduction.
        mlp_ms: the rest of the wrapped block.
        reduce_ms: what reducing adds: signals, matching and merging.
        dense_ms: the whole model without a method.
        rest_ms: of which outside the blocks: patch embedding, norm, head.
        wrapped_rest_ms: the same of the wrapped model, whose patch embedding may be faster.
        execution: which implementation of the wrapped block was measured.
        versions: of the libraries it was measured with.
        seconds: how long measuring took.

    Raises:
        ConfigError: columns of unequal length, or counts that do not rise to N0.
    """

    case: Case
    shape: ModelShape
    where: Where
    tokens: tuple[int, ...]
    block_ms: tuple[float, ...]
    attn_ms: tuple[float, ...]
    mlp_ms: tuple[float, ...]
    reduce_ms: tuple[float, ...]
    dense_ms: float
    rest_ms: float
    wrapped_rest_ms: float
    execution: str
    versions: dict[str, str]
    seconds: float

    def __post_init__(self) -> None:
        columns = (self.block_ms, self.attn_ms, self.mlp_ms, self.reduce_ms)
        lengths = {len(self.tokens), *map(len, columns)}
        if len(lengths) != 1 or len(self.tokens) < 2:
            raise ConfigError(f"columns of {sorted(lengths)} entries: all need the same, 2 or more")
        if sorted(set(self.tokens)) != list(self.tokens) or self.tokens[-1] != self.shape.tokens:
            raise ConfigError(
                f"tokens={self.tokens}: must rise and end with the model's {self.shape.tokens}"
            )

    # Predicting -----------------------------------------------------------------------------------

    def predict(self, schedule: Schedule | Sequence[int]) -> float:
        """Milliseconds of one batch under a schedule, or under counts that leave each block.

        Raises:
            ScheduleError: another number of blocks or of tokens than the model has, or counts that
                no block of it can leave.
        """
        if isinstance(schedule, Schedule):
            if schedule.tokens != self.shape.tokens:
                raise ScheduleError(
                    f"the schedule starts with {schedule.tokens} tokens, the table's model with "
                    f"{self.shape.tokens}"
                )
            schedule = schedule.kept
        wrong = [n for n in schedule if not 1 <= n <= self.shape.tokens]
        if wrong:
            raise ScheduleError(
                f"{wrong[0]} tokens cannot leave a block: counts must lie between 1 and the "
                f"{self.shape.tokens} tokens of the table's model"
            )
        return float(self.cost(torch.tensor(schedule, dtype=torch.float64)))

    def cost(self, kept: Tensor) -> Tensor:
        """`predict` with a gradient: linear between the measured counts, constant below the first.

        Args:
            kept: tokens that leave each block, `[..., depth]`; integers count in float64.

        Returns:
            Milliseconds `[...]`. Whether a block reduces at all is a step without gradient.

        Raises:
            ScheduleError: another number of blocks than the model has.
        """
        if kept.shape[-1] != self.shape.depth:
            raise ScheduleError(
                f"{kept.shape[-1]} counts were given, the table's model has {self.shape.depth} "
                "blocks"
            )
        kept = kept if kept.is_floating_point() else kept.double()
        first = torch.full_like(kept[..., :1], self.shape.tokens)
        entering = torch.cat([first, kept[..., :-1]], -1)
        reduces = (kept < entering).to(kept.dtype)
        at = self._interpolator(kept)
        in_mlp = kept if self.where == "mlp" else entering
        blocks = at(self.attn_ms, entering) + reduces * at(self.reduce_ms, entering)
        return self.wrapped_rest_ms + (blocks + at(self.mlp_ms, in_mlp)).sum(-1)

    def _interpolator(self, like: Tensor) -> Callable[[Sequence[float], Tensor], Tensor]:
        """Interpolation of columns at float counts, on the device and in the type of `like`."""
        knots = torch.tensor(self.tokens, dtype=like.dtype, device=like.device)

        def at(column: Sequence[float], counts: Tensor) -> Tensor:
            values = torch.tensor(column, dtype=like.dtype, device=like.device)
            counts = counts.clamp(knots[0], knots[-1])
            right = torch.searchsorted(knots, counts.detach()).clamp(1, len(knots) - 1)
            left = right - 1
            share = (counts - knots[left]) / (knots[right] - knots[left])
            return torch.lerp(values[left], values[right], share)

        return at

    def speedup(self, schedule: Schedule | Sequence[int]) -> float:
        """Predicted speed-up over the model without a method."""
        return self.dense_ms / self.predict(schedule)

    # Files ----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON; a reader never sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        draft.replace(path)
        return path

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """Read a table that `save` wrote.

        Raises:
            ConfigError: the file is no table.
        """
        try:
            data = json.loads(Path(path).read_text())
            shape = data["shape"]
            blocks = tuple(BlockCost(**block) for block in shape["blocks"])
            shape = ModelShape(**{**shape, "grid": tuple(shape["grid"]), "blocks": blocks})
            columns = ("tokens", "block_ms", "attn_ms", "mlp_ms", "reduce_ms")
            lists = {name: tuple(data[name]) for name in columns}
            return LatencyTable(**{**data, **lists, "case": Case(**data["case"]), "shape": shape})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no latency table: {error!r}") from error

    # Measuring ------------------------------------------------------------------------------------

    @staticmethod
    def measure(
        model: nn.Module,
        images: Tensor | None = None,
        *,
        batch: int | None = None,
        method: Method | str | None = None,
        mode: Mode | None = None,
        step: int | None = None,
        repeats: int = 10,
    ) -> LatencyTable:
        """Time the model's blocks at many token counts; the model itself stays as it is.

        Args:
            model: a supported model in eval mode, wrapped or not, where and as it is to run.
            images: one batch `[B, 3, H, W]`; None takes random ones of the default size.
            batch: images per batch, where no images are given; default 1.
            method: what reduces tokens, a name or settings; default: the method that the model is
                wrapped with, else DiffRate.
            mode: `graph` (default on CUDA) times CUDA graphs, `eager` calls.
            step: distance of the token counts; default: 8, or more so that 32 counts suffice.
            repeats: timings of which the median counts.

        Raises:
            ConfigError: an unknown method or mode, or numbers below 1.
            UnsupportedBackboneError: no supported vision transformer is in the model.
            UnsupportedMethodError: the model lacks what the method reads.
        """
        return _measured(Probe(model, images, batch, method, mode, step), repeats)

    @staticmethod
    def cached(
        model: nn.Module,
        images: Tensor | None = None,
        *,
        batch: int | None = None,
        method: Method | str | None = None,
        mode: Mode | None = None,
        step: int | None = None,
        repeats: int = 10,
        folder: str | Path | None = None,
        refresh: bool = False,
    ) -> LatencyTable:
        """The table of this machine's cache; measured where it is missing or of other versions.

        Arguments and errors are those of `measure`; besides, `folder` of the cache (default
        `$XDG_CACHE_HOME/vistoken`, or `~/.cache/vistoken`) and `refresh`, to measure in any case.
        """
        probe = Probe(model, images, batch, method, mode, step)
        path = table_path(probe.case, folder)
        if path.is_file() and not refresh:
            try:
                table = LatencyTable.load(path)
            except ConfigError:
                table = None
            if table is not None and (table.case, table.versions) == (probe.case, versions()):
                return table
        table = _measured(probe, repeats)
        table.save(path)
        return table


def _measured(probe: Probe, repeats: int) -> LatencyTable:
    """The table of a model about to be timed."""
    return LatencyTable(
        case=probe.case,
        shape=probe.shape,
        where=probe.method.where,
        versions=versions(),
        **probe.columns(repeats),
    )


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/vistoken`, or `~/.cache/vistoken`."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "vistoken"


def table_path(case: Case, folder: str | Path | None = None) -> Path:
    """Where the table of a case is kept: named by the device and a digest of the case."""
    device = re.sub(r"[^a-z0-9]+", "-", case.device.lower()).strip("-")
    digest = hashlib.sha256(json.dumps(asdict(case), sort_keys=True).encode()).hexdigest()
    return Path(folder or cache_folder()) / f"latency-{device}-{digest[:12]}.json"


def schedule_for(
    model: nn.Module,
    speedup: float,
    table: LatencyTable | None = None,
    *,
    batch: int | None = None,
    method: str | None = None,
    round_to: int = 1,
) -> Schedule:
    """`Schedule.for_speedup`: counts for a wanted measured speed-up.

    Raises:
        ConfigError: an unknown method, a batch beside a table, or numbers below 1.
        ScheduleError: the speed-up is out of reach; the message says what is possible.
    """
    at_least("round_to", round_to)
    if table is None:
        table = LatencyTable.cached(model, batch=batch, method=method)
    elif batch is not None:
        raise ConfigError(f"batch={batch}: the table was measured at {table.case.batch}")
    name = method or table.case.method
    if name not in METHODS:
        raise ConfigError(f"method={name!r}: must be one of {', '.join(METHODS)}")
    return METHODS[name].at_speedup(table, speedup, round_to=round_to).plan(table.shape)
