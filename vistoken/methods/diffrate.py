"""DiffRate, Chen et al., ICCV 2023, arXiv 2305.17997: learned counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, ClassVar, Self

from vistoken.errors import ConfigError, ScheduleError
from vistoken.kernels.match import best_match_at
from vistoken.kernels.ranking import rank_tokens
from vistoken.methods.base import Features, Method, Need, require
from vistoken.methods.features import MatchingFeatures, as_features
from vistoken.schedule import Schedule, Step, solve
from vistoken.shape import ModelShape
from vistoken.state import Assignment, TokenState


@dataclass(frozen=True)
class DiffRate(Method):
    """Prune the least attended patches, then merge the next least attended into the kept ones.

    Patches are sorted by the class tokens' attention. The tail is pruned; the next share merges, by
    cosine of the residual stream, into the patches that stay (plain mean). A merged token brings
    its size times that cosine; negative cosines count as 0, so that sizes never fall below 1.

    The counts come from `schedule` or from `gflops`. With `gflops` alone the published list of the
    same model and label is taken where there is one, else the family
    `patches(l) = M0 (1 - l / L)^g` solved for the cost, half of each step pruned and half merged.

    Args:
        gflops: wanted cost per image in G, a published label (2.9 for DeiT-S) or any value.
        model: a published model, for example `vit_small_deit`; `gflops` then names its list.
        schedule: a `Schedule`, the path of a file written by `Schedule.save`, or a pair of lists:
            tokens left in each block after pruning and after merging, prefix included.
        rescale: stretch counts made for another token count instead of refusing them.
        features: file of learned matching features, as `train.py` exports them; None matches the
            residual stream.
    """

    name: ClassVar[str] = "diffrate"
    paper: ClassVar[str] = "DiffRate, ICCV 2023"
    guarantees: ClassVar[str] = "order of tokens does not matter; learned counts"
    proportional_attention: ClassVar[bool] = True

    gflops: float | None = None
    model: str | None = None
    schedule: Schedule | str | Sequence[Sequence[int]] | None = None
    rescale: bool = False
    features: str | MatchingFeatures | None = None

    def check(self) -> None:
        """Check that exactly one source of counts is given."""
        given = (self.gflops is not None) + (self.schedule is not None)
        if given != 1:
            raise ConfigError(
                f"DiffRate takes its counts from gflops=... or schedule=...; {given} of them given"
            )
        if self.gflops is not None:
            require(self, "gflops", self.gflops > 0, "a cost in G, larger than 0")
        if isinstance(self.schedule, (list, tuple)):
            require(
                self, "schedule", len(self.schedule) == 2, "two lists: pruned and merged counts"
            )
            object.__setattr__(self, "schedule", tuple(tuple(part) for part in self.schedule))
        if self.model is not None:
            names = tuple(published())
            require(self, "model", self.model in names, f"one of {names}")
            require(self, "model", self.gflops is not None, "given together with gflops")
        object.__setattr__(self, "features", as_features(self.features))

    @property
    def needs(self) -> frozenset[Need]:
        """The class tokens' attention and the residual stream."""
        return frozenset({Need.CLASS_ROW, Need.STREAM})

    def counts(self, shape: ModelShape) -> Schedule:
        """The counts from whichever source was given."""
        schedule = self._counts(shape)
        if isinstance(self.features, MatchingFeatures):
            self.features.check(shape, schedule)
        return schedule

    def _counts(self, shape: ModelShape) -> Schedule:
        if self.schedule is not None:
            return self._stored(shape)
        assert self.gflops is not None
        entry = self.published_entry(shape)
        if entry is None:
            return closed_form(shape, self.gflops)
        return self._fit(shape, entry["pruned"][0], entry["pruned"], entry["merged"])

    def _stored(self, shape: ModelShape) -> Schedule:
        """The counts of `schedule`, whatever its form."""
        stored = self.schedule
        if isinstance(stored, str):
            stored = Schedule.load(stored)
        if isinstance(stored, Schedule):
            data = stored.to_dict()
            return self._fit(shape, stored.tokens, data["pruned"], data["merged"])
        assert stored is not None
        pruned, merged = stored
        start = max(pruned[0], merged[0]) if self.rescale else shape.tokens
        return self._fit(shape, start, pruned, merged)

    def published_entry(self, shape: ModelShape) -> dict[str, Any] | None:
        """The published list this configuration means for a model of this shape, or None.

        Raises:
            ScheduleError: the named model has no list with this label.
        """
        model = self.model or _same_model(shape)
        if model is None or self.gflops is None:
            return None
        lists = published()[model]["lists"]
        for label, entry in lists.items():
            if abs(float(label) - self.gflops) < 1e-6 and "pruned" in entry:
                return dict(entry)
        if self.model is not None:
            labels = [label for label, entry in lists.items() if "pruned" in entry]
            raise ScheduleError(
                f"no published list of {model} at {self.gflops} G; there are {labels}"
            )
        return None

    def _fit(
        self, shape: ModelShape, tokens: int, pruned: Sequence[int], merged: Sequence[int]
    ) -> Schedule:
        """A schedule from counts made for `tokens` tokens."""
        if len(pruned) != shape.depth:
            raise ScheduleError(f"the lists have {len(pruned)} blocks, the model {shape.depth}")
        if tokens != shape.tokens and not self.rescale:
            raise ScheduleError(
                f"the lists were made for {tokens} tokens, the model has {shape.tokens}; "
                "rescale=True stretches them"
            )

        def fit(count: int) -> int:
            patches = round((count - shape.prefix) * shape.patches / (tokens - shape.prefix))
            return shape.prefix + min(shape.patches, max(1, patches))

        if tokens != shape.tokens:
            pruned, merged = [fit(n) for n in pruned], [fit(n) for n in merged]
        return Schedule.from_lists(shape.tokens, shape.prefix, pruned, merged)

    def assign(self, features: Features, state: TokenState, step: Step) -> Assignment:
        """Sort by class attention, prune the tail, match the next to the kept patches."""
        assert features.class_row is not None
        prefix, x = state.prefix, features.x
        order = rank_tokens(features.class_row, prefix)
        keep = order[:, : step.merged]
        if step.pruned == step.merged:
            return Assignment(keep=keep)
        src = order[:, step.merged : step.pruned]
        if isinstance(self.features, MatchingFeatures):
            x = self.features.project(x, step.block)
        cosine, partner = best_match_at(x, src, keep[:, prefix:])
        return Assignment(
            keep=keep, src=src, dst=partner + prefix, gain=cosine.clamp_min(0).float()
        )

    @classmethod
    def at_gflops(cls, shape: ModelShape, gflops: float) -> Self:
        """The published list of that label, or the closed-form family where it costs less."""
        method = cls(gflops=int(gflops * 1e4) / 1e4)
        if method.cost(shape) <= gflops:
            return method
        # Some published labels are lower than their lists' true cost.
        return cls(gflops=int(gflops * 1e4) / 1e4 - 1e-4)


def closed_form(shape: ModelShape, gflops: float) -> Schedule:
    """Counts `M0 (1 - l / L)^g` for the smallest g that costs at most `gflops` G.

    Raises:
        ScheduleError: the cost is out of reach.
    """

    def build(power: float) -> Schedule:
        before, counts = shape.patches, []
        for block in range(shape.depth):
            after = max(1, round(shape.patches * (1 - block / shape.depth) ** power))
            after = min(before, after)
            counts.append((shape.prefix + before - (before - after) // 2, shape.prefix + after))
            before = after
        return Schedule(shape.tokens, shape.prefix, tuple(counts))

    return build(solve(gflops, 0.0, 60.0, lambda power: build(power).gflops(shape)))


@cache
def published() -> dict[str, Any]:
    """The published count lists by model and label.

    Facts from the authors' repository (OpenGVLab/DiffRate). Labels are the authors'; `computed` is
    the closed-form cost. Five labels are off: `vit_tiny_deit` 0.6, 0.7 and 0.8, `vit_small_deit`
    2.3 and `vit_huge_mae` 93.2.
    """
    text = resources.files("vistoken.configs").joinpath("schedules/diffrate.json").read_text()
    return dict(json.loads(text))


def _same_model(shape: ModelShape) -> str | None:
    """The published model with this width, depth, grid and pooling."""
    for name, entry in published().items():
        if "width" not in entry:
            continue
        same = (entry["width"], entry["depth"], tuple(entry["grid"]), entry["pool"])
        if same == (shape.width, shape.depth, shape.grid, shape.pool) and shape.prefix == 1:
            return name
    return None
