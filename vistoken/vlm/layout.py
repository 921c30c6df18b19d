"""Where the image tokens of one image come from: partitions, mosaic rows, newlines."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vistoken.errors import TapError
from vistoken.models.llava import LanguageHost


@dataclass(frozen=True)
class Layout:
    """The packed image tokens of one image: a plan of the host that depends on its size only.

    Partition 0 is the whole image (the thumbnail), partitions 1.. are crops in raster order.

    Attributes:
        raw: patch tokens that left the projector; padding counts, newlines do not.
        sizes: packed tokens of every partition, without newlines.
        side: (rows, columns) of one partition's grid, (0, 0) when unknown.
        grid: (rows, columns) of crops, (0, 0) without crops.
        mosaic: (rows, columns) of the crops' map after padding is cut off.
        origin: (row, column) of that map on the canvas of all crops.
        image_size: (height, width) of the image in pixels, (0, 0) when unknown.
        segment: `[V]` partition of every token, -1 for newlines.
        source: `[V]` index among the raw tokens, -1 for newlines; None where the packer
            interpolates between tokens.
    """

    raw: int
    sizes: tuple[int, ...]
    side: tuple[int, int]
    grid: tuple[int, int]
    mosaic: tuple[int, int]
    origin: tuple[int, int]
    image_size: tuple[int, int]
    segment: Tensor
    source: Tensor | None
    moved: dict[torch.device, Layout] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """V: image tokens in the prompt, newlines included."""
        return self.segment.shape[0]

    @property
    def candidates(self) -> int:
        """Tokens that can be kept: all but newlines."""
        return sum(self.sizes)

    @property
    def newlines(self) -> int:
        """Newlines among the tokens."""
        return self.tokens - self.candidates

    @property
    def newline(self) -> Tensor:
        """`[V]`, True at newlines."""
        return self.segment < 0

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on a device; copied once."""
        if self.segment.device == device:
            return self
        if device not in self.moved:
            source = None if self.source is None else self.source.to(device)
            self.moved[device] = replace(
                self, segment=self.segment.to(device), source=source, moved={}
            )
        return self.moved[device]


def plain_layout(tokens: int, side: tuple[int, int] = (0, 0)) -> Layout:
    """One partition in raster order, no newline."""
    return Layout(
        tokens, (tokens,), side, (0, 0), (0, 0), (0, 0), (0, 0),
        torch.zeros(tokens, dtype=torch.long), torch.arange(tokens),
    )  # fmt: skip


def layout_of(host: LanguageHost, tokens: int, size: tuple[int, int] | None, whole: bool) -> Layout:
    """The layout of one image.

    Args:
        host: the model.
        tokens: V as the model packed it, for a check.
        size: (height, width) in pixels where the family packs by it.
        whole: whether the image was encoded as one partition though its size asks for crops.

    Raises:
        TapError: the model packs in a way that this version does not know.
    """
    if host.spec.packing == "anyres":
        assert size is not None
        layout = _anyres(host, size, whole)
    else:
        side = int(tokens**0.5)
        square = side * side == tokens and not host.spec.rotary_3d
        layout = plain_layout(tokens, (side, side) if square else (0, 0))
    if layout.tokens != tokens:
        raise TapError(
            f"{host.spec.family} packed {tokens} image tokens where {layout.tokens} were expected "
            f"for an image of {size}"
        )
    return layout


def _anyres(host: LanguageHost, size: tuple[int, int], whole: bool) -> Layout:
    """Coordinates of every raw token, sent through the model's own packer."""
    base: Any = host.base
    vision = base.config.vision_config
    g = vision.image_size // vision.patch_size
    grid = (0, 0) if whole else _crop_grid(host, size)
    parts = 1 + grid[0] * grid[1]
    part, row, column = torch.meshgrid(
        torch.arange(parts), torch.arange(g), torch.arange(g), indexing="ij"
    )
    crop = (part - 1).clamp(min=0)
    across = max(grid[1], 1)
    rows = torch.where(part > 0, crop // across * g + row, row)
    columns = torch.where(part > 0, crop % across * g + column, column)
    ones = torch.ones_like(part)
    stack = torch.stack([ones, part > 0, rows, columns], -1)
    stack = stack.reshape(parts, g * g, 4).double()
    packed = _pack(base, stack, size)
    real = packed[:, 0] > 0.5
    inside = real & (packed[:, 1] > 0.5)
    place = packed[:, 2:]
    exact = bool((place == place.round()).all())
    row_of, column_of = place[:, 0].round().long(), place[:, 1].round().long()
    segment = torch.where(inside, 1 + row_of // g * across + column_of // g, 0)
    source = segment * g * g + row_of % g * g + column_of % g
    segment, source = segment.masked_fill(~real, -1), source.masked_fill(~real, -1)
    mosaic, origin = (0, 0), (0, 0)
    if parts > 1:
        newlines = int((~real).sum())
        mosaic = (newlines, int(inside.sum()) // newlines)
        low = place[inside].amin(0).round().long().tolist()
        origin = (low[0], low[1])
    sizes = tuple(int((segment == index).sum()) for index in range(parts))
    return Layout(
        parts * g * g, sizes, (g, g), grid, mosaic, origin, size,
        segment, source if exact else None,
    )  # fmt: skip


def _pack(base: Any, stack: Tensor, size: tuple[int, int]) -> Tensor:
    """`[P, N, D]` through `pack_image_features`, newlines zero: `[V, D]`."""
    options: dict[str, Any] = {"image_newline": torch.zeros(stack.shape[-1], dtype=stack.dtype)}
    known = inspect.signature(base.pack_image_features).parameters
    for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
        if name in known:
            options[name] = getattr(base.config, name)
    packed: Tensor = base.pack_image_features([stack], torch.tensor([size]), **options)[0][0]
    return packed


def _crop_grid(host: LanguageHost, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of crops that the model cuts an image of this size into."""
    from transformers.image_processing_utils import select_best_resolution

    config: Any = host.base.config
    side = config.vision_config.image_size
    height, width = select_best_resolution(size, config.image_grid_pinpoints)
    return height // side, width // side


def regions(layout: Layout, exact: bool = True) -> Tensor:
    """Which crop lies over each token of the first partition: `[N]`, 0.. in raster order.

    The first partition squeezes the image alone while the crops tile a padded canvas; `exact`
    follows the padding, otherwise the canvas is taken for the image.
    """
    (rows, columns), (high, wide) = layout.side, layout.grid
    top, left, inner = 0.0, 0.0, (float(high), float(wide))
    if exact:
        height, width = layout.image_size
        scale = min(high * rows / height, wide * columns / width)
        inner = (height * scale / rows, width * scale / columns)
        top, left = (high - inner[0]) / 2, (wide - inner[1]) / 2
    row = top + (torch.arange(rows, dtype=torch.float64) + 0.5) / rows * inner[0]
    column = left + (torch.arange(columns, dtype=torch.float64) + 0.5) / columns * inner[1]
    row, column = row.long().clamp(0, high - 1), column.long().clamp(0, wide - 1)
    return (row[:, None] * wide + column).flatten()
