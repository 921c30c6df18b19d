"""Random numbers that depend on nothing but their coordinates.

Every draw is a 64-bit integer hash of (seed, index, stream, position), made with int64 tensor
arithmetic only. It is therefore the same number on any device, in any batch and in any version of
PyTorch, which no stateful generator promises.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 1 << 64


def _signed(value: int) -> int:
    """Fold an integer into the signed 64-bit range that int64 tensors wrap around in."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_A = _signed(0xBF58476D1CE4E5B9)
_MIX_B = _signed(0x94D049BB133111EB)
_SEED_STEP = 0xD1342543DE82EF95
_STREAM_STEP = 0xAF251AF3B0F025B5


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right filling with zeros; the tensor operator fills with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 values one to one (the SplitMix64 finaliser)."""
    x = (x ^ _shift(x, 30)) * _MIX_A
    x = (x ^ _shift(x, 27)) * _MIX_B
    return x ^ _shift(x, 31)


def hash_integers(seed: int, index: Tensor, stream: int, count: int) -> Tensor:
    """Draw non-negative integers below 2**62.

    Args:
        seed: Any integer; different seeds give unrelated draws.
        index: Counter of the draws `[B]`, int64.
        stream: Names an independent family of draws for the same index.
        count: Draws for each index.

    Returns:
        Draws `[B, count]`, int64, on the device of `index`.
    """
    origin = _signed(seed * _SEED_STEP + stream * _STREAM_STEP)
    key = _mix(_mix(index.to(torch.int64)) + origin)
    steps = torch.arange(1, count + 1, device=index.device, dtype=torch.int64) * _GOLDEN
    return _shift(_mix(key[:, None] + steps), 2)


def hash_uniform(seed: int, index: Tensor, stream: int, count: int) -> Tensor:
    """Draw numbers in [0, 1), multiples of 2**-24 and so exact in float32.

    Args:
        seed: Any integer; different seeds give unrelated draws.
        index: Counter of the draws `[B]`, int64.
        stream: Names an independent family of draws for the same index.
        count: Draws for each index.

    Returns:
        Draws `[B, count]`, float32, on the device of `index`.
    """
    return (hash_integers(seed, index, stream, count) >> 38).to(torch.float32) / float(1 << 24)
