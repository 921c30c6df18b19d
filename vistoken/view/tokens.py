"""Seeing tokens: which patches are kept, merged and pruned after chosen blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vistoken.api import flops, info, shape_of, trace, unwrap, wrap
from vistoken.errors import ConfigError
from vistoken.flops import count_macs
from vistoken.methods import Method
from vistoken.tracing import BlockTrace
from vistoken.view.picture import Panel, Pixels
from vistoken.view.sheet import Cell, compose

PANEL_SIDE = 400
"""Wanted side of one panel in pixels; the image is enlarged by the nearest whole factor."""


@dataclass(frozen=True)
class View:
    """One method's panels.

    Attributes:
        label: the method, in the caller's words or in command-line form.
        gflops: cost of one image in G multiply-accumulates.
        dense_gflops: cost of the dense model.
        blocks: the traced blocks that are shown.
        panels: one panel per shown block.
    """

    label: str
    gflops: float
    dense_gflops: float
    blocks: tuple[BlockTrace, ...]
    panels: tuple[Panel, ...]


def look(
    model: nn.Module,
    image: Tensor,
    blocks: Sequence[int] | None = None,
    *,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> View:
    """Run a wrapped model on one image and say what became of every patch.

    Args:
        model: a wrapped model.
        image: `[3, H, W]`, as the model takes it.
        blocks: blocks to show, 0 is the first; None is a quarter, half, three quarters, the last.
        mean: mean that was subtracted from the image, to show its colours.
        std: deviation that it was divided by.

    Raises:
        NotWrappedError: the model carries no method.
        ConfigError: a block that the model does not have, or an image of another shape.
    """
    if image.dim() != 3 or image.shape[0] != 3:
        raise ConfigError(f"image of shape {tuple(image.shape)}: must be [3, H, W]")
    known = info(model)
    chosen = _blocks(blocks, known.blocks)
    training = model.training
    try:
        with torch.inference_mode(), trace(model.eval()) as record:
            model(image[None])
    finally:
        model.train(training)
    pixels = to_pixels(image, mean, std)
    traced = tuple(record.blocks[block] for block in chosen)
    shape = shape_of(model).at(traced[0].source_map.grid)
    return View(
        known.method,
        flops(model, None, (image.shape[1], image.shape[2])),
        count_macs(shape) / 1e9,
        traced,
        tuple(Panel(pixels, groups_of(block)) for block in traced),
    )


def draw(
    model: nn.Module,
    image: Tensor,
    methods: Sequence[Method | str] | None = None,
    blocks: Sequence[int] | None = None,
    path: str | Path = "tokens.png",
    *,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
) -> Path:
    """Draw the token regions of one image as a PNG: one row per method, one column per block.

    Merged groups show their mean colour inside an outline, pruned patches are dark and hatched,
    kept patches stay as they are.

    Args:
        model: a supported model; the method it carries is the only row if `methods` is None.
        image: `[3, H, W]`, as the model takes it.
        methods: settings, one row each, for a model that carries none.
        blocks: see `look`.
        path: PNG to write.
        mean: see `look`.
        std: see `look`.
        title: above the picture.

    Returns:
        The path.

    Raises:
        VistokenError: what `wrap` and `look` raise; AlreadyWrappedError if the model carries a
            method and `methods` are given.
    """
    if methods is None:
        views = [look(model, image, blocks, mean=mean, std=std)]
    else:
        _blocks(blocks, shape_of(model).depth)
        views = [_look_with(model, image, method, blocks, mean, std) for method in methods]
    scale = max(1, round(PANEL_SIDE / max(image.shape[1:])))
    original = to_pixels(image, mean, std).repeat(scale, axis=0).repeat(scale, axis=1)
    rows = [[Cell(original, *_captions(view)), *_cells(view, scale)] for view in views]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    compose(rows, title).save(path)
    return path


def _look_with(
    model: nn.Module,
    image: Tensor,
    method: Method | str,
    blocks: Sequence[int] | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> View:
    """Look at a model under a method, which is taken off again."""
    wrap(model, method)
    try:
        view = look(model, image, blocks, mean=mean, std=std)
    finally:
        unwrap(model)
    return replace(view, label=method) if isinstance(method, str) else view


def _blocks(blocks: Sequence[int] | None, depth: int) -> list[int]:
    """The blocks to show, checked."""
    if blocks is None:
        return sorted({depth // 4, depth // 2, 3 * depth // 4, depth - 1})
    wrong = [block for block in blocks if not 0 <= block < depth]
    if wrong or not blocks:
        raise ConfigError(f"blocks={list(blocks)}: the model has blocks 0 to {depth - 1}")
    return list(blocks)


def to_pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """A normalised image `[3, H, W]` as `[H, W, 3]` uint8."""
    scale, shift = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (std, mean))
    shown = image.detach().float().cpu() * scale + shift
    pixels: Pixels = (shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels


def groups_of(block: BlockTrace) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The token that stands for each patch of the first image `[h, w]`; -1 where it was pruned."""
    source = block.source_map
    groups: np.ndarray[Any, np.dtype[np.int64]] = (
        source.parent[0, source.prefix :].reshape(source.grid).cpu().numpy()
    )
    return groups


def _captions(view: View) -> tuple[str, str]:
    """Below the image: the method, and what it costs."""
    share = view.gflops / view.dense_gflops
    cost = f"{view.gflops:.3g} of {view.dense_gflops:.3g} GFLOPs ({share:.0%})"
    return view.label, cost


def _cells(view: View, scale: int) -> list[Cell]:
    """One drawn panel per block, with its counts."""
    cells = []
    for block, panel in zip(view.blocks, view.panels, strict=True):
        total = block.source_map.parent.shape[1]
        pruned, groups = int((panel.groups < 0).sum()), len(panel.merged())
        parts = [_count(groups, "merged group")] if groups else []
        parts += [_count(pruned, "pruned patch", "es")] if pruned else []
        cells.append(
            Cell(
                panel.draw(scale),
                f"after block {block.block}: {block.tokens} of {total} tokens",
                ", ".join(parts) or "every patch on its own",
            )
        )
    return cells


def _count(number: int, noun: str, plural: str = "s") -> str:
    """A number with its noun."""
    return f"{number} {noun}{'' if number == 1 else plural}"
