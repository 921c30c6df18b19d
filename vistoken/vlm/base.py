"""What a method for vision-language models is, and what it is given of one image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from vistoken.methods.base import Method, is_rate, require
from vistoken.models.llava import LanguageHost
from vistoken.vlm.choose import index_of
from vistoken.vlm.layout import Layout
from vistoken.vlm.rows import Row

Newlines = Literal["all", "rows", "drop"]
Positions = Literal["compact", "original"]
Share = Literal["raw", "unpadded", "placeholders"]


@dataclass(frozen=True)
class Image:
    """One encoded image as a method sees it, on the device.

    Attributes:
        features: what the projector and the packer made, newlines included `[V, C]`.
        layout: where the tokens come from.
        consumed: index of the tower layer whose output the projector reads.
        rows: class rows by index of the tower's layer, for the layers the method named.
        outputs: what tower layers returned, by index, class token aside `[P, N, C]`.
    """

    features: Tensor
    layout: Layout
    consumed: int = 0
    rows: Mapping[int, Row] = field(default_factory=dict)
    outputs: Mapping[int, Tensor] = field(default_factory=dict)

    def packed(self, scores: Tensor) -> Tensor:
        """Scores of raw tokens `[P, N]` in packed order `[V]`, -inf at newlines."""
        source = self.layout.source
        assert source is not None
        found = scores.flatten()[source.clamp(min=0)]
        return found.masked_fill(source < 0, float("-inf"))


@dataclass(frozen=True)
class Reduced:
    """What is left of one image.

    Attributes:
        features: `[K, C]`.
        index: rising places among the image's V tokens that these features take `[K]` int64.
        fixed: True at tokens that no later stage may drop `[K]`, or None.
        fixes: how many these are.
    """

    features: Tensor
    index: Tensor
    fixed: Tensor | None = None
    fixes: int = 0


@dataclass(frozen=True)
class LanguageMethod:
    """Base of methods for vision-language models: frozen settings, checked when created."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    guarantees: ClassVar[str] = ""
    reads: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for settings that are wrong whatever the model."""

    def to_string(self) -> str:
        """The command-line form, as `vistoken.parse` reads it."""
        return Method.to_string(self)  # type: ignore[arg-type]

    @property
    def idle(self) -> bool:
        """Whether these settings keep everything: then nothing is installed on the model."""
        raise NotImplementedError

    def attach_to(self, model: Any) -> Any:
        """Attach this method to a model; `vistoken.wrap` calls it."""
        from vistoken.vlm.attach import attach

        return attach(model, self)


@dataclass(frozen=True)
class ImageMethod(LanguageMethod):
    """A method that cuts image tokens before the language model.

    Args:
        budget: share of tokens to keep, in (0, 1]; 1 leaves the model exactly as it is.
        newlines: which row ends of a mosaic stay: `all`, those of `rows` with a survivor (their
            number then depends on the picture), or `drop`. They never count against the budget.
        positions: `compact` numbers the short prompt anew, `original` keeps every token's place.
            Models with three-axis rotary positions always keep them.
    """

    budget_of: ClassVar[Share] = "unpadded"

    budget: float = 0.2
    newlines: Newlines = field(default="all", kw_only=True)
    positions: Positions = field(default="compact", kw_only=True)

    def __post_init__(self) -> None:
        require(self, "budget", is_rate(self.budget), "a number in (0, 1]")
        require(self, "newlines", self.newlines in get_args(Newlines), f"{get_args(Newlines)}")
        require(self, "positions", self.positions in get_args(Positions), f"{get_args(Positions)}")
        self.check()

    @property
    def idle(self) -> bool:
        return self.budget == 1

    def layers(self, host: LanguageHost) -> tuple[int, ...]:
        """Tower layers whose class rows are read; empty for methods without."""
        return ()

    def watched(self, host: LanguageHost) -> tuple[int, ...]:
        """Tower layers whose output is read; empty for methods without."""
        return ()

    def fitted(self, host: LanguageHost) -> ImageMethod:
        """The same settings with what depends on the model filled in."""
        return self

    def check_host(self, host: LanguageHost) -> None:
        """Raise `UnsupportedMethodError` where the method cannot work on this model."""

    def count(self, layout: Layout) -> int:
        """Image tokens kept of one image, newlines aside; known before the model runs."""
        base = {
            "raw": layout.raw,
            "unpadded": layout.candidates,
            "placeholders": layout.tokens,
        }[self.budget_of]
        return max(1, min(int(self.budget * base + 1e-9), layout.candidates))

    def kept(self, layout: Layout) -> int | None:
        """Tokens left of one image, newlines included; None if that depends on the picture."""
        if self.newlines == "rows" and layout.newlines:
            return None
        return self.count(layout) + (layout.newlines if self.newlines == "all" else 0)

    def select(self, image: Image) -> Tensor:
        """True at the tokens to keep `[V]`, `count(layout)` of them, no newline."""
        raise NotImplementedError

    @torch.no_grad()
    def places(self, image: Image) -> Tensor:
        """Rising places that stay `[K]`, newlines included."""
        chosen = self.select(image)
        if image.layout.newlines and self.newlines != "drop":
            chosen = chosen | row_ends(image.layout, chosen, self.newlines)
        return index_of(chosen, self.kept(image.layout))

    def reduce(self, image: Image) -> Reduced:
        """What stays of one image."""
        index = self.places(image)
        return Reduced(image.features[index], index)


def row_ends(layout: Layout, chosen: Tensor, policy: Newlines) -> Tensor:
    """True at the newlines that stay `[V]`."""
    newline = layout.newline
    if policy == "all" or layout.mosaic == (0, 0):
        return newline
    rows, columns = layout.mosaic
    alive = chosen[layout.sizes[0] :].view(rows, columns + 1).any(1)
    kept = torch.zeros_like(newline)
    kept[layout.sizes[0] :].view(rows, columns + 1)[:, -1] = alive
    return kept
