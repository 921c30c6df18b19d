"""What models of several resolutions share: the interface timm expects, written once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistoken.errors import ConfigError

Grid = tuple[int, int]


class Pyramid(nn.Module):
    """Base of models whose levels halve the map and widen it, then norm, pool and classify.

    A model names its levels by `enter`, `blocks_of`, `enter_macs` and `cut`, sets `norm` in its
    constructor and ends that with `add_head`.
    """

    output_fmt = "NCHW"
    num_classes: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    norm: nn.Module
    head: Any

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate, self.grad_checkpointing = drop_rate, False
        self.feature_info = []

    def add_head(self, num_classes: int, global_pool: str) -> None:
        """A pooled classifier on the last level's channels; then all weights start anew."""
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, self.drop_rate, input_fmt=self.output_fmt
        )
        self.apply(_init_weights)

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of levels."""

    @abstractmethod
    def enter(self, index: int, x: Tensor) -> Tensor:
        """The image, or the map of the level before, to the map that level `index` works on."""

    @abstractmethod
    def enter_macs(self, index: int, grid: Grid) -> tuple[Grid, int]:
        """Rows and columns after `enter`, and its multiply-accumulates."""

    @abstractmethod
    def blocks_of(self, index: int) -> Iterable[Any]:
        """The blocks of a level."""

    @abstractmethod
    def cut(self, count: int) -> None:
        """Keep the first `count` levels only."""

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

    def run_level(self, index: int, x: Tensor) -> Tensor:
        """`enter` and the blocks of a level."""
        x = self.enter(index, x)
        for block in self.blocks_of(index):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to the normed map of the last level, in `output_fmt`."""
        for index in range(self.depth):
            x = self.run_level(index, x)
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map in `output_fmt` to logits, or with `pre_logits` to the pooled features."""
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
        """Maps of chosen levels, as timm's feature extraction asks.

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
        axes = [self.output_fmt.index(letter) for letter in output_fmt]
        wanted, last = feature_take_indices(self.depth, indices)
        end = last + 1 if stop_early else self.depth
        maps = []
        for index in range(end):
            x = self.run_level(index, x)
            if index in wanted:
                found = self.norm(x) if norm and index == self.depth - 1 else x
                maps.append(found.permute(axes))
        if intermediates_only:
            return maps
        return (self.norm(x) if end == self.depth else x), maps

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Cut what the maps of these levels do not need; returns the levels."""
        wanted, last = feature_take_indices(self.depth, indices)
        shorter = last < self.depth - 1
        self.cut(last + 1)
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return list(wanted)

    def macs(self, image_size: int | Grid | None = None) -> int:
        """Multiply-accumulates of one image, what the papers call FLOPs; norms and biases are free.

        Args:
            image_size: side, or (height, width), in pixels; None is the published weights' size.
        """
        if image_size is None:
            config: Mapping[str, Any] = getattr(self, "default_cfg", {})
            image_size = tuple(config.get("input_size", (3, 224, 224))[1:])
        grid = (image_size,) * 2 if isinstance(image_size, int) else image_size
        total = 0
        for index in range(self.depth):
            grid, cost = self.enter_macs(index, grid)
            total += cost + sum(block.macs(grid) for block in self.blocks_of(index))
        head = self.get_classifier()
        return total + (head.weight.numel() if isinstance(head, nn.Linear) else 0)


def _init_weights(module: nn.Module) -> None:
    """Truncated normal weights of linear layers, zero biases."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def image_config(size: int, first_conv: str, **others: Any) -> dict[str, Any]:
    """What timm has to know about weights: image size, normalisation, first and last layer."""
    pool = max(size // 32, 1)
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (pool, pool),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head.fc",
        **others,
    }


Model = TypeVar("Model", bound=Pyramid)


def build_pyramid(
    cls: type[Model],
    variant: str,
    pretrained: bool,
    settings: Mapping[str, Any],
    convert: Callable[..., Any],
) -> Model:
    """A model through timm's builder; `convert` brings a checkpoint to our key layout."""
    levels = tuple(range(len(settings.get("depths", ()))))
    model: Model = build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=convert,
        feature_cfg={"out_indices": levels, "feature_cls": "getter"},
        **settings,
    )
    return model
