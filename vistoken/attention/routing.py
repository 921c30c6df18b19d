"""Bi-level routing attention as a layer (BiFormer, Zhu et al., CVPR 2023, arXiv 2303.08810)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vistoken.errors import ConfigError
from vistoken.kernels.routing import routed_attention
from vistoken.kernels.routing_regions import Sides, route

PADS = ("mask", "attend", "zeros")


class BiLevelRoutingAttention(nn.Module):
    """Every region of a map attends the tokens of the regions whose mean key fits its mean query.

    A depthwise convolution of the values (LEPE) is added to the output before its projection.

    Args:
        dim: channels C.
        num_heads: heads H; must divide C. All heads share the lists of regions.
        n_win: regions per side.
        topk: regions that a region attends; all of them where there are fewer.
        qk_scale: factor on the scores; None is `dim ** -0.5`, as in the published models.
        qkv_bias: bias of the joint projection to queries, keys and values.
        side_dwconv: side of the convolution, odd; 0 has none.
        pad_keys: what ragged regions attend where `n_win` does not divide a side of the map.
            `mask`: nothing. `attend`: the map is zero-padded before the projection, as in the
            published models; padded cells carry the projection's bias, count in the means and are
            keys like any other. `zeros`: regions are `side // n_win` long, more than `n_win` if
            need be, and filled up with zero keys and values, as in the published `nchw` model.

    Raises:
        ConfigError: settings that contradict each other.
    """

    lepe: nn.Conv2d | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        qk_scale: float | None = None,
        qkv_bias: bool = True,
        side_dwconv: int = 5,
        pad_keys: str = "mask",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(
                f"dim={dim}, num_heads={num_heads}: the width must be a multiple of the heads"
            )
        for name, value in (("n_win", n_win), ("topk", topk)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: must be a whole number, 1 or larger")
        if side_dwconv < 0 or (side_dwconv and side_dwconv % 2 == 0):
            raise ConfigError(f"side_dwconv={side_dwconv}: must be odd, or 0 for none")
        if pad_keys not in PADS:
            raise ConfigError(f"pad_keys={pad_keys!r}: must be one of {PADS}")
        self.dim, self.num_heads, self.n_win, self.topk = dim, num_heads, n_win, topk
        self.scale = dim**-0.5 if qk_scale is None else qk_scale
        self.pad_keys = pad_keys
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.lepe = None
        if side_dwconv:
            self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim)

    def region_size(self, grid: Sides) -> Sides:
        """Rows and columns of a region on a map of (rows, columns)."""
        if self.pad_keys == "zeros":
            return max(1, grid[0] // self.n_win), max(1, grid[1] // self.n_win)
        return -(-grid[0] // self.n_win), -(-grid[1] // self.n_win)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, X, Y, C]` to the same shape.

        Raises:
            ConfigError: x has another rank or width.
        """
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ConfigError(f"x of shape {list(x.shape)}: must be [B, X, Y, {self.dim}]")
        rows, columns = x.shape[1:3]
        size = self.region_size((rows, columns))
        if self.pad_keys == "attend":
            bottom, right = size[0] * self.n_win - rows, size[1] * self.n_win - columns
            if bottom or right:
                x = F.pad(x, (0, 0, 0, right, 0, bottom))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        index = route(q, k, size, self.topk)
        pads = "attend" if self.pad_keys == "zeros" else "mask"
        out: Any = routed_attention(q, k, v, index, size, self.scale, pads, distinct=True)
        out = out.flatten(-2)
        if self.lepe is not None:
            out = out + self.lepe(v.flatten(-2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        result: Tensor = self.proj(out[:, :rows, :columns])
        return result

    def macs(self, grid: Sides) -> int:
        """Multiply-accumulates on a map of (rows, columns), region scores included."""
        size = self.region_size(grid)
        regions = -(-grid[0] // size[0]) * -(-grid[1] // size[1])
        cells = grid[0] * grid[1]
        if self.pad_keys == "attend":
            regions = self.n_win**2
            cells = regions * size[0] * size[1]
        keys = min(self.topk, regions) * size[0] * size[1]
        linear = self.qkv.weight.numel() + (0 if self.lepe is None else self.lepe.weight.numel())
        total = cells * (linear + 2 * keys * self.dim) + regions**2 * self.dim
        return total + grid[0] * grid[1] * self.proj.weight.numel()

    def extra_repr(self) -> str:
        return f"n_win={self.n_win}, topk={self.topk}, pad_keys={self.pad_keys!r}"
