"""The cache of a shortened prompt: it counts the user's tokens and attends to its own.

`generate` asks a cache how many of the user's ids it holds. After shrinking that is more than the
columns that are stored, so the next turn would feed tokens twice. Masks ask for something else,
the offset of the next query among the stored columns. A short cache answers both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as memoize
from typing import Any

from torch import Tensor


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


class ShortCache:
    """Mixed into a transformers cache: lengths in the user's tokens, offsets in stored columns."""

    _vistoken_short: Short

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """How many of the user's tokens are cached."""
        stored = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return stored + self._vistoken_short.dropped

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """How many columns are stored: where the next query stands for masks."""
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def reset(self) -> None:
        """Empty the cache; it counts plainly again."""
        self.__class__ = type(self).__bases__[1]
        del self.__dict__["_vistoken_short"]
        self.reset()


@memoize
def _short_class(kind: type) -> type:
    """The short form of a cache class."""
    return type(f"Short{kind.__name__}", (ShortCache, kind), {})


def shorten(cache: Any, short: Short) -> None:
    """Make a cache count the user's tokens from now on."""
    cache._vistoken_short = short
    if not isinstance(cache, ShortCache):
        kind: Any = type(cache)
        cache.__class__ = _short_class(kind)


def short_of(cache: Any) -> Short | None:
    """What a cache remembers, or None for a plain one."""
    return cache._vistoken_short if isinstance(cache, ShortCache) else None


def stored(cache: Any) -> Any:
    """Columns in a cache: an int, a tensor for static caches, 0 for None."""
    return 0 if cache is None else cache.get_query_offset()
