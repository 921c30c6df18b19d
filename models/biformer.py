"""BiFormer: vision transformers with bi-level routing attention, Zhu et al., CVPR 2023.

Importing this file registers the models with timm: `timm.create_model("biformer_tiny")`. Paper:
arXiv 2303.08810.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vistoken.errors import ConfigError
from vistoken.models.biformer_parts import (
    Block,
    conv_merge,
    conv_stem,
    patch_merge,
    patch_stem,
)
from vistoken.models.biformer_weights import convert
from vistoken.models.pyramid import Grid, Pyramid, build_pyramid, image_config

STEMS = ("conv", "patch")
HEAD_DIM = 32
"""Width of a head of routed attention in every published model."""


class BiFormer(Pyramid):
    """BiFormer and BiFormer-STL; maps are `[B, C, H, W]` between the blocks.

    Args:
        embed_dims: channels of every stage, multiples of 32.
        depths: blocks per stage.
        topks: regions that a region attends to, per stage; None is dense attention.
        n_win: regions per side; the authors take 8 for segmentation and 16 for detection.
        mlp_ratio: hidden width of the MLPs over the channels.
        side_dwconv: side of the depthwise convolution beside attention, odd.
        pos_dwconv: side of the depthwise convolution before attention, odd; 0 has none.
        stem: `conv` has overlapping convolutions in the stem and between stages, `patch` joins
            cells as Swin does.
        pad_keys: what regions attend that leave the map, see
            `vistoken.attention.BiLevelRoutingAttention`; the published weights were trained with
            `attend`.
        num_classes: 0 has no classifier.
        global_pool: `avg`, `max`, or empty for none.
        in_chans: channels of the image.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Raises:
        ConfigError: settings that contradict each other.
    """

    stages: Any
    downsample_layers: Any

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        topks: Sequence[int | None] = (1, 4, 16, None),
        n_win: int = 7,
        mlp_ratio: float = 3.0,
        side_dwconv: int = 5,
        pos_dwconv: int = 3,
        stem: str = "conv",
        pad_keys: str = "attend",
        num_classes: int = 1000,
        global_pool: str = "avg",
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(drop_rate)
        check(embed_dims, depths, topks, side_dwconv, pos_dwconv, stem)
        first, merge = (conv_stem, conv_merge) if stem == "conv" else (patch_stem, patch_merge)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        shrinks, stages = [first(in_chans, embed_dims[0])], []
        for index, (dim, depth, topk) in enumerate(zip(embed_dims, depths, topks, strict=True)):
            if index:
                shrinks.append(merge(embed_dims[index - 1], dim))
            shape = (n_win, topk, mlp_ratio, side_dwconv, pos_dwconv, pad_keys)
            blocks = [Block(dim, dim // HEAD_DIM, *shape, next(rates)) for _ in range(depth)]
            stages.append(nn.Sequential(*blocks))
            info = {"num_chs": dim, "reduction": 4 * 2**index, "module": f"stages.{index}"}
            self.feature_info.append(info)
        self.downsample_layers = nn.ModuleList(shrinks)
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(embed_dims[-1])
        self.add_head(num_classes, global_pool)

    @property
    def depth(self) -> int:
        """Number of stages."""
        return len(self.stages)

    def enter(self, index: int, x: Tensor) -> Tensor:
        """The downsampler of a stage; the first is the stem."""
        out: Tensor = self.downsample_layers[index](x)
        return out

    def enter_macs(self, index: int, grid: Grid) -> tuple[Grid, int]:
        """Rows and columns after `enter`, and its multiply-accumulates."""
        total = 0
        for conv in (m for m in self.downsample_layers[index] if isinstance(m, nn.Conv2d)):
            side, step, pad = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
            rows, columns = ((n + 2 * pad - side) // step + 1 for n in grid)
            grid = rows, columns
            total += rows * columns * conv.weight.numel()
        return grid, total

    def blocks_of(self, index: int) -> Iterable[Any]:
        """The blocks of a stage."""
        blocks: Iterable[Any] = self.stages[index]
        return blocks

    def cut(self, count: int) -> None:
        """Keep the first `count` stages only."""
        self.stages = self.stages[:count]
        self.downsample_layers = self.downsample_layers[:count]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay besides norms and biases: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates, as timm's optimizers read them."""
        blocks: Any = r"^(?:stages|downsample_layers)\.(\d+)"
        if not coarse:
            blocks = [
                (r"^stages\.(\d+)\.(\d+)", None),
                (r"^downsample_layers\.(\d+)", (0,)),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^downsample_layers\.0", "blocks": blocks}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights in our key layout or a published one."""
        return super().load_state_dict(convert(state_dict), strict, assign)


def check(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    topks: Sequence[int | None],
    side_dwconv: int,
    pos_dwconv: int,
    stem: str,
) -> None:
    """Raise `ConfigError` for settings that contradict each other."""
    if any(dim < HEAD_DIM or dim % HEAD_DIM for dim in embed_dims):
        raise ConfigError(f"embed_dims={list(embed_dims)}: must be multiples of {HEAD_DIM}")
    for name, value in (("depths", depths), ("topks", topks)):
        if len(value) != len(embed_dims):
            raise ConfigError(
                f"{name}={list(value)}: must have one entry for each of embed_dims="
                f"{list(embed_dims)}"
            )
    if side_dwconv % 2 == 0 or side_dwconv < 1:
        raise ConfigError(f"side_dwconv={side_dwconv}: must be odd")
    if pos_dwconv < 0 or (pos_dwconv and pos_dwconv % 2 == 0):
        raise ConfigError(f"pos_dwconv={pos_dwconv}: must be odd, or 0 for none")
    if stem not in STEMS:
        raise ConfigError(f"stem={stem!r}: must be one of {STEMS}")


def build(variant: str, pretrained: bool, settings: Mapping[str, Any], given: Any) -> BiFormer:
    """A model with the caller's settings over the variant's own."""
    return build_pyramid(BiFormer, variant, pretrained, {**settings, **given}, convert)


TINY: dict[str, Any] = {"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 8, 2)}
SMALL: dict[str, Any] = {**TINY, "depths": (4, 4, 18, 4), "drop_path_rate": 0.15}
BASE: dict[str, Any] = {**SMALL, "embed_dims": (96, 192, 384, 768), "drop_path_rate": 0.4}
STL: dict[str, Any] = {
    "embed_dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "mlp_ratio": 4.0, "pos_dwconv": 0,
    "stem": "patch", "drop_path_rate": 0.1,
}  # fmt: skip

CONFIG = image_config(224, "downsample_layers.0.0")
"""The authors share their files by links that change, so weights are loaded from a local path."""

default_cfgs = generate_default_cfgs(
    {f"biformer_{name}": CONFIG for name in ("tiny", "small", "base", "stl", "stl_nchw")}
)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 GFLOPs."""
    return build("biformer_tiny", pretrained, TINY, kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 GFLOPs."""
    return build("biformer_small", pretrained, SMALL, kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 GFLOPs."""
    return build("biformer_base", pretrained, BASE, kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-STL, the layout of Swin-T: 28.4 M parameters, 4.6 GFLOPs."""
    return build("biformer_stl", pretrained, STL, kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-STL with the later padding rules and, in the last stage, LEPE of the values."""
    return build("biformer_stl_nchw", pretrained, {**STL, "pad_keys": "zeros"}, kwargs)
