"""Sparse attention as layers: what `nn.MultiheadAttention` is to dense attention, on a grid."""

from vistoken.attention.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from vistoken.attention.routing import BiLevelRoutingAttention

__all__ = [
    "BiLevelRoutingAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
]
