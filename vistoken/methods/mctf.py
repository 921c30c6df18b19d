"""The score of Multi-Criteria Token Fusion (MCTF), Lee et al., CVPR 2024, arXiv 2403.10030."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vistoken.kernels.bipartite import bipartite
from vistoken.methods.base import Features, Need, require
from vistoken.methods.tome import ToMe
from vistoken.schedule import Step
from vistoken.state import Assignment, TokenState


@dataclass(frozen=True)
class MCTF(ToMe):
    """ToMe's pairing with a score that also spares informative and large tokens.

    `score = sim^(1/t1) * (1 / a_i a_j)^(1/t2) * (1 / s_i s_j)^(1/t3)` with `sim` the cosine of
    features moved to [0, 1], `a` the attention a token receives and `s` its size; tokens merge by
    the mean weighted with `a * s`. The attention is this block's, not the next block's, and tokens
    merge from even to odd positions only, where the paper goes both ways.

    Args:
        temperatures: (t1, t2, t3) of similarity, information and size.
    """

    name: ClassVar[str] = "mctf"
    paper: ClassVar[str] = "Multi-Criteria Token Fusion (score), CVPR 2024"
    guarantees: ClassVar[str] = "sizes sum to N0; attended tokens merge last"

    temperatures: Sequence[float] = (1.0, 20.0, 40.0)

    def check(self) -> None:
        """Check the three temperatures too."""
        super().check()
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        ok = len(self.temperatures) == 3 and all(0 < t < float("inf") for t in self.temperatures)
        require(self, "temperatures", ok, "three positive numbers below infinity")

    @property
    def needs(self) -> frozenset[Need]:
        """Attention received."""
        return frozenset({Need.RECEIVED, Need.STREAM})

    def assign(self, features: Features, state: TokenState, step: Step) -> Assignment:
        """Bipartite matching on the three criteria."""
        assert features.received is not None
        similar, informed, small = (1.0 / t for t in self.temperatures)
        size = state.sizes(features.x)
        attention = features.received.clamp_min(1e-12)
        # The score of a pair is one of its similarity times one of each token.
        factor = attention**-informed * size**-small
        removed = step.tokens - step.merged
        keep, src, dst = bipartite(features.x[:, None], state.prefix, removed, factor, similar)
        return Assignment(keep=keep, src=src, dst=dst, weight=attention * size)
