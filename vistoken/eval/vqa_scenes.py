"""Pictures of Fashion scenes VQA: canvas, thumbnail and crops, and what lies under each patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.eval.hashing import hash_uniform
from vistoken.eval.scenes import GROUND_DRAWS, Painter, cut_sheets, layer_maps, paint_scenes
from vistoken.eval.vqa_plan import MOST, Garments, Layout
from vistoken.eval.vqa_words import NAMES

CANVAS, TILE, PATCH = 224, 112, 14
MEAN, STD = 0.41, 0.15
_GROUND = 60


def draw(
    layout: Layout, garments: Garments, index: Tensor, seed: int, paint: Painter | None = None
) -> Tensor:
    """Paint scenes `[B, 3, 224, 224]` float32 in 0..1, in steps of 1/255 like a file.

    Args:
        layout: from `plan_layout`.
        garments: the table of the layout.
        index: numbers of the scenes `[B]`.
        seed: that of the layout.
        paint: a compiled `paint_scenes`; None means the plain one.
    """
    noise = hash_uniform(seed, index, _GROUND, GROUND_DRAWS)
    pixels = garments.images[layout.plan.source]
    images = (paint or paint_scenes)(pixels, layout.plan, noise, CANVAS)
    return (images * 255).round() / 255


def cut_tiles(images: Tensor, small: Tensor | None = None) -> Tensor:
    """Thumbnail and four crops, normalised, as the image processor makes them.

    Args:
        images: `[B, 3, 224, 224]` in 0..1.
        small: thumbnail `[B, 3, 112, 112]` where it is made of a smaller picture.

    Returns:
        `[B, 5, 3, 112, 112]`: the whole at half size, then crops in raster order.
    """
    if small is None:
        small = F.interpolate(images, size=(TILE, TILE), mode="bicubic", antialias=True)
        small = (small.clamp(0, 1) * 255).round() / 255
    grid = images.unflatten(3, (2, TILE)).unflatten(2, (2, TILE)).permute(0, 2, 4, 1, 3, 5)
    return (torch.cat([small[:, None], grid.flatten(1, 2)], dim=1) - MEAN) / STD


def patch_names(layout: Layout, garments: Garments) -> Tensor:
    """Name of the garment at the middle of every patch `[B, 5, 64]`; 7 where there is none."""
    side = TILE // PATCH
    fine, coarse = (_names_at(layout, garments, 2 * side), _names_at(layout, garments, side))
    crops = fine.unflatten(2, (2, side)).unflatten(1, (2, side)).permute(0, 1, 3, 2, 4)
    return torch.cat([coarse.flatten(1)[:, None], crops.flatten(3).flatten(1, 2)], dim=1)


def _names_at(layout: Layout, garments: Garments, points: int) -> Tensor:
    """Names on a grid of points over the canvas `[B, points, points]`."""
    plan = layout.plan
    cover = cut_sheets(garments.images[plan.source], plan)[:, -MOST:, 1:]
    maps = layer_maps(plan, CANVAS)[:, -MOST:]
    count = len(cover) * MOST
    grid = F.affine_grid(maps.flatten(0, 1), [count, 1, points, points], align_corners=False)
    drawn = F.grid_sample(cover.flatten(0, 1), grid, mode="bilinear", align_corners=False)
    drawn = drawn.view(-1, MOST, points, points) > 0.5
    found = torch.full_like(drawn[:, 0], len(NAMES), dtype=torch.long)
    for k in range(MOST):
        found = torch.where(drawn[:, k], layout.name[:, k, None, None], found)
    return found
