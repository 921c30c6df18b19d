"""Token Merging (ToMe), Bolya et al., ICLR 2023, arXiv 2210.09461."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

from vistoken.errors import ScheduleError
from vistoken.kernels.bipartite import bipartite
from vistoken.methods.base import Features, Method, Need, at_count, is_int, require
from vistoken.schedule import Schedule, Step
from vistoken.shape import ModelShape
from vistoken.state import Assignment, TokenState


@dataclass(frozen=True)
class ToMe(Method):
    """Merge the r most similar pairs of tokens in every block.

    Tokens at even positions look for their most similar partner among those at odd positions, by
    the cosine of head-averaged keys; the r best pairs merge into their size-weighted mean.
    Attention weighs keys by size (proportional attention): right for supervised models, off for MAE
    models used without fine-tuning (section 4.2 of the paper).

    Args:
        r: tokens merged per block; a list gives one number per block and is padded with zeros.
        schedule: `constant`, or `decreasing`: from 2r in the first block to 0 in the last.
        proportional: add log(size) to every attention score.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "Token Merging, ICLR 2023"
    guarantees: ClassVar[str] = "sizes sum to N0; identical tokens merge without loss"

    r: int | Sequence[int] = 13
    schedule: Literal["constant", "decreasing"] = "constant"
    proportional: bool = True

    def check(self) -> None:
        """Check r and the schedule's name."""
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))
        many = isinstance(self.r, tuple) and all(is_int(n) and n >= 0 for n in self.r)
        require(self, "r", many or (is_int(self.r) and self.r >= 0), "an integer >= 0, or a list")  # type: ignore[operator]
        kinds = ("constant", "decreasing")
        require(self, "schedule", self.schedule in kinds, f"one of {kinds}")
        alone = not (many and self.schedule == "decreasing")
        require(self, "schedule", alone, "'constant' when r is a list")

    @property
    def needs(self) -> frozenset[Need]:
        """Keys."""
        return frozenset({Need.KEYS})

    def counts(self, shape: ModelShape) -> Schedule:
        """Merge r tokens per block, at most half of the block's patch tokens."""
        return Schedule.merging(shape, self.removals(shape.depth))

    def plan(self, shape: ModelShape) -> Schedule:
        """Counts after `round_to`, still at most half of a block's patch tokens at a time."""
        return Schedule.merging(shape, self.removals(shape.depth), self.round_to)

    def removals(self, depth: int) -> tuple[int, ...]:
        """Tokens to merge in each of `depth` blocks, before the cap of one half."""
        if not is_int(self.r):
            numbers = tuple(self.r)  # type: ignore[arg-type]
            if len(numbers) > depth:
                raise ScheduleError(f"r has {len(numbers)} entries, the model has {depth} blocks")
            return numbers + (0,) * (depth - len(numbers))
        r = int(self.r)  # type: ignore[arg-type]
        if self.schedule == "constant" or depth == 1:
            return (r,) * depth
        return tuple(int(2 * r - 2 * r * block / (depth - 1)) for block in range(depth))

    def assign(self, features: Features, state: TokenState, step: Step) -> Assignment:
        """Bipartite soft matching (section 3 of the paper)."""
        assert features.keys is not None
        r = step.tokens - step.merged
        keep, src, dst = bipartite(features.keys, state.prefix, r)
        return Assignment(keep=keep, src=src, dst=dst, weight=state.size)

    @classmethod
    def from_schedule(cls, schedule: Schedule | str | Path) -> Self:
        """The numbers r per block of a schedule that only merges, as rate learning exports it.

        Args:
            schedule: a `Schedule`, or the path of a file written by `Schedule.save`.

        Raises:
            ScheduleError: the schedule prunes, or merges more than half of a block's patches.
        """
        if not isinstance(schedule, Schedule):
            schedule = Schedule.load(schedule)
        for step in schedule.steps:
            if step.pruned < step.tokens:
                raise ScheduleError(
                    f"block {step.block} prunes {step.tokens - step.pruned} tokens; {cls.name} "
                    "only merges: load the schedule with DiffRate(schedule=...)"
                )
            merged, patches = step.tokens - step.merged, step.tokens - schedule.prefix
            if merged > patches // 2:
                raise ScheduleError(
                    f"block {step.block} merges {merged} of {patches} patch tokens; {cls.name} "
                    "merges at most half: load the schedule with DiffRate(schedule=...)"
                )
        return cls(r=tuple(step.tokens - step.merged for step in schedule.steps))

    @classmethod
    def at_gflops(cls, shape: ModelShape, gflops: float) -> Self:
        """Constant r for a cost of at most `gflops` G."""
        return cls(r=at_count(lambda r: cls(r=r), shape, gflops))
