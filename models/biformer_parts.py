"""The parts of BiFormer: stems, downsamplers, dense attention and the block."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from vistoken.attention import BiLevelRoutingAttention

DENSE_HEADS = 8
"""Heads of the dense attention of the last stage, whatever its width."""


class DenseAttention(nn.Module):
    """Attention of all cells of a map, plus a depthwise convolution (LEPE), `[B, X, Y, C]`.

    Args:
        dim: channels C, a multiple of 8.
        side_dwconv: side of the convolution.
        of_values: whether the convolution is of the values, as in the `nchw` model, or of the
            input, as in all others.
    """

    def __init__(self, dim: int, side_dwconv: int, of_values: bool) -> None:
        super().__init__()
        self.of_values = of_values
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map to map."""
        q, k, v = self.qkv(x).chunk(3, -1)
        near = self.lepe((v if self.of_values else x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        rows = (t.flatten(1, 2).unflatten(-1, (DENSE_HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*rows)
        out = out.transpose(1, 2).flatten(2).unflatten(1, tuple(x.shape[1:3]))
        result: Tensor = self.proj(out + near)
        return result

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates on a map of (rows, columns)."""
        cells = grid[0] * grid[1]
        weights = sum(layer.weight.numel() for layer in (self.qkv, self.proj, self.lepe))
        return cells * (weights + 2 * cells * self.proj.in_features)


class Block(nn.Module):
    """A depthwise convolution as position encoding, then pre-norm attention and an MLP.

    Args:
        dim: channels C.
        num_heads: heads of routed attention.
        n_win: regions per side.
        topk: regions that a region attends to; None is dense attention.
        mlp_ratio: hidden width of the MLP over C.
        side_dwconv: side of the convolution beside attention.
        pos_dwconv: side of the position encoding; 0 has none.
        pad_keys: see `BiLevelRoutingAttention`.
        drop_path: chance that a branch is dropped for an image.
    """

    pos_embed: nn.Conv2d | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int,
        topk: int | None,
        mlp_ratio: float,
        side_dwconv: int,
        pos_dwconv: int,
        pad_keys: str,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pos_embed = None
        if pos_dwconv:
            self.pos_embed = nn.Conv2d(dim, dim, pos_dwconv, padding=pos_dwconv // 2, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn: DenseAttention | BiLevelRoutingAttention = (
            DenseAttention(dim, side_dwconv, of_values=pad_keys == "zeros")
            if topk is None
            else BiLevelRoutingAttention(
                dim, num_heads, n_win, topk, side_dwconv=side_dwconv, pad_keys=pad_keys
            )
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, X, Y]` to the same shape."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates on a map of (rows, columns)."""
        per_cell = self.mlp.fc1.weight.numel() + self.mlp.fc2.weight.numel()
        if self.pos_embed is not None:
            per_cell += self.pos_embed.weight.numel()
        return int(grid[0] * grid[1] * per_cell + self.attn.macs(grid))


def conv_stem(in_chans: int, dim: int) -> nn.Sequential:
    """Two overlapping convolutions of stride 2, each with a norm: image to a map / 4."""
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        nn.BatchNorm2d(dim),
    )


def conv_merge(dim: int, out: int) -> nn.Sequential:
    """Half the sides by an overlapping convolution, then a norm."""
    return nn.Sequential(nn.Conv2d(dim, out, 3, stride=2, padding=1), nn.BatchNorm2d(out))


def patch_stem(in_chans: int, dim: int) -> nn.Sequential:
    """Patches of 4 x 4 pixels, then a norm."""
    return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), nn.BatchNorm2d(dim))


def patch_merge(dim: int, out: int) -> nn.Sequential:
    """A norm, then half the sides by joining 2 x 2 cells."""
    return nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, out, 2, stride=2))
