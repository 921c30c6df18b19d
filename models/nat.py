"""Neighborhood Attention Transformer (NAT), Hassani et al., CVPR 2023, arXiv 2204.07143.

Importing this file registers the models with timm: `timm.create_model("nat_tiny")`.
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
from vistoken.models.nat_parts import Block, ConvMerge, ConvStem, PatchMerge, PatchStem
from vistoken.models.nat_weights import convert

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


class NAT(nn.Module):
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
        super().__init__()
        dilations = [[1] * depth for depth in depths] if dilations is None else dilations
        check(embed_dim, depths, dilations, stem, patch_size, merge)
        self.num_classes, self.drop_rate, self.grad_checkpointing = num_classes, drop_rate, False
        self.patch_embed = (
            ConvStem(in_chans, embed_dim)
            if stem == "conv"
            else PatchStem(in_chans, embed_dim, patch_size)
        )
        self.feature_info: list[dict[str, Any]] = []
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
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, input_fmt=self.output_fmt
        )
        self.apply(_init_weights)

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

    def run_level(self, level: Level, x: Tensor) -> Tensor:
        """The blocks of a level, without its downsampler."""
        for block in level.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to the normed map `[B, h, w, C]` of the last level."""
        x = self.patch_embed(x)
        for level in self.levels:
            x = level.downsample(self.run_level(level, x))
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map `[B, h, w, C]` to logits, or with `pre_logits` to the pooled features."""
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
        """Maps of chosen levels before their downsampler, as timm's feature extraction asks.

        Args:
            x: images `[B, 3, H, W]`.
            indices: levels; an integer is the last so many, None is all.
            norm: apply the final norm to the last level's map.
            stop_early: do not run the levels behind the last one asked for.
            output_fmt: `NCHW` or `NHWC`.
            intermediates_only: leave out the final features.

        Returns:
            A list of maps, or a pair of the final features and that list.

        Raises:
            ConfigError: an unknown `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ConfigError(f"output_fmt={output_fmt!r}: must be 'NCHW' or 'NHWC'")
        wanted, last = feature_take_indices(len(self.levels), indices)
        end = last + 1 if stop_early else len(self.levels)
        maps = []
        x = self.patch_embed(x)
        for index, level in enumerate(self.levels[:end]):
            x = self.run_level(level, x)
            if index in wanted:
                found = self.norm(x) if norm and index == len(self.levels) - 1 else x
                maps.append(found.permute(0, 3, 1, 2) if output_fmt == "NCHW" else found)
            if index < end - 1:
                x = level.downsample(x)
        if intermediates_only:
            return maps
        return (self.norm(x) if end == len(self.levels) else x), maps

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Cut what the maps of these levels do not need; returns the levels."""
        wanted, last = feature_take_indices(len(self.levels), indices)
        cut = last < len(self.levels) - 1
        self.levels = self.levels[: last + 1]
        self.levels[-1].downsample = nn.Identity()
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
        """Load weights in our key layout or a published one (see `vistoken.models.nat_weights`)."""
        return super().load_state_dict(convert(state_dict, self), strict, assign)

    def macs(self, image_size: int | tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one image, what the papers call FLOPs; norms and biases are free.

        Args:
            image_size: side, or (height, width), in pixels; None is the published weights' size.
        """
        if image_size is None:
            config: Mapping[str, Any] = getattr(self, "default_cfg", {})
            image_size = tuple(config.get("input_size", (3, 224, 224))[1:])
        grid = (image_size,) * 2 if isinstance(image_size, int) else image_size
        total = 0
        stem = self.patch_embed.proj
        for conv in stem if isinstance(stem, nn.Sequential) else [stem]:
            assert isinstance(conv, nn.Conv2d)
            grid = (-(-grid[0] // conv.stride[0]), -(-grid[1] // conv.stride[1]))
            total += grid[0] * grid[1] * conv.weight.numel()
        for level in self.levels:
            total += sum(block.macs(grid) for block in level.blocks)
            if not isinstance(level.downsample, nn.Identity):
                grid = (-(-grid[0] // 2), -(-grid[1] // 2))
                total += grid[0] * grid[1] * level.downsample.reduction.weight.numel()
        head = self.get_classifier()
        return total + (head.weight.numel() if isinstance(head, nn.Linear) else 0)


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


def _init_weights(module: nn.Module) -> None:
    """Truncated normal weights of linear layers, zero biases."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def published(file: str, hub: str = "", size: int = 224, **others: Any) -> dict[str, Any]:
    """What timm has to know about a published file: addresses, image size, normalisation."""
    pool = max(size // 32, 1)
    return {
        "url": f"https://shi-labs.com/projects/{file}",
        "hf_hub_id": f"shi-labs/{hub}" if hub else None,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (pool, pool),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head.fc",
        **others,
    }


def build(variant: str, pretrained: bool, settings: Mapping[str, Any], given: Any) -> NAT:
    """A model through timm's builder, with the caller's settings over the variant's own."""
    settings = {**settings, **given}
    depths = settings.get("depths", ())
    features = {"out_indices": tuple(range(len(depths))), "feature_cls": "getter"}
    model: NAT = build_model_with_cfg(
        NAT, variant, pretrained, pretrained_filter_fn=convert, feature_cfg=features, **settings
    )
    return model


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
