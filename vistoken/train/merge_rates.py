"""Learned counts of an operator that only merges, at most half of a block's patches: ToMe.

The distributions are those of `Rates`, with one count per block. With N tokens entering a block, P
of them prefix tokens, and c the expected count,

    N' = max(min(N, c), N - floor((N - P) / 2))
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vistoken.schedule import Schedule
from vistoken.shape import ModelShape
from vistoken.train.rates import Rates


class MergeRates(Rates):
    """Logits over the patches that each block keeps after merging; every block may merge.

    Arguments and errors are those of `Rates`; without `blocks` the first is learned too.
    """

    ways: ClassVar[int] = 1

    @staticmethod
    def default_blocks(shape: ModelShape) -> tuple[int, ...]:
        """All blocks, but the last where the head averages patches."""
        return tuple(range(shape.depth - (shape.pool == "avg")))

    def _running_minimum(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that leave each block and those that enter it, `[depth]`."""
        before = counts.new_full((), float(self.shape.tokens))
        entering, leaving = [], []
        for block in range(self.shape.depth):
            now = before
            if block in self.blocks:
                wanted = counts[self.blocks.index(block), 0]
                # Not `minimum`, which halves the gradient where both are equal.
                now = torch.where(wanted <= before, wanted, before)
                half = (before - self.shape.prefix) / 2
                least = before - half + (half - half.floor()).detach()
                now = torch.where(now < least, least, now)
            entering.append(before)
            leaving.append(now)
            before = now
        kept = torch.stack(leaving)
        if self.carry == "both":
            own = torch.zeros_like(kept).index_add(
                0, self.learned, (counts - counts.detach())[:, 0]
            )
            kept = kept.detach() + own
        return kept, torch.stack(entering).detach()

    def _limits(self, counts: Tensor, kept: Tensor) -> Tensor:
        """Ranks from this one on are merged, `[blocks, 1]`: never more than half of the patches."""
        return kept[self.learned][:, None]

    def schedule(self) -> Schedule:
        """The counts as a plain schedule; waits for the device."""
        if not self.fixed:
            self.counts.copy_(self.expected().detach())
        kept, _ = self._running_minimum(self.counts.to(self.logits.dtype))
        self.counts.copy_(self._limits(self.counts, kept))
        leaving = [int(n) for n in kept.tolist()]
        entering = [self.shape.tokens, *leaving[:-1]]
        return Schedule(
            self.shape.tokens, self.shape.prefix, tuple(zip(entering, leaving, strict=True))
        )

    def allowed(self, schedule: Schedule) -> Schedule:
        """The counts of a schedule as far as the rates can hold them, half of a block's at most."""
        before, numbers = self.shape.tokens, []
        for block, wanted in enumerate(schedule.kept):
            most = (before - self.shape.prefix) // 2 if block in self.blocks else 0
            numbers.append(min(max(0, before - max(self.fewest, wanted)), most))
            before -= numbers[-1]
        return Schedule.merging(self.shape, numbers)

    def fewest_counts(self) -> Schedule:
        """The schedule of the smallest candidates that this operator can hold."""
        return self.allowed(super().fewest_counts())
