"""Learned counts: for every block a distribution over how many patches pruning and merging keep.

DiffRate, Chen et al., ICCV 2023, section 3. Everything is closed form in the logits z of all blocks
at once, with p = softmax(z), candidates K_k and P prefix tokens:

    count        ceil(sum_k K_k p_k) + P          whole in the forward pass, identity backwards
    survival     pi_i = sum over K_k > i of p_k   of the patch of rank i
    mask         1[P + i < count]                 forward, the gradient of pi_i backwards
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vistoken.errors import ConfigError, ScheduleError
from vistoken.methods import parse
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape

Carry = Literal["active", "both"]
SLACK = 1e-3
"""Rounding of the expectation that must not raise a count by one."""


@dataclass(frozen=True)
class Plan:
    """The counts of one forward pass, with gradients to the logits.

    Attributes:
        masks: `[blocks, 2, N0]` zeros and ones: does the token of a rank survive pruning, merging;
            `[blocks, 1, N0]` of an operator that only merges.
        kept: `[depth]` tokens that leave each block, whole numbers.
        waking: `[depth]` 1 where a block removes tokens, else 0; its gradient is that of the chance
            to remove any.
    """

    masks: Tensor
    kept: Tensor
    waking: Tensor


class Rates(nn.Module):
    """Logits over the patches that each learned block keeps after pruning and after merging.

    `last` is the plan of the last forward pass, from which the cost is taken.

    Args:
        shape: lengths of the model.
        blocks: blocks whose counts are learned; None takes all but the first, and but the last
            where the head averages patches (as published).
        granularity: distance of the candidates.
        spread: width in patches of the distributions that `load` sets.
        carry: who gets the gradient of `N_l = min(N_(l-1), prune_l, merge_l)`: the `active`
            argument alone, or `both` counts and never the block before (as published).

    Raises:
        ConfigError: blocks, granularity, spread or carry that are not allowed.
    """

    ways: ClassVar[int] = 2
    """Counts of a block: after pruning and after merging."""
    candidates: Tensor
    reach: Tensor
    counts: Tensor
    learned: Tensor

    def __init__(
        self,
        shape: ModelShape,
        blocks: Sequence[int] | None = None,
        granularity: int = 1,
        spread: float = 8.0,
        carry: Carry = "both",
    ) -> None:
        super().__init__()
        chosen = self.default_blocks(shape) if blocks is None else tuple(blocks)
        _check(shape, chosen, granularity, spread, carry)
        self.shape, self.blocks, self.spread, self.carry = shape, chosen, spread, carry
        candidates = torch.arange(shape.patches, 0, -granularity, dtype=torch.float32)
        ranks = torch.arange(shape.patches)
        # Candidates above rank i; the smallest one keeps the patches below it for certain.
        above = (shape.patches - ranks + granularity - 1) // granularity
        self.register_buffer("candidates", candidates, persistent=False)
        self.register_buffer("reach", above.clamp(max=len(candidates)) - 1, persistent=False)
        self.register_buffer("learned", torch.tensor(chosen), persistent=False)
        self.register_buffer("counts", torch.zeros(len(chosen), self.ways, dtype=torch.int64))
        self.logits = nn.Parameter(torch.zeros(len(chosen), self.ways, len(candidates)))
        self.counts.copy_(self.expected().detach())
        self.last: Plan | None = None

    @staticmethod
    def default_blocks(shape: ModelShape) -> tuple[int, ...]:
        """All blocks but the first, and but the last where the head averages patches."""
        return tuple(range(1, shape.depth - (shape.pool == "avg")))

    @property
    def fewest(self) -> int:
        """Tokens that the smallest candidate keeps, prefix included."""
        return self.shape.prefix + int(self.candidates[-1])

    @property
    def fixed(self) -> bool:
        """Whether the counts are frozen."""
        return not self.logits.requires_grad

    def expected(self) -> Tensor:
        """Tokens kept by each learned block, `[blocks, ways]`: whole, identity gradient."""
        mean = (self.logits.softmax(-1) * self.candidates).sum(-1)
        whole = (mean.detach() - SLACK).ceil().clamp(1, self.shape.patches)
        return whole + (mean - mean.detach()) + self.shape.prefix

    def survival(self) -> Tensor:
        """Chance `[blocks, ways, N0]` of the token of each rank to survive; 1 for prefix tokens."""
        # Not by indexing, whose gradient sorts.
        reach = self.reach.expand(*self.logits.shape[:2], -1)
        patches = self.logits.softmax(-1).cumsum(-1).gather(-1, reach)
        prefix = patches.new_ones(*patches.shape[:2], self.shape.prefix)
        return torch.cat([prefix, patches], -1)

    def forward(self) -> Plan:
        """Counts and masks of the logits as they are; notes the counts in the buffer.

        Raises:
            ConfigError: the logits are in half precision, which does not hold counts above 256.
        """
        if self.logits.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"logits of {self.logits.dtype}: counts are learned in float32; keep the rates in "
                "it and use autocast (precision 'bf16-mixed') for the model"
            )
        counts, chance = self.expected(), self.survival()
        kept, entering = self._running_minimum(counts)
        limits = self._limits(counts, kept).detach()
        if not self.fixed:
            self.counts.copy_(limits)
        ranks = torch.arange(self.shape.tokens, device=counts.device)
        hard = (ranks < limits[..., None]).to(chance.dtype)
        waking = self._waking(chance, kept, entering)
        self.last = Plan(hard + (chance - chance.detach()), kept, waking)
        return self.last

    def _running_minimum(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that leave each block and those that enter it, `[depth]`."""
        every = counts.new_full((self.shape.depth, 2), float(self.shape.tokens))
        every = every.index_copy(0, self.learned, counts)
        kept = every.flatten().cummin(0).values.view(-1, 2)[:, 1]
        if self.carry == "both":
            both = (every - every.detach()).sum(1)
            kept = kept.detach() + both
        entering = torch.cat([kept.new_full((1,), float(self.shape.tokens)), kept[:-1]])
        return kept, entering

    def _limits(self, counts: Tensor, kept: Tensor) -> Tensor:
        """Ranks from this one on are pruned or merged, `[blocks, ways]`."""
        return counts

    def _waking(self, chance: Tensor, kept: Tensor, entering: Tensor) -> Tensor:
        """Whether each block removes tokens: the last living one survives it or does not."""
        last = (entering.detach()[self.learned] - 1).long()[:, None, None].expand(-1, self.ways, 1)
        # Not `prod`, whose gradient asks the host whether there are zeros.
        stays = reduce(mul, chance.gather(2, last)[..., 0].unbind(1))
        hard = (kept.detach() < entering.detach()).to(kept.dtype)
        return hard.index_add(0, self.learned, stays.detach() - stays)

    # Schedules ------------------------------------------------------------------------------------

    def allowed(self, schedule: Schedule) -> Schedule:
        """The counts of a schedule, as far as the rates can hold them.

        Removals in blocks that are not learned wait for the next learned one, and no count lies
        below the smallest candidate.
        """
        counts, before = [], self.shape.tokens
        for block, pair in enumerate(schedule.counts):
            pruned, merged = (min(before, max(self.fewest, count)) for count in pair)
            if block not in self.blocks:
                pruned = merged = before
            counts.append((pruned, merged))
            before = merged
        return Schedule(self.shape.tokens, self.shape.prefix, tuple(counts))

    def fewest_counts(self) -> Schedule:
        """The schedule of the smallest candidates."""
        counts = [(self.shape.tokens,) * 2] * self.blocks[0]
        counts += [(self.fewest,) * 2] * (self.shape.depth - self.blocks[0])
        return Schedule(self.shape.tokens, self.shape.prefix, tuple(counts))

    def schedule(self) -> Schedule:
        """The counts as a plain schedule; waits for the device."""
        if not self.fixed:  # The optimizer has moved the logits since the last forward pass.
            self.counts.copy_(self.expected().detach())
        full = [[self.shape.tokens] * 2 for _ in range(self.shape.depth)]
        for block, pair in zip(self.blocks, self.counts.tolist(), strict=True):
            full[block] = pair
        pruned, merged = zip(*full, strict=True)
        return Schedule.from_lists(self.shape.tokens, self.shape.prefix, pruned, merged)

    def freeze(self, schedule: Schedule | None = None) -> Schedule:
        """Stop learning, at these counts or at given ones; returns the schedule."""
        if schedule is not None:
            self.load(schedule)
        self.logits.requires_grad_(False)
        return self.schedule()

    @torch.no_grad()
    def load(self, schedule: Schedule) -> None:
        """Set the logits so that the counts are those of a schedule.

        Each distribution is a bell of width `spread` around the count, so that it can move.

        Raises:
            ScheduleError: another length or depth, a block that is not learned removes tokens, or
                a count below the smallest candidate.
        """
        shape, fewest = self.shape, self.fewest
        if (schedule.tokens, schedule.depth) != (shape.tokens, shape.depth):
            raise ScheduleError(
                f"the schedule is for {schedule.tokens} tokens and {schedule.depth} blocks, the "
                f"model has {shape.tokens} and {shape.depth}"
            )
        for step in schedule.steps:
            if step.block not in self.blocks and not step.idle:
                raise ScheduleError(
                    f"block {step.block} goes from {step.tokens} to {step.merged} tokens, but only "
                    f"the counts of blocks {list(self.blocks)} are learned"
                )
            if step.block in self.blocks and step.merged < fewest:
                raise ScheduleError(
                    f"block {step.block} keeps {min(step.pruned, step.merged)} tokens, but its "
                    f"smallest candidate keeps {fewest}; take a granularity that divides "
                    f"{shape.patches - 1}, or 1"
                )
        wanted = torch.tensor([schedule.counts[block][-self.ways :] for block in self.blocks])
        self.logits.copy_(bell(wanted - shape.prefix, self.candidates.cpu(), self.spread))
        self.counts.copy_(self.expected())


def bell(wanted: Tensor, candidates: Tensor, spread: float) -> Tensor:
    """Logits `[..., n]` of bells over the candidates whose means round up to the wanted counts.

    The centre is found by bisection: near an end of the range it lies outside of it.
    """
    grid = candidates.double()
    half = 0.5 * float(grid[0] - grid[1]) if len(grid) > 1 else 0.5
    aim = (wanted.double() - min(half, 0.5)).clamp(float(grid[-1]) + SLACK / 2)[..., None]
    low, high = torch.full_like(aim, -1e5), torch.full_like(aim, 1e5)
    for _ in range(80):
        middle = (low + high) / 2
        mean = (_log_bell(grid, middle, spread).softmax(-1) * grid).sum(-1, keepdim=True)
        low, high = torch.where(mean < aim, middle, low), torch.where(mean < aim, high, middle)
    logits = _log_bell(grid, (low + high) / 2, spread)
    return (logits - logits.amax(-1, keepdim=True)).clamp(min=-50.0).float()


def _log_bell(grid: Tensor, centre: Tensor, spread: float) -> Tensor:
    return -((grid - centre) ** 2) / (2 * spread * spread)


def initial_schedule(shape: ModelShape, init: str) -> Schedule | None:
    """The schedule to start from.

    Args:
        shape: lengths of the model.
        init: `uniform` (all candidates alike, as published), `identity`, a schedule file, or a
            method such as `diffrate:gflops=2.9` or `tome:r=13`.

    Returns:
        The schedule, or None for `uniform`.
    """
    if init == "uniform":
        return None
    if init == "identity":
        return Schedule(shape.tokens, shape.prefix, ((shape.tokens,) * 2,) * shape.depth)
    if init.endswith((".json", ".yaml", ".yml")):
        return Schedule.load(init)
    return parse(init).plan(shape)


def _check(
    shape: ModelShape, blocks: tuple[int, ...], granularity: int, spread: float, carry: str
) -> None:
    """Raise `ConfigError` for settings that are wrong."""
    ok = blocks and list(blocks) == sorted(set(blocks)) and blocks[0] >= 0
    if not ok or blocks[-1] >= shape.depth:
        raise ConfigError(f"blocks={blocks}: must be rising and in 0..{shape.depth - 1}")
    if not 1 <= granularity <= shape.patches:
        raise ConfigError(f"granularity={granularity}: must be in 1..{shape.patches}")
    if not (spread > 0 and math.isfinite(spread)):
        raise ConfigError(f"spread={spread}: must be larger than 0")
    if carry not in ("active", "both"):
        raise ConfigError(f"carry={carry!r}: must be 'active' or 'both'")
