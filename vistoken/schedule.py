"""Token counts per block, planned on the host before a forward pass starts.

Counts are Python ints and include the prefix tokens, so every block has one static length: nothing
is read back from the device, and a whole forward pass can be compiled or captured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vistoken.errors import ScheduleError
from vistoken.flops import Where, count_macs
from vistoken.shape import ModelShape

T = TypeVar("T")


class Clock(Protocol):
    """What predicts how long a schedule takes; `vistoken.LatencyTable` is one."""

    @property
    def shape(self) -> ModelShape:
        """Lengths and costs of the model that was timed."""

    @property
    def dense_ms(self) -> float:
        """Milliseconds of the model without a method."""

    def predict(self, schedule: Schedule) -> float:
        """Milliseconds under a schedule."""


@dataclass(frozen=True)
class Step:
    """What one block has to do: `tokens` come in, `pruned` survive, `merged` leave."""

    block: int
    depth: int
    tokens: int
    pruned: int
    merged: int

    @property
    def idle(self) -> bool:
        """True when the block keeps every token."""
        return self.merged == self.tokens


@dataclass(frozen=True)
class Schedule:
    """Tokens left in each block after its pruning and after its merging, prefix included.

    Args:
        tokens: N0, tokens that enter block 0.
        prefix: prefix tokens, never removed.
        counts: one pair (after pruning, after merging) per block; non-increasing throughout.

    Raises:
        ScheduleError: counts that rise, exceed N0, or leave no patch token.
    """

    tokens: int
    prefix: int
    counts: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        before = self.tokens
        for block, (pruned, merged) in enumerate(self.counts):
            if not before >= pruned >= merged:
                raise ScheduleError(
                    f"block {block}: {before} tokens enter, {pruned} after pruning, {merged} after "
                    "merging; counts must not rise (Schedule.from_lists takes the running minimum)"
                )
            before = merged
        if before < self.prefix + 1:
            raise ScheduleError(
                f"the schedule ends with {before} tokens of which {self.prefix} are prefix tokens; "
                "at least one patch token must remain"
            )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.counts)

    @property
    def kept(self) -> tuple[int, ...]:
        """Tokens that leave each block, prefix included."""
        return tuple(merged for _, merged in self.counts)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The work of each block in order."""
        entering = (self.tokens, *self.kept[:-1])
        return tuple(
            Step(block, self.depth, before, pruned, merged)
            for block, (before, (pruned, merged)) in enumerate(
                zip(entering, self.counts, strict=True)
            )
        )

    @property
    def removed(self) -> tuple[int, int]:
        """Tokens removed by pruning and by merging over all blocks."""
        by_pruning = sum(step.tokens - step.pruned for step in self.steps)
        return by_pruning, self.tokens - self.kept[-1] - by_pruning

    def round_to(self, multiple: int) -> Schedule:
        """Counts raised to the next multiple (prefix included), never above the block's input.

        Tensor-core kernels like lengths that are multiples of 8 (Token Cropr, CVPR 2025).

        Raises:
            ScheduleError: `multiple` is not a positive whole number.
        """
        if multiple < 1:
            raise ScheduleError(f"round_to={multiple}: must be 1 (off) or larger")

        def up(count: int, limit: int) -> int:
            return min(limit, -(-count // multiple) * multiple)

        counts: list[tuple[int, int]] = []
        before = self.tokens
        for pruned, merged in self.counts:
            after_prune = up(pruned, before)
            before = up(merged, after_prune)
            counts.append((after_prune, before))
        return Schedule(self.tokens, self.prefix, tuple(counts))

    @staticmethod
    def from_lists(
        tokens: int, prefix: int, pruned: Sequence[int], merged: Sequence[int]
    ) -> Schedule:
        """Schedule from two lists of counts, each entry taken as an upper bound (running minimum).

        Raises:
            ScheduleError: lists of unequal length, or an entry above N0.
        """
        if len(pruned) != len(merged):
            raise ScheduleError(f"{len(pruned)} prune counts but {len(merged)} merge counts")
        highest = max((*pruned, *merged), default=0)
        if highest > tokens:
            raise ScheduleError(
                f"the lists keep up to {highest} tokens, the model has {tokens}; they were made "
                "for another model or image size"
            )
        counts: list[tuple[int, int]] = []
        before = tokens
        for after_prune, after_merge in zip(pruned, merged, strict=True):
            after_prune = min(before, int(after_prune))
            before = min(after_prune, int(after_merge))
            counts.append((after_prune, before))
        return Schedule(tokens, prefix, tuple(counts))

    @staticmethod
    def merging(shape: ModelShape, removals: Iterable[int], multiple: int = 1) -> Schedule:
        """Merge `removals[l]` tokens in block l, at most half of its patch tokens.

        Counts are raised to the next `multiple`; a block that waited for one may then merge more
        than `removals[l]`, but not more than half.
        """
        counts: list[tuple[int, int]] = []
        before = wanted = shape.tokens
        for removal in removals:
            wanted -= min(removal, (wanted - shape.prefix) // 2)
            least = before - (before - shape.prefix) // 2
            after = min(before, -(-max(wanted, least) // multiple) * multiple)
            counts.append((before, after))
            before = after
        return Schedule(shape.tokens, shape.prefix, tuple(counts))

    @staticmethod
    def pruning(shape: ModelShape, kept_patches: Callable[[int, int], int]) -> Schedule:
        """Prune to `kept_patches(block, patches)` patch tokens in each block, at least one."""
        counts: list[tuple[int, int]] = []
        patches = shape.patches
        for block in range(shape.depth):
            patches = max(1, min(patches, kept_patches(block, patches)))
            counts.append((shape.prefix + patches,) * 2)
        return Schedule(shape.tokens, shape.prefix, tuple(counts))

    @staticmethod
    def for_speedup(
        model: Any,
        speedup: float,
        table: Clock | None = None,
        *,
        batch: int | None = None,
        method: str | None = None,
        round_to: int = 1,
    ) -> Schedule:
        """Counts at which a model runs `speedup` times as fast as without a method, by measurement.

        Args:
            model: a supported model in eval mode, where and as it is to run.
            speedup: wanted speed-up, 1 or larger.
            table: a `LatencyTable`; None takes the one of this machine's cache, and builds it
                first if need be.
            batch: images per batch, where no table is given; default 1.
            method: name of the method whose counts are sought; default: that of the table, which
                is the one the model is wrapped with, else DiffRate.
            round_to: raise every count to the next multiple.

        Raises:
            ConfigError: a method or number that is not allowed.
            ScheduleError: the speed-up is out of reach; says which is possible.
        """
        # Measuring needs models, which lie above this module.
        plan: Schedule = import_module("vistoken.latency").schedule_for(
            model, speedup, table, batch=batch, method=method, round_to=round_to
        )
        return plan

    def gflops(self, shape: ModelShape, where: Where = "mlp") -> float:
        """Multiply-accumulates of one image under this schedule, in G."""
        return count_macs(shape, self.kept, where) / 1e9

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `tokens`, `prefix`, `pruned` and `merged` lists."""
        return {
            "tokens": self.tokens,
            "prefix": self.prefix,
            "pruned": [pruned for pruned, _ in self.counts],
            "merged": [merged for _, merged in self.counts],
        }

    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n")

    @staticmethod
    def load(path: str | Path) -> Schedule:
        """Read a schedule that `save` wrote.

        Raises:
            ScheduleError: the file lacks one of `tokens`, `prefix`, `pruned`, `merged`.
        """
        data = json.loads(Path(path).read_text())
        missing = {"tokens", "prefix", "pruned", "merged"} - set(data)
        if missing:
            raise ScheduleError(f"{path} is no schedule: it lacks {sorted(missing)}")
        return Schedule.from_lists(data["tokens"], data["prefix"], data["pruned"], data["merged"])


def weakest(
    target: float, cost: Callable[[float], float | None], parts: int = 128, halvings: int = 6
) -> tuple[float | None, float]:
    """The largest share in (0, 1] at which a measured cost is at most `target`.

    Measured costs need not fall with the share: a smaller matrix can be slower. So the shares are
    walked from 1 downwards, and only the last gap is halved.

    Args:
        target: wanted cost.
        cost: cost at a share of the dense model, or None where the share is out of reach.
        parts: steps of the walk.
        halvings: of the gap between the last share that costs too much and the first that does not.

    Returns:
        The share, or None where nothing is that cheap; and the lowest cost seen.
    """
    lowest = float("inf")
    for part in range(parts, 0, -1):
        found = cost(part / parts)
        if found is None:
            break
        lowest = min(lowest, found)
        if found <= target:
            good, bad = part / parts, (part + 1) / parts
            for _ in range(halvings if part < parts else 0):
                middle = (good + bad) / 2
                here = cost(middle)
                good, bad = (middle, bad) if here is not None and here <= target else (good, middle)
            return good, lowest
    return None, lowest


def solve(
    target: float, low: float, high: float, cost: Callable[[float], float], steps: int = 40
) -> float:
    """The smallest reduction in [low, high] whose cost is at most `target`.

    Args:
        target: wanted cost.
        low: parameter of the weakest reduction.
        high: parameter of the strongest reduction.
        cost: cost of a parameter; falls as the parameter moves from `low` to `high`.
        steps: halvings of the interval.

    Raises:
        ScheduleError: even the strongest reduction costs more than `target`.
    """
    if cost(low) <= target:
        return low
    if cost(high) > target:
        raise ScheduleError(
            f"a cost of {target:.4g} G is out of reach: this method goes down to {cost(high):.4g} "
            f"G on this model, from {cost(low):.4g} G"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high
