"""Which keys a query attends, axis by axis: windows that shift at borders, and their inverse.

An axis of length L with dilation d falls into d groups of every d-th position. All bounds below are
half-open intervals of indices inside one group; index j of group r is position `r + d * j`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from vistoken.errors import ConfigError


@dataclass(frozen=True)
class Neighborhood:
    """Window, stride, dilation and causality of every axis; the arguments are already checked."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @property
    def plain(self) -> bool:
        """No causal axis: only then does a window as long as the grid mean full attention."""
        return not any(self.causal)

    def groups(self) -> Iterator[tuple[int, ...]]:
        """First position of every dilation group."""
        return product(*(range(d) for d in self.dilation))


def per_axis(name: str, value: Any, rank: int, kind: type) -> tuple[Any, ...]:
    """One value for every axis, from one value or a sequence of `rank`."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ConfigError(f"{name} has {len(values)} entries, but the grid has {rank} axes")
    for entry in values:
        if not isinstance(entry, kind) or (kind is int and isinstance(entry, bool)):
            raise ConfigError(f"{name} is {value!r}; every entry must be {kind.__name__}")
    return values


def check_axes(
    grid: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> None:
    """Refuse windows, strides and dilations that the grid cannot have."""
    for axis, (length, w, s, d) in enumerate(zip(grid, window, stride, dilation, strict=True)):
        if w < 1:
            raise ConfigError(f"kernel_size is {w} on axis {axis}; it must be at least 1")
        if not 1 <= s <= w:
            raise ConfigError(f"stride is {s} on axis {axis}; it must be 1 to kernel_size {w}")
        if d < 1:
            raise ConfigError(f"dilation is {d} on axis {axis}; it must be at least 1")
        if d * w > length:
            raise ConfigError(
                f"kernel_size {w} with dilation {d} spans {d * w} positions, "
                f"but axis {axis} has {length}"
            )


def group_length(length: int, dilation: int, first: int) -> int:
    """Members of the dilation group that starts at position `first`."""
    return (length - first + dilation - 1) // dilation


@lru_cache(maxsize=1024)
def window_bounds(
    length: int, window: int, stride: int, causal: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First key and end of the keys of every query of a group.

    Queries of one stride group share the window of their leader. A window that would cross a border
    is moved inwards, so without causality every query attends exactly `window` keys.
    """
    low, high = [], []
    for i in range(length):
        leader = i // stride * stride + (stride - 1 if causal else stride // 2)
        leader = min(leader, length - 1)
        if causal:
            low.append(max(leader - window + 1, 0))
            high.append(i + 1)
        else:
            low.append(min(max(leader - window // 2, 0), length - window))
            high.append(low[-1] + window)
    return tuple(low), tuple(high)


@lru_cache(maxsize=1024)
def inverse_bounds(
    length: int, window: int, stride: int, causal: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First query and end of the queries that attend every key of a group.

    Window bounds never fall from one query to the next, so these queries are an interval.
    """
    low, high = [], []
    groups = -(-length // stride)
    for j in range(length):
        if causal:
            low.append(j)
            high.append(length if j + window >= length else (j + window) // stride * stride)
            continue
        middle = j + window // 2
        first = max(j - window + 1 + window // 2 - stride // 2, 0)
        low.append(0 if j < window else stride * min(-(-first // stride), groups - 1))
        last = min(stride * ((middle - stride // 2) // stride + 1), length)
        high.append(length if j >= length - window or middle >= length - 1 else last)
    return tuple(low), tuple(high)


@lru_cache(maxsize=4096)
def spans(
    length: int, side: int, window: int, stride: int, causal: bool, inverse: bool
) -> tuple[int, ...]:
    """Side of the box that each tile of `side` rows relates to."""
    low, high = (inverse_bounds if inverse else window_bounds)(length, window, stride, causal)
    return tuple(high[min(at + side, length) - 1] - low[at] for at in range(0, length, side))
