"""Neighborhood attention as layers (Hassani et al., CVPR 2023; dilation arXiv 2209.15001).

Names and order of the arguments are those of NATTEN's modules, with relative position bias, which
the published NAT and DiNAT models need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vistoken.errors import ConfigError
from vistoken.kernels.neighborhood import na1d, na2d, na3d
from vistoken.kernels.neighborhood_windows import check_axes, per_axis

PerAxis = int | Sequence[int]


class _NeighborhoodAttention(nn.Module):
    """Projections around neighborhood attention on a grid of `rank` axes."""

    rank: ClassVar[int]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = False,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ConfigError(
                f"embed_dim={embed_dim}, num_heads={num_heads}: the width must be a multiple of "
                "the number of heads"
            )
        if attn_drop:
            raise ConfigError(
                f"attn_drop={attn_drop}: must be 0, the attention weights are never stored"
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.kernel_size = per_axis("kernel_size", kernel_size, self.rank, int)
        self.stride = per_axis("stride", stride, self.rank, int)
        self.dilation = per_axis("dilation", dilation, self.rank, int)
        self.is_causal = per_axis("is_causal", is_causal, self.rank, bool)
        check_axes(self.spans, self.kernel_size, self.stride, self.dilation)
        if rel_pos_bias and any(self.is_causal):
            raise ConfigError("rel_pos_bias=True: must be False with is_causal")
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            offsets = (2 * w - 1 for w in self.kernel_size)
            self.rpb = nn.Parameter(self.qkv.weight.new_empty(num_heads, *offsets))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def spans(self) -> tuple[int, ...]:
        """Cells from the first to behind the last key of a window, with the gaps of dilation."""
        return tuple(w * d for w, d in zip(self.kernel_size, self.dilation, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens on their grid `[B, *grid, C]` to the same shape.

        An axis shorter than `kernel_size * dilation` is zero-padded at its end before the
        projection, as in the published NAT and DiNAT models: padded cells are keys like any other
        and carry the projection's bias.

        Raises:
            ConfigError: x has another rank or width.
        """
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            raise ConfigError(
                f"x of shape {list(x.shape)}: must be [B, {'*' * self.rank}grid, "
                f"{self.embed_dim}] with {self.rank} grid axes"
            )
        grid = x.shape[1:-1]
        missing = [max(0, span - length) for span, length in zip(self.spans, grid, strict=True)]
        padded = any(missing)
        if padded:
            x = F.pad(x, (0, 0, *(size for axis in reversed(missing) for size in (0, axis))))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = self.attend(q, k, v).flatten(-2)
        if padded:
            for axis, length in enumerate(grid):
                out = out.narrow(axis + 1, 0, length)
        result: Tensor = self.proj_drop(self.proj(out))
        return result

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q, k, v `[B, *grid, H, D]`."""
        options: dict[str, Any] = {
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "rpb": self.rpb,
        }
        op: Any = (na1d, na2d, na3d)[self.rank - 1]
        out: Tensor = op(q, k, v, self.kernel_size, **options)
        return out

    def extra_repr(self) -> str:
        parts = [f"kernel_size={self.kernel_size}"]
        for name, default in (("stride", 1), ("dilation", 1), ("is_causal", False)):
            value = getattr(self, name)
            if value != (default,) * self.rank:
                parts.append(f"{name}={value}")
        return ", ".join([*parts, f"rel_pos_bias={self.rpb is not None}"])


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood attention on sequences `[B, L, C]`.

    Args:
        embed_dim: channels C.
        num_heads: heads H; must divide C.
        kernel_size: keys per query, one number or one per axis.
        stride: queries that share one window; 1 gives every query its own.
        dilation: cells from one key to the next.
        is_causal: whether a query sees only itself and what comes before it.
        qkv_bias: bias of the joint projection to queries, keys and values.
        qk_scale: factor on the scores; None is `head_dim ** -0.5`.
        proj_drop: dropout after the output projection.
        rel_pos_bias: learn a bias per head and relative position, `rpb [H, 2 * kernel_size - 1]`.
        attn_drop: accepted for older code, must be 0.

    Raises:
        ConfigError: settings that contradict each other.
    """

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood attention on maps `[B, X, Y, C]`; arguments as in `NeighborhoodAttention1D`."""

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Neighborhood attention on volumes `[B, X, Y, Z, C]`; see `NeighborhoodAttention1D`."""

    rank = 3
