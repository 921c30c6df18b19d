"""Seeing image tokens: which ones of a picture a vision-language model keeps, crop by crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vistoken.api import KEY, unwrap, wrap
from vistoken.errors import ConfigError, NotWrappedError
from vistoken.models.llava import LanguageHost, find_language
from vistoken.view.picture import Panel, Pixels
from vistoken.view.sheet import Cell, compose
from vistoken.vlm.attach import LanguageAttachment
from vistoken.vlm.base import LanguageMethod
from vistoken.vlm.flow import Flow
from vistoken.vlm.layout import Layout, layout_of
from vistoken.vlm.prompt import encode_images

PANEL_SIDE = 640
"""Longer side of one panel in pixels."""

STAGES = 4
"""Most stages of one method that are shown."""

LEGEND = (
    "kept tokens as they are   ·   dropped tokens dark and hatched   ·   "
    "a token that stands for merged ones is drawn at its own place"
)


@dataclass(frozen=True)
class Kept:
    """What one method, or one stage of it, keeps of a prompt's images.

    Attributes:
        label: the method in command-line form, and the layer from which on this holds.
        places: rising places that stay among the tokens of every image, newlines included.
    """

    label: str
    places: tuple[Tensor, ...]


@dataclass(frozen=True)
class Map:
    """One map of an image's tokens: a whole image, a thumbnail, or the mosaic of its crops.

    Attributes:
        name: what it is, in words.
        pixels: what the model sees there `[H, W, 3]`.
        places: the token of every cell among the image's tokens `[rows, columns]`.
    """

    name: str
    pixels: Pixels
    places: Tensor

    def cell(self, kept: Tensor, size: tuple[int, int]) -> Cell:
        """The map with dropped tokens dark, `size` (width, height) pixels large."""
        from PIL import Image

        stays = torch.isin(self.places, kept.cpu())
        groups = torch.where(stays, self.places, -1).numpy()
        pixels = np.asarray(Image.fromarray(self.pixels).resize(size, Image.Resampling.BICUBIC))
        note = f"{self.name}: {int(stays.sum())} of {stays.numel()} tokens"
        return Cell(Panel(pixels, groups).draw(1), "", note)


@torch.inference_mode()
def kept_tokens(model: nn.Module, inputs: dict[str, Any]) -> list[Kept]:
    """What a wrapped model keeps of one prompt.

    Args:
        model: a wrapped vision-language model.
        inputs: of its processor, one row.

    Raises:
        NotWrappedError: the model carries no method of this kind.
        ConfigError: more than one row.
    """
    attachment = model.__dict__.get(KEY)
    if not isinstance(attachment, LanguageAttachment):
        raise NotWrappedError("the model carries no method for vision-language models; wrap it")
    if inputs["input_ids"].shape[0] != 1:
        raise ConfigError(f"input_ids of {inputs['input_ids'].shape[0]} rows: must be one row")
    host, label = attachment.host, attachment.method.to_string()
    images = encode_images(host, inputs, attachment.reduces)
    before = [reduced.index.cpu() for _, reduced in images]
    found = [Kept(label, tuple(before))]
    decoder = attachment.decoder
    if decoder is None or not attachment.handles:
        return found
    flows: list[Flow] = []
    grab = host.decoder[-1].register_forward_hook(
        lambda *_: flows.append(decoder.flow) if decoder.flow is not None else None
    )
    try:
        model(**inputs, use_cache=False)
    finally:
        grab.remove()
    later = [
        Kept(f"{label}, from layer {layer}", places)
        for layer, places in _after_stages(flows[0], before)
    ]
    return (found if attachment.reduces else []) + later


def _after_stages(flow: Flow, before: list[Tensor]) -> list[tuple[int, tuple[Tensor, ...]]]:
    """Places left of every image after every stage, by layer."""
    assert flow.started is not None
    spots = flow.started[0].cpu().nonzero().flatten()
    owner = torch.cat([torch.full_like(one, number) for number, one in enumerate(before)])
    places, left, found = torch.cat(before), torch.arange(flow.started.shape[1]), []
    for layer, order in sorted(flow.orders.items()):
        left = left[order[0].cpu()]
        stays = torch.isin(spots, left)
        mine = tuple(places[stays & (owner == number)] for number in range(len(before)))
        found.append((layer, mine))
    return found


def maps_of(
    host: LanguageHost, inputs: dict[str, Any], tokens: Sequence[int], picture: Any, shown: Any
) -> list[list[Map]]:
    """The maps of every image, with what the model sees there.

    Args:
        host: the model.
        inputs: of its processor, one row.
        tokens: image tokens of every image.
        picture: the PIL image, for models whose input is no picture any more.
        shown: from normalised pixels `[3, h, w]` to `[h, w, 3]` uint8.
    """
    sizes, pixels = inputs.get("image_sizes"), inputs["pixel_values"]
    whole: Pixels = np.asarray(picture.convert("RGB"))
    found = []
    for number, count in enumerate(tokens):
        size = None if sizes is None else (int(sizes[number][0]), int(sizes[number][1]))
        layout = layout_of(host, count, size, whole=False)
        side = layout.side
        if host.spec.rotary_3d:
            _, high, wide = inputs["image_grid_thw"][number].tolist()
            merge = host.base.config.vision_config.spatial_merge_size  # type: ignore[union-attr]
            side = high // merge, wide // merge
        places = torch.arange(side[0] * side[1]).view(side)
        if pixels.dim() == 4:
            seen, name = shown(pixels[number]), f"image {number}" if len(tokens) > 1 else "image"
            found.append([Map(name, seen, places)])
        elif pixels.dim() == 5 and layout.mosaic != (0, 0):
            crops = whole if layout.source is None else _canvas(layout, pixels[number], shown)
            rows, columns = layout.mosaic
            cells = torch.arange(rows * (columns + 1)).view(rows, -1)[:, :-1] + layout.sizes[0]
            name = f"{layout.grid[0]} x {layout.grid[1]} crops"
            thumb = Map("thumbnail", shown(pixels[number, 0]), places)
            found.append([thumb, Map(name, crops, cells)])
        else:
            found.append([Map("image", whole, places)])
    return found


def _canvas(layout: Layout, pixels: Tensor, shown: Any) -> Pixels:
    """The crops side by side, padding cut off."""
    (high, wide), patch = layout.grid, pixels.shape[-1] // layout.side[1]
    tiles = [shown(tile) for tile in pixels[1 : 1 + high * wide]]
    rows = [np.concatenate(tiles[r * wide : (r + 1) * wide], 1) for r in range(high)]
    (top, left), (down, right) = layout.origin, layout.mosaic
    box = (slice(top * patch, (top + down) * patch), slice(left * patch, (left + right) * patch))
    canvas: Pixels = np.concatenate(rows, 0)[box]
    return canvas


def draw_images(
    model: nn.Module,
    inputs: dict[str, Any],
    picture: Any,
    methods: Sequence[LanguageMethod | str],
    path: str | Path = "tokens.png",
    *,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
) -> Path:
    """Draw what methods keep of a picture as a PNG: one row per method, or stage of one.

    A thumbnail and a mosaic of crops are drawn side by side, each in the picture's proportions.

    Args:
        model: a vision-language model of transformers without a method.
        inputs: of its processor, one row with one picture.
        picture: the PIL image.
        methods: settings.
        path: PNG to write.
        mean: mean that was subtracted from the pixels, to show their colours.
        std: deviation that they were divided by.
        title: above the picture.

    Returns:
        The path.

    Raises:
        VistokenError: what `wrap` and `kept_tokens` raise.
    """
    from vistoken.view.tokens import to_pixels

    host = find_language(model)
    with torch.inference_mode():
        tokens = [whole for whole, _ in encode_images(host, inputs, False)]
    maps = maps_of(host, inputs, tokens, picture, lambda tile: to_pixels(tile, mean, std))
    flat = [one for image in maps for one in image]
    size = _size(picture.size if len(maps) == 1 and len(flat) > 1 else flat[0].pixels.shape[1::-1])
    rows = []
    for method in methods:
        wrap(model, method)
        try:
            stages = kept_tokens(model, inputs)
        finally:
            unwrap(model)
        for stage in _spread(stages):
            kept = sum(len(places) for places in stage.places)
            label = f"{stage.label}: image tokens {sum(tokens)} -> {kept}"
            pairs = zip(stage.places, maps, strict=True)
            cells = [one.cell(places, size) for places, image in pairs for one in image]
            cells[0] = Cell(cells[0].pixels, label, cells[0].detail)
            rows.append(cells)
    path = Path(path)
    compose(rows, title, LEGEND).save(path)
    return path


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Width and height of a panel in the proportions of a picture."""
    scale = PANEL_SIDE / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _spread(stages: list[Kept]) -> list[Kept]:
    """At most `STAGES` of them, the first and the last included."""
    if len(stages) <= STAGES:
        return stages
    return [stages[number * (len(stages) - 1) // (STAGES - 1)] for number in range(STAGES)]
