"""Cluttered Fashion scenes: one whole garment among fragments of others.

The task where dropping tokens is a real question: a garment of 96 to 160 px lies somewhere on a
224 px canvas, over a textured ground and over cut-off pieces of other garments. The class of the
whole garment is the label. Everything random in scene `i` is an integer hash of (seed, i), so the
scene is the same in any batch, on any device, up to rounding of its float32 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.eval.fashion import load_fashion_mnist
from vistoken.eval.hashing import hash_uniform
from vistoken.eval.scene_plan import GARMENT_PIXELS, GROUND_STREAM, ScenePlan, plan_scenes

__all__ = [
    "CLASSES",
    "GROUND_DRAWS",
    "MEAN",
    "STD",
    "TEST_SEED",
    "TRAIN_SEED",
    "VAL_SEED",
    "ScenePlan",
    "load_fashion_mnist",
    "normalise",
    "paint_scenes",
    "plan_scenes",
    "render_scenes",
]

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
MEAN = (0.41, 0.41, 0.41)
STD = (0.15, 0.15, 0.15)

GROUND_DRAWS = 4 + 3 * 5 * 5 + 56 * 56
"""Random numbers behind one ground: the stripes, the patches of colour, the grain."""

TRAIN_SEED, VAL_SEED, TEST_SEED = 1, 2, 3
"""Seeds of the scenes of each part; published accuracies are on `TEST_SEED`."""

Painter = Callable[[Tensor, ScenePlan, Tensor, int], Tensor]


def normalise(images: Tensor) -> Tensor:
    """Return images `[..., 3, H, W]` in 0..1 shifted and scaled by `MEAN` and `STD`."""
    mean = images.new_tensor(MEAN).view(3, 1, 1)
    return (images - mean) / images.new_tensor(STD).view(3, 1, 1)


def render_scenes(
    garments: Tensor,
    labels: Tensor,
    index: Tensor,
    seed: int,
    size: int = 224,
    augment: bool = False,
    paint: Painter | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a batch of scenes.

    Args:
        garments: Table of garments `[G, 28, 28]`, uint8.
        labels: Class of each garment `[G]`, int64.
        index: Number of each scene `[B]`, int64; scene `i` shows garment `i % G`.
        seed: Any integer; names the family of scenes.
        size: Side of the square canvas in pixels.
        augment: Also mirror, rotate and change the contrast of the garment, for training.
        paint: A compiled `paint_scenes`; None means the plain one. The planning stays out of it
            because compilers may treat the overflow that the hash relies on as undefined.

    Returns:
        Images `[B, 3, size, size]` float32 in 0..1 and labels `[B]`.

    Raises:
        ValueError: If the table is not of 28 x 28 garments or has fewer than two rows.
    """
    if garments.ndim != 3 or garments.shape[1:] != (GARMENT_PIXELS, GARMENT_PIXELS):
        raise ValueError(f"garments have shape {tuple(garments.shape)}; expected [G, 28, 28]")
    plan = plan_scenes(index, seed, len(garments), size, augment)
    noise = hash_uniform(seed, index, GROUND_STREAM, GROUND_DRAWS)
    images = (paint or paint_scenes)(garments[plan.source], plan, noise, size)
    return images, labels[plan.source[:, -1]]


def paint_scenes(pixels: Tensor, plan: ScenePlan, noise: Tensor, size: int = 224) -> Tensor:
    """Draw planned scenes; the part of `render_scenes` that is worth compiling.

    Args:
        pixels: Garment of each layer `[B, K, 28, 28]`, uint8.
        plan: Where and how the layers lie.
        noise: Draws in [0, 1) that make up the ground `[B, GROUND_DRAWS]`.
        size: Side of the square canvas in pixels.

    Returns:
        Images `[B, 3, size, size]` float32 in 0..1.
    """
    sheets = cut_sheets(pixels, plan)
    maps = layer_maps(plan, size)
    canvas = _draw_ground(noise, size)
    for k in range(pixels.shape[1]):
        grid = F.affine_grid(maps[:, k], [len(pixels), 2, size, size], align_corners=False)
        drawn = F.grid_sample(sheets[:, k], grid, mode="bilinear", align_corners=False)
        gain = plan.extent[:, k, None, None, None] / (1.5 * GARMENT_PIXELS)
        cover = ((drawn[:, 1:] - 0.5) * gain + 0.5).clamp(0, 1)
        shade = drawn[:, :1] / drawn[:, 1:].clamp_min(1e-3)
        canvas = torch.lerp(canvas, shade * plan.tint[:, k, :, None, None], cover)
    return canvas.clamp(0, 1)


def cover_of(value: Tensor) -> Tensor:
    """Where garments in 0..1 `[..., K, 28, 28]` have cloth: 1 inside the outline, else 0."""
    # Dilate, then erode, so that dark cloth inside the outline does not become a hole.
    return -F.max_pool2d(-F.max_pool2d((value > 0.05).float(), 3, 1, 1), 3, 1, 1)


def cut_sheets(pixels: Tensor, plan: ScenePlan) -> Tensor:
    """Turn garments `[B, K, 28, 28]` into shade times cover, and cover, `[B, K, 2, 28, 28]`."""
    value = pixels.to(torch.float32) / 255
    cover = cover_of(value)
    at = torch.arange(GARMENT_PIXELS, device=pixels.device)
    left, top, right, bottom = plan.window[..., None].unbind(dim=2)
    columns = (at >= left) & (at < right)
    rows = (at >= top) & (at < bottom)
    cover = cover * columns[:, :, None, :] * rows[:, :, :, None] * plan.present[..., None, None]
    shade = 0.12 + 0.88 * value ** plan.gamma[..., None, None]
    return torch.stack([shade * cover, cover], dim=2)


def layer_maps(plan: ScenePlan, size: int) -> Tensor:
    """Return the affine maps `[B, K, 2, 3]` from canvas to garment coordinates, both in -1..1."""
    zoom = size / plan.extent
    cos, sin = plan.angle.cos() * zoom, plan.angle.sin() * zoom
    x, y = ((plan.centre * 2 - size) / size).unbind(dim=-1)
    mirror = torch.where(plan.flip, -1.0, 1.0)
    first = torch.stack([cos, -sin, sin * y - cos * x], dim=-1) * mirror[..., None]
    second = torch.stack([sin, cos, -sin * x - cos * y], dim=-1)
    return torch.stack([first, second], dim=-2)


def _draw_ground(u: Tensor, size: int) -> Tensor:
    """Draw soft patches of colour, grain and stripes `[B, 3, size, size]`."""
    stripe, patches, grain = u[:, :4], u[:, 4:79].view(-1, 3, 5, 5), u[:, 79:].view(-1, 1, 56, 56)
    soft = F.interpolate(patches, size=(size, size), mode="bilinear")
    fine = F.interpolate(grain, size=(size, size), mode="bilinear")
    at = torch.arange(size, device=u.device, dtype=torch.float32) / size
    turn, period, phase, depth = (stripe[:, i, None] for i in range(4))
    turn, waves = turn * math.pi, 2 * math.pi * (4 + 12 * period)
    across = (at * waves * turn.cos())[:, None, :]
    down = (at * waves * turn.sin() + phase * 2 * math.pi)[:, :, None]
    stripes = torch.sin(across + down)[:, None] * (0.08 * depth)[..., None, None]
    ground: Tensor = 0.15 + 0.45 * soft + 0.25 * (fine - 0.5) + stripes
    return ground
