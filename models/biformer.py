"""BiFormer: vision transformers with bi-level routing attention, Zhu et al., CVPR 2023.

Importing this file registers the models with timm: `timm.create_model("biformer_tiny")`. Paper:
arXiv 2303.08810.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistoken.errors import ConfigError
from vistoken.models.biformer_parts import (
    Block,
    conv_merge,
    conv_stem,
    patch_merge,
    patch_stem,
)
from vistoken.models.biformer_weights import convert

STEMS = ("conv", "patch")
HEAD_DIM = 32
"""Width of a head of routed attention in every published model."""


class BiFormer(nn.Module):
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
        super().__init__()
        check(embed_dims, depths, topks, side_dwconv, pos_dwconv, stem)
        self.num_classes, self.drop_rate, self.grad_checkpointing = num_classes, drop_rate, False
        first, merge = (conv_stem, conv_merge) if stem == "conv" else (patch_stem, patch_merge)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.feature_info: list[dict[str, Any]] = []
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
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.norm: nn.Module = nn.BatchNorm2d(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.apply(_init_weights)

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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier layer."""
        layer: nn.Module = self.head.fc
        return layer

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes, 0 for none, and another pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        """The downsampler and the blocks of a stage."""
        x = self.downsample_layers[index](x)
        for block in self.stages[index]:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to the normed map `[B, C, h, w]` of the last stage."""
        for index in range(len(self.stages)):
            x = self.run_stage(index, x)
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map `[B, C, h, w]` to logits, or with `pre_logits` to the pooled features."""
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to logits."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of chosen stages, as timm's feature extraction asks.

        Args:
            x: images `[B, 3, H, W]`.
            indices: stages; an integer is the last so many, None is all.
            norm: apply the final norm to the last stage's map.
            stop_early: do not run the stages behind the last one asked for.
            output_fmt: `NCHW` or `NHWC`.
            intermediates_only: leave out the final features.

        Returns:
            A list of maps, or a pair of the final features and that list.

        Raises:
            ConfigError: an unknown `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ConfigError(f"output_fmt={output_fmt!r}: must be 'NCHW' or 'NHWC'")
        wanted, last = feature_take_indices(len(self.stages), indices)
        end = last + 1 if stop_early else len(self.stages)
        maps = []
        for index in range(end):
            x = self.run_stage(index, x)
            if index in wanted:
                found = self.norm(x) if norm and index == len(self.stages) - 1 else x
                maps.append(found.permute(0, 2, 3, 1) if output_fmt == "NHWC" else found)
        if intermediates_only:
            return maps
        return (self.norm(x) if end == len(self.stages) else x), maps

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Cut what the maps of these stages do not need; returns the stages."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.downsample_layers = self.downsample_layers[: last + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return list(wanted)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights in our key layout or a published one."""
        return super().load_state_dict(convert(state_dict), strict, assign)

    def macs(self, image_size: int | tuple[int, int] = 224) -> int:
        """Multiply-accumulates of one image, what the papers call FLOPs; norms and biases are free.

        Args:
            image_size: side, or (height, width), in pixels.
        """
        grid = (image_size,) * 2 if isinstance(image_size, int) else image_size
        total = 0
        for shrink, stage in zip(self.downsample_layers, self.stages, strict=True):
            for conv in (layer for layer in shrink if isinstance(layer, nn.Conv2d)):
                side, step, pad = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
                grid = ((grid[0] + 2 * pad - side) // step + 1,
                        (grid[1] + 2 * pad - side) // step + 1)  # fmt: skip
                total += grid[0] * grid[1] * conv.weight.numel()
            total += sum(block.macs(grid) for block in stage)
        head = self.get_classifier()
        return total + (head.weight.numel() if isinstance(head, nn.Linear) else 0)


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


def _init_weights(module: nn.Module) -> None:
    """Truncated normal weights of linear layers, zero biases."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build(variant: str, pretrained: bool, settings: Mapping[str, Any], given: Any) -> BiFormer:
    """A model through timm's builder, with the caller's settings over the variant's own."""
    settings = {**settings, **given}
    stages = len(settings.get("depths", ()))
    features = {"out_indices": tuple(range(stages)), "feature_cls": "getter"}
    model: BiFormer = build_model_with_cfg(
        BiFormer,
        variant,
        pretrained,
        pretrained_filter_fn=convert,
        feature_cfg=features,
        **settings,
    )
    return model


TINY: dict[str, Any] = {"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 8, 2)}
SMALL: dict[str, Any] = {**TINY, "depths": (4, 4, 18, 4), "drop_path_rate": 0.15}
BASE: dict[str, Any] = {**SMALL, "embed_dims": (96, 192, 384, 768), "drop_path_rate": 0.4}
STL: dict[str, Any] = {
    "embed_dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "mlp_ratio": 4.0, "pos_dwconv": 0,
    "stem": "patch", "drop_path_rate": 0.1,
}  # fmt: skip

CONFIG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "downsample_layers.0.0",
    "classifier": "head.fc",
}
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
