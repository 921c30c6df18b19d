"""What a set of counts costs, with a gradient: GFLOPs in closed form, or measured milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vistoken.errors import ConfigError, ScheduleError
from vistoken.flops import count_macs
from vistoken.latency import LatencyTable
from vistoken.methods import DiffRate, Method
from vistoken.schedule import Schedule, solve, weakest
from vistoken.shape import ModelShape
from vistoken.train.rates import Plan, Rates


class Cost(nn.Module):
    """Base: the cost of counts, and the schedules that meet a target.

    Attributes:
        shape: lengths and costs of the model.
        dense: cost of the model without reduction.
        unit: name of the unit.
    """

    unit = ""

    def __init__(self, shape: ModelShape, dense: float) -> None:
        super().__init__()
        self.shape, self.dense = shape, dense

    def forward(self, plan: Plan) -> Tensor:
        """Cost of a plan, a scalar with a gradient to its counts."""
        return self.of(plan.kept, plan.waking)

    def of(self, kept: Tensor, waking: Tensor | None = None) -> Tensor:
        """Cost of counts `[depth]` that leave each block."""
        raise NotImplementedError

    def exactly(self, schedule: Schedule) -> float:
        """Cost of a schedule."""
        raise NotImplementedError

    def closest(self, target: float, method: type[Method] = DiffRate) -> Schedule:
        """The weakest counts of a method, without learning, that cost at most `target`.

        Raises:
            ScheduleError: none is that cheap.
        """

        def counts(share: float) -> Schedule:
            return method.at_gflops(self.shape, share * count_macs(self.shape) / 1e9).plan(
                self.shape
            )

        def cost(share: float) -> float | None:
            try:
                return self.exactly(counts(share))
            except ScheduleError:
                return None

        share, lowest = weakest(target, cost)
        if share is None:
            raise ScheduleError(
                f"a cost of {target:.4g} {self.unit} is out of reach: unlearned counts go down "
                f"to {lowest:.4g} {self.unit}, from {self.dense:.4g} {self.unit} without reduction"
            )
        return counts(share)

    def meet(
        self,
        schedule: Schedule,
        target: float,
        allowed: Callable[[Schedule], Schedule] = lambda schedule: schedule,
    ) -> Schedule:
        """A schedule of the same form that uses up the target: all removals by one factor.

        Blocks that rest go on resting, unless the others cannot meet the target.

        Args:
            schedule: counts that cost more or less than the target.
            target: wanted cost.
            allowed: brings counts to what the operator can do.

        Raises:
            ScheduleError: no counts are that cheap.
        """
        shape, fewest = self.shape, self.shape.prefix + 1

        def changed(factor: float, more: float = 0.0) -> Schedule:
            kept = []
            for block, pair in enumerate(schedule.counts):
                own = [factor * (shape.tokens - n) + more * (block + 1) for n in pair]
                kept.append([max(fewest, shape.tokens - round(n)) for n in own])
            counts = Schedule.from_lists(shape.tokens, shape.prefix, *zip(*kept, strict=True))
            return allowed(counts)

        try:
            return changed(solve(target, 0.0, 4.0, lambda factor: self.exactly(changed(factor))))
        except ScheduleError:
            most = float(shape.patches)
            more = solve(target, 0.0, most, lambda more: self.exactly(changed(1.0, more)))
            return changed(1.0, more)


class FlopsCost(Cost):
    """Multiply-accumulates of one image in G, the papers' convention."""

    unit = "GFLOPs"
    per_block: Tensor

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape, count_macs(shape) / 1e9)
        rows = [(cost.attn_linear, 2 * cost.attn_width, cost.mlp_linear) for cost in shape.blocks]
        costs = torch.tensor(rows, dtype=torch.float64).T / 1e9
        self.register_buffer("per_block", costs.float(), persistent=False)
        self.around = (shape.tokens * shape.stem + shape.head) / 1e9

    def of(self, kept: Tensor, waking: Tensor | None = None) -> Tensor:
        """GFLOPs of counts `[depth]`."""
        linear, mixing, mlp = self.per_block.to(kept.dtype)
        entering = torch.cat([kept.new_full((1,), float(self.shape.tokens)), kept[:-1]])
        per_block = entering * linear + entering * entering * mixing + kept * mlp
        total: Tensor = per_block.sum() + self.around
        return total

    def exactly(self, schedule: Schedule) -> float:
        """GFLOPs of a schedule."""
        return schedule.gflops(self.shape)


class LatencyCost(Cost):
    """Milliseconds of one batch by a measured table, linear between its counts.

    What reducing adds in a block is paid when it removes any token; its gradient is that of the
    chance to remove one.

    Args:
        table: block times of this very model.
    """

    unit = "ms"
    knots: Tensor
    columns: Tensor

    def __init__(self, table: LatencyTable) -> None:
        super().__init__(table.shape, table.dense_ms)
        self.table = table
        columns = torch.tensor((table.attn_ms, table.reduce_ms, table.mlp_ms))
        self.register_buffer("knots", torch.tensor(table.tokens).float(), persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def of(self, kept: Tensor, waking: Tensor | None = None) -> Tensor:
        """Milliseconds of counts `[depth]`: `LatencyTable.cost` on the device, without a copy."""
        entering = torch.cat([kept.new_full((1,), float(self.shape.tokens)), kept[:-1]])
        if waking is None:
            waking = (kept < entering).to(kept.dtype)
        attn, reduce = self._at(slice(0, 2), entering)
        (mlp,) = self._at(slice(2, 3), kept if self.table.where == "mlp" else entering)
        total: Tensor = (attn + waking * reduce + mlp).sum() + self.table.wrapped_rest_ms
        return total

    def _at(self, columns: slice, counts: Tensor) -> Tensor:
        """Columns `[c, depth]` at counts `[depth]`."""
        knots, values = self.knots.to(counts.dtype), self.columns[columns].to(counts.dtype)
        counts = counts.clamp(float(self.table.tokens[0]), float(self.table.tokens[-1]))
        right = torch.searchsorted(knots, counts.detach()).clamp(1, len(self.table.tokens) - 1)
        left = right - 1
        share = (counts - knots[left]) / (knots[right] - knots[left])
        return torch.lerp(values[:, left], values[:, right], share)

    def exactly(self, schedule: Schedule) -> float:
        """Predicted milliseconds of a schedule."""
        return self.table.predict(schedule)


def resolve_target(cost: Cost, target_gflops: float | None, target_speedup: float | None) -> float:
    """The target in the unit of a cost.

    Raises:
        ConfigError: not exactly one target, or one that this cost does not have.
    """
    if (target_gflops is None) == (target_speedup is None):
        raise ConfigError("give either target_gflops or target_speedup")
    if target_speedup is not None:
        if not target_speedup > 1:
            raise ConfigError(f"target_speedup={target_speedup}: must be larger than 1")
        return cost.dense / target_speedup
    if isinstance(cost, LatencyCost):
        raise ConfigError("cost='latency' aims at milliseconds; give target_speedup")
    assert target_gflops is not None
    return target_gflops


def check_reachable(cost: Cost, rates: Rates, target: float) -> None:
    """Raise `ScheduleError` for a target that no counts of the learned blocks can meet."""
    lowest = cost.exactly(rates.fewest_counts())
    if not lowest <= target < cost.dense:
        share = cost.dense / target
        raise ScheduleError(
            f"a target of {target:.4g} {cost.unit} ({share:.3g}x) cannot be reached: with blocks "
            f"{rates.blocks[0]} to {rates.blocks[-1]} learned the model costs between "
            f"{lowest:.4g} and {cost.dense:.4g} {cost.unit}"
        )
