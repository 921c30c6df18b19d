"""Token Fusion (ToFu), Kim et al., WACV 2024, arXiv 2312.01026."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vistoken.methods.base import Features, is_int, require
from vistoken.methods.tome import ToMe
from vistoken.schedule import Step
from vistoken.state import Assignment, TokenState


@dataclass(frozen=True)
class ToFu(ToMe):
    """ToMe's matching; early blocks drop the source, later blocks merge with MLERP.

    Early layers respond non-linearly to averaged inputs, so a source is pruned there; later layers
    take the direction of the mean and the length of the longest member (MLERP).

    Args:
        prune_blocks: how many of the first blocks prune instead of merging (the paper: half).
    """

    name: ClassVar[str] = "tofu"
    paper: ClassVar[str] = "Token Fusion, WACV 2024"
    guarantees: ClassVar[str] = "norms of merged tokens are kept"

    prune_blocks: int = 6

    def check(self) -> None:
        """Check the number of pruning blocks too."""
        super().check()
        ok = is_int(self.prune_blocks) and self.prune_blocks >= 0
        require(self, "prune_blocks", ok, "an integer >= 0")

    def assign(self, features: Features, state: TokenState, step: Step) -> Assignment:
        """ToMe's pairs, dropped or merged by MLERP."""
        pairs = super().assign(features, state, step)
        if step.block < self.prune_blocks:
            return Assignment(keep=pairs.keep)
        return replace(pairs, rule="mlerp")
