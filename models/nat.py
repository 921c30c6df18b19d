"""Neighborhood Attention Transformer (NAT), Hassani et al., CVPR 2023, arXiv 2204.07143.

Importing this file registers the models with timm: `timm.create_model("nat_tiny")`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vistoken.errors import ConfigError
from vistoken.models.nat_parts import Block, ConvMerge, ConvStem, PatchMerge, PatchStem
from vistoken.models.nat_weights import convert
from vistoken.models.pyramid import Grid, Pyramid, build_pyramid, image_config

STEMS, MERGES = ("conv", "patch"), ("conv", "patch")
HEAD_DIM = 32
"""Width of a head in every published model."""


class Level(nn.Module):
    """Blocks at one resolution and what halves the map after them."""

    blocks: Any

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class NAT(Pyramid):
    """NAT, DiNAT, DiNAT_s and their isotropic forms; maps are `[B, H, W, C]` inside.

    Args:
        embed_dim: channels of the first level, a multiple of 32; every level doubles them.
        depths: blocks per level.
        mlp_ratio: hidden width of the MLPs over the channels.
        kernel_size: window per axis.
        dilations: one number per block, level by level; None is 1 everywhere.
        layer_scale: initial gain of the branches; None has no gains.
        stem: `conv` halves twice by overlapping convolutions, `patch` cuts patches.
        patch_size: side of the patches; the conv stem has 4.
        merge: what halves the map between levels: an overlapping `conv`, or joining `patch`es.
        num_classes: 0 has no classifier.
        global_pool: `avg`, `max`, or empty for none.
        in_chans: channels of the image.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the projections.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Raises:
        ConfigError: settings that contradict each other.
    """

    output_fmt = "NHWC"
    levels: Any

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        layer_scale: float | None = None,
        stem: str = "conv",
        patch_size: int = 4,
        merge: str = "conv",
        num_classes: int = 1000,
        global_pool: str = "avg",
        in_chans: int = 3,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(drop_rate)
        dilations = [[1] * depth for depth in depths] if dilations is None else dilations
        check(embed_dim, depths, dilations, stem, patch_size, merge)
        self.patch_embed = (
            ConvStem(in_chans, embed_dim)
            if stem == "conv"
            else PatchStem(in_chans, embed_dim, patch_size)
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        levels = []
        for index, level in enumerate(dilations):
            dim = embed_dim * 2**index
            shape = (kernel_size, mlp_ratio, layer_scale, proj_drop_rate)
            blocks = [
                Block(dim, dim // HEAD_DIM, shape[0], dilation, *shape[1:], next(rates))
                for dilation in level
            ]
            last = index == len(depths) - 1
            shrink = ConvMerge if merge == "conv" else PatchMerge
            levels.append(Level(blocks, nn.Identity() if last else shrink(dim)))
            reduction = patch_size * 2**index
            info = {"num_chs": dim, "reduction": reduction, "module": f"levels.{index}"}
            self.feature_info.append(info)
        self.levels = nn.ModuleList(levels)
        self.norm = nn.LayerNorm(embed_dim * 2 ** (len(depths) - 1))
        self.add_head(num_classes, global_pool)

    @property
    def depth(self) -> int:
        """Number of levels."""
        return len(self.levels)

    def enter(self, index: int, x: Tensor) -> Tensor:
        """The stem, or what halves the map after the level before."""
        out: Tensor = self.levels[index - 1].downsample(x) if index else self.patch_embed(x)
        return out

    def enter_macs(self, index: int, grid: Grid) -> tuple[Grid, int]:
        """Rows and columns after `enter`, and its multiply-accumulates."""
        if index:
            grid, weights = halve(grid, 2), self.levels[index - 1].downsample.reduction.weight
            return grid, grid[0] * grid[1] * weights.numel()
        stem, total = self.patch_embed.proj, 0
        for conv in stem if isinstance(stem, nn.Sequential) else [stem]:
            assert isinstance(conv, nn.Conv2d)
            grid = halve(grid, conv.stride[0])
            total += grid[0] * grid[1] * conv.weight.numel()
        return grid, total

    def blocks_of(self, index: int) -> Iterable[Any]:
        """The blocks of a level."""
        blocks: Iterable[Any] = self.levels[index].blocks
        return blocks

    def cut(self, count: int) -> None:
        """Keep the first `count` levels only."""
        self.levels = self.levels[:count]
        self.levels[-1].downsample = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Names of the relative position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates, as timm's optimizers read them."""
        blocks: Any = r"^levels\.(\d+)"
        if not coarse:
            blocks = [
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                (r"^levels\.(\d+)\.downsample", (99998,)),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights in our key layout or a published one (see `vistoken.models.nat_weights`)."""
        return super().load_state_dict(convert(state_dict, self), strict, assign)


def halve(grid: Grid, stride: int) -> Grid:
    """Rows and columns of a zero-padded map after cutting it by a stride."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


def check(
    embed_dim: int,
    depths: Sequence[int],
    dilations: Sequence[Sequence[int]],
    stem: str,
    patch_size: int,
    merge: str,
) -> None:
    """Raise `ConfigError` for settings that contradict each other."""
    if embed_dim < HEAD_DIM or embed_dim % HEAD_DIM:
        raise ConfigError(f"embed_dim={embed_dim}: must be a multiple of {HEAD_DIM}")
    if [len(level) for level in dilations] != list(depths):
        raise ConfigError(
            f"dilations for {[len(level) for level in dilations]} blocks: must be one per block, "
            f"depths={list(depths)}"
        )
    if stem not in STEMS:
        raise ConfigError(f"stem={stem!r}: must be one of {STEMS}")
    if merge not in MERGES:
        raise ConfigError(f"merge={merge!r}: must be one of {MERGES}")
    if stem == "conv" and patch_size != 4:
        raise ConfigError(f"patch_size={patch_size}: must be 4 with stem='conv'")


def published(file: str, hub: str = "", size: int = 224, **others: Any) -> dict[str, Any]:
    """What timm has to know about a published file: addresses, image size, normalisation."""
    address = {
        "url": f"https://shi-labs.com/projects/{file}",
        "hf_hub_id": f"shi-labs/{hub}" if hub else None,
    }
    return image_config(size, **{"first_conv": "patch_embed.proj.0", **address, **others})


def build(variant: str, pretrained: bool, settings: Mapping[str, Any], given: Any) -> NAT:
    """A model with the caller's settings over the variant's own."""
    return build_pyramid(NAT, variant, pretrained, {**settings, **given}, convert)


MINI: dict[str, Any] = {
    "embed_dim": 64,
    "depths": (3, 4, 6, 5),
    "mlp_ratio": 3.0,
    "drop_path_rate": 0.2,
}
TINY: dict[str, Any] = {**MINI, "depths": (3, 4, 18, 5)}
SMALL: dict[str, Any] = {**TINY, "embed_dim": 96, "mlp_ratio": 2.0, "drop_path_rate": 0.3}
BASE: dict[str, Any] = {**SMALL, "embed_dim": 128, "drop_path_rate": 0.5, "layer_scale": 1e-5}

FILE = "nat/checkpoints/CLS/nat_{}.pth"
default_cfgs = generate_default_cfgs(
    {
        f"nat_{size}.in1k": published(FILE.format(size), f"nat-{size}-in1k-224")
        for size in ("mini", "tiny", "small", "base")
    }
)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini: 20 M parameters, 2.7 GFLOPs."""
    return build("nat_mini", pretrained, MINI, kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny: 28 M parameters, 4.3 GFLOPs."""
    return build("nat_tiny", pretrained, TINY, kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small: 51 M parameters, 7.8 GFLOPs."""
    return build("nat_small", pretrained, {**SMALL, "layer_scale": 1e-5}, kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base: 90 M parameters, 13.7 GFLOPs."""
    return build("nat_base", pretrained, BASE, kwargs)
