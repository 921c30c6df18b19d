"""The parts of NAT and DiNAT: stems, downsamplers and the block, on maps `[B, H, W, C]`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from vistoken.attention import NeighborhoodAttention2D


class ConvStem(nn.Module):
    """Two overlapping 3 x 3 convolutions of stride 2, then a norm: `[B, 3, H, W]` to a map / 4.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the map.
    """

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Image to map."""
        out: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return out


class PatchStem(nn.Module):
    """Non-overlapping patches, then a norm; the image is zero-padded to whole patches.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the map.
        patch_size: side of a patch in pixels.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Image to map."""
        bottom, right = (-size % self.patch_size for size in x.shape[2:])
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        out: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return out


class ConvMerge(nn.Module):
    """Half the sides and twice the channels by an overlapping 3 x 3 convolution, then a norm.

    Args:
        dim: channels that come in.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map to smaller map."""
        out: Tensor = self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return out


class PatchMerge(nn.Module):
    """Half the sides and twice the channels by joining 2 x 2 cells, as Swin does.

    Cells are joined in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column); odd sides are
    zero-padded.

    Args:
        dim: channels that come in.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map to smaller map."""
        bottom, right = (size % 2 for size in x.shape[1:3])
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        cells = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h, row, w, column, C]
        out: Tensor = self.reduction(self.norm(cells.permute(0, 1, 3, 4, 2, 5).flatten(3)))
        return out


class Block(nn.Module):
    """Pre-norm neighborhood attention with relative position bias, then an MLP.

    Args:
        dim: channels C.
        num_heads: heads.
        kernel_size: window per axis.
        dilation: cells from one key to the next.
        mlp_ratio: hidden width of the MLP over C.
        layer_scale: initial gain of both branches; None has no gains.
        proj_drop: dropout after the projections.
        drop_path: chance that a branch is dropped for an image.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        mlp_ratio: float,
        layer_scale: float | None,
        proj_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2D(
            dim,
            num_heads,
            kernel_size,
            dilation=dilation,
            proj_drop=proj_drop,
            rel_pos_bias=True,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(layer_scale * torch.ones(dim))
            self.gamma2 = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map to map."""
        x = x + self.branch(self.attn(self.norm1(x)), self.gamma1)
        return x + self.branch(self.mlp(self.norm2(x)), self.gamma2)

    def branch(self, y: Tensor, gamma: Tensor | None) -> Tensor:
        """A branch's output with its gain, dropped or not."""
        out: Tensor = self.drop_path(y if gamma is None else gamma * y)
        return out

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates on a map of (rows, columns)."""
        attn, cells = self.attn, grid[0] * grid[1]
        rows, columns = (max(n, span) for n, span in zip(grid, attn.spans, strict=True))
        keys = attn.kernel_size[0] * attn.kernel_size[1]
        mlp = self.mlp.fc1.weight.numel() + self.mlp.fc2.weight.numel()
        padded = rows * columns * (attn.qkv.weight.numel() + 2 * keys * attn.embed_dim)
        return int(padded + cells * (attn.proj.weight.numel() + mlp))
