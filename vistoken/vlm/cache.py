"""The cache of a shortened prompt: it counts the user's tokens and attends to its own.

`generate` asks a cache how many of the user's ids it holds. After shrinking that is more than the
columns that are stored, so the next turn would feed tokens twice. Masks ask for something else,
the offset of the next query among the stored columns. A ledger on the cache answers both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

LEDGER = "_vistoken_ledger"
"""Attribute of a cache that holds its ledger."""


@dataclass
class Short:
    """What a cache remembers of the prompts it was filled with.

    Attributes:
        length: the user's tokens of all prompts up to the last one with images, padding included.
        columns: stored columns for them.
        valid: `[B, columns]`, False at padding columns; None when there is none.
        offset: what to take from the user's next positions, `[B, 1]` or, on three-axis rotary
            positions, `[axes, B, 1]`; None is zero.
    """

    length: int
    columns: int
    valid: Tensor | None
    offset: Tensor | None

    @property
    def dropped(self) -> int:
        """Columns that the user's tokens do not have here."""
        return self.length - self.columns


@dataclass
class Ledger:
    """Answers for one cache: lengths in the user's tokens, offsets in stored columns.

    It knows the cache's layers, not the cache, so that the cache is freed as soon as it is let go.

    Attributes:
        layers: the cache's own list.
        short: what was cut; None once the cache was emptied.
    """

    layers: list[Any]
    short: Short | None

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """How many of the user's tokens are cached."""
        return self.get_query_offset(layer_idx) + (self.short.dropped if self.short else 0)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """How many columns are stored: where the next query stands for masks."""
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def reset(self) -> None:
        """Empty the cache; it counts plainly again."""
        self.short = None
        for layer in self.layers:
            layer.reset()


def shorten(cache: Any, short: Short) -> None:
    """Make a cache count the user's tokens from now on."""
    ledger = getattr(cache, LEDGER, None)
    if ledger is not None:
        ledger.short = short
        return
    ledger = Ledger(cache.layers, short)
    setattr(cache, LEDGER, ledger)
    # What an instance holds stands before what its class defines; the class stays what it is.
    for name in ("get_seq_length", "get_query_offset", "reset"):
        setattr(cache, name, getattr(ledger, name))


def short_of(cache: Any) -> Short | None:
    """What a cache remembers, or None for a plain one."""
    ledger: Ledger | None = getattr(cache, LEDGER, None)
    return None if ledger is None else ledger.short


def stored(cache: Any) -> Any:
    """Columns in a cache: an int, a tensor for static caches, 0 for None."""
    return 0 if cache is None else cache.get_query_offset()
