"""Linear maps of one decoding step: RMS norm before, SiLU gate or residual after, in one pass.

With a handful of rows a step is bound by reading the weights, so each weight is read once and
everything around the product rides along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 16
"""Rows up to which the kernel runs; larger products are bound by arithmetic and go to torch."""

RMS = tuple[Tensor, float]
"""Weight `[K]` and epsilon of an RMS norm."""


@dataclass(frozen=True)
class Tile:
    """How the kernel cuts a product.

    Attributes:
        rows: results per program.
        columns: columns of the weights per step.
        warps: warps per program.
        stages: steps in flight, with two rows of x or more.
        early: launch before the kernel before has ended; for kernels that all do.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 2
    early: bool = False


Product = Literal["qkv", "back", "gate", "head"]
"""The joint projection, those that add to the residual stream, the gated one, the logits."""

_SMALL, _FLAT, _TALL = Tile(4, 1024, 4), Tile(8, 512, 4), Tile(2, 2048, 4)
VECTOR: dict[Product, tuple[Tile, ...]] = {
    "qkv": (_FLAT, _SMALL, _TALL),
    "back": (_SMALL, _TALL, _FLAT),
    "gate": (_SMALL, Tile(2, 1024, 4), Tile(4, 512, 4)),
    "head": (_FLAT, _TALL, _SMALL),
}
"""For one row of x, the likeliest first."""

_NARROW, _LONG, _WIDE = Tile(32, 128, 2, 6), Tile(16, 256, 2, 4), Tile(64, 128, 4, 4)
_SQUARE = Tile(64, 64, 4, 6)
MATRIX: dict[Product, tuple[Tile, ...]] = {
    "qkv": (_WIDE, _SQUARE, _NARROW, Tile(64, 128, 4, 5)),
    "back": (_LONG, _NARROW, _WIDE, Tile(16, 512, 4, 3)),
    "gate": (Tile(32, 128, 2, 4), _SQUARE, Tile(64, 64, 4, 4), Tile(32, 128, 4, 4)),
    "head": (_WIDE, _NARROW, Tile(32, 256, 4, 4)),
}
"""For two rows of x and more."""


def tiles(rows: int, product: Product) -> tuple[Tile, ...]:
    """Tiles worth trying for this many rows of x, the likeliest first."""
    if rows > MAX_ROWS:
        return ()
    return (VECTOR if rows == 1 else MATRIX)[product]


def fits(tile: Tile, weights: Sequence[Tensor], gated: bool) -> bool:
    """Whether no tile straddles two weights, and their rows can be read as they lie."""
    whole = all(weight.is_contiguous() for weight in weights)
    return whole and (gated or all(w.shape[0] % tile.rows == 0 for w in weights[:-1]))


def decode_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    norm: RMS | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """`residual + [W0 h, W1 h, ...]` or `silu(W0 h) * (W1 h)`, where h is x or its RMS norm.

    Args:
        x: `[B, K]`, contiguous.
        weights: one to three `[N_i, K]`, contiguous; their results are concatenated.
        biases: one `[N_i]` per weight, or None.
        norm: the RMS norm of x that comes first, or None.
        residual: `[B, N]`, added to the result of a single weight, or None.
        gated: two weights of one shape are gate and value of a SiLU-gated layer.
        tile: how the Triton kernel cuts it, for at most `MAX_ROWS` rows; None is torch.

    Returns:
        `[B, sum N_i]`, or `[B, N]` if gated, in x's dtype.
    """
    if tile is not None and fits(tile, weights, gated):
        from vistoken.kernels.triton_decode_linear import decode_linear_triton

        return decode_linear_triton(x, weights, biases, norm, residual, gated, tile)
    return decode_linear_reference(x, weights, biases, norm, residual, gated)


def decode_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    norm: RMS | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`decode_linear` in torch operators."""
    h = x if norm is None else F.rms_norm(x, (x.shape[-1],), norm[0], norm[1])
    parts = [
        F.linear(h, weight, None if biases is None else biases[i])
        for i, weight in enumerate(weights)
    ]
    if gated:
        return F.silu(parts[0]) * parts[1]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if residual is None else residual + y
