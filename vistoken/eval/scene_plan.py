"""Layout of the cluttered Fashion scenes: what lies where, before any pixel is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vistoken.eval.hashing import hash_integers, hash_uniform

GARMENT_EXTENT = (96 / 224, 160 / 224)
"""Least and greatest side of the whole garment's square, as shares of the canvas."""
FRAGMENT_EXTENT = (64 / 224, 104 / 224)
"""Least and greatest side of the square a fragment is cut from, as shares of the canvas."""
MIN_FRAGMENTS, MAX_FRAGMENTS = 3, 6
GARMENT_PIXELS = 28

_PLACE, _FRAGMENTS, _PIECES, _TINT, GROUND_STREAM, _AUGMENT = range(6)


@dataclass(frozen=True)
class ScenePlan:
    """Geometry and colour of a batch of scenes, before any pixel is drawn.

    Layers run from the bottom to the top; the last one, the whole garment, covers all others.

    Attributes:
        source: Row of each layer in the garment table `[B, K]`, int64.
        centre: Centre of each layer `[B, K, 2]` as (x, y) in pixels of the canvas.
        extent: Side of each layer's full 28 x 28 garment square `[B, K]` in pixels of the canvas.
        angle: Counter-clockwise rotation of each layer `[B, K]` in radians.
        flip: Whether a layer is mirrored left to right `[B, K]`, bool.
        window: Part shown, `[B, K, 4]` as (left, top, right, bottom) in garment pixels, int64.
        present: Whether the layer is drawn at all `[B, K]`, bool.
        tint: Colour factor of each layer `[B, K, 3]` in 0..1.
        gamma: Exponent applied to the shades of each layer `[B, K]`.
    """

    source: Tensor
    centre: Tensor
    extent: Tensor
    angle: Tensor
    flip: Tensor
    window: Tensor
    present: Tensor
    tint: Tensor
    gamma: Tensor


def plan_scenes(
    index: Tensor, seed: int, num_garments: int, size: int = 224, augment: bool = False
) -> ScenePlan:
    """Draw the layout of scenes.

    Args:
        index: Number of each scene `[B]`, int64. Scene `i` shows garment `i % num_garments`, so
            `i + epoch * num_garments` shows the same garment in a fresh scene.
        seed: Any integer; names the family of scenes.
        num_garments: Rows of the garment table, at least 2.
        size: Side of the square canvas in pixels.
        augment: Also mirror, rotate by up to 12 degrees and change the contrast.

    Returns:
        The plan, on the device of `index`.

    Raises:
        ValueError: If there are fewer than two garments, since fragments must be of another one.
    """
    if num_garments < 2:
        raise ValueError(f"num_garments is {num_garments}; fragments need at least 2")
    main = _plan_garment(index, seed, num_garments, size, augment)
    pieces = _plan_fragments(index, seed, num_garments, size)
    layers = MAX_FRAGMENTS + 1
    tint = hash_uniform(seed, index, _TINT, layers * 3).view(-1, layers, 3)
    joined = {name: torch.cat([pieces[name], main[name]], dim=1) for name in main}
    return ScenePlan(tint=0.55 + 0.45 * tint, **joined)


def _plan_garment(
    index: Tensor, seed: int, num_garments: int, size: int, augment: bool
) -> dict[str, Tensor]:
    """Place the whole garment so that its rotated square stays inside the canvas."""
    u = hash_uniform(seed, index, _PLACE, 3)
    a = hash_uniform(seed, index, _AUGMENT, 3)
    if not augment:
        a = torch.full_like(a, 0.5)
    low, high = GARMENT_EXTENT
    extent = size * (low + (high - low) * u[:, 0])
    angle = (2 * a[:, 0] - 1) * math.radians(12)
    half = extent / 2 * (angle.cos() + angle.sin().abs())
    centre = half[:, None] + u[:, 1:] * (size - 2 * half)[:, None]
    window = torch.tensor([0, 0, GARMENT_PIXELS, GARMENT_PIXELS], device=index.device)
    return {
        "source": (index % num_garments)[:, None],
        "centre": centre[:, None],
        "extent": extent[:, None],
        "angle": angle[:, None],
        "flip": (a[:, 1] > 0.5)[:, None],
        "window": window.expand(len(index), 1, 4),
        "present": torch.ones_like(index, dtype=torch.bool)[:, None],
        "gamma": torch.exp((2 * a[:, 2] - 1) * 0.4)[:, None],
    }


def _plan_fragments(index: Tensor, seed: int, num_garments: int, size: int) -> dict[str, Tensor]:
    """Cut pieces, never whole, out of garments other than the scene's own."""
    k = MAX_FRAGMENTS
    u = hash_uniform(seed, index, _FRAGMENTS, k * 5).view(-1, k, 5)
    n = hash_integers(seed, index, _PIECES, 4 * k + 1)
    source = (index[:, None] + 1 + n[:, :k] % (num_garments - 1)) % num_garments
    drawn = MIN_FRAGMENTS + n[:, 4 * k :] % (MAX_FRAGMENTS - MIN_FRAGMENTS + 1)
    low, high = FRAGMENT_EXTENT
    extent = size * (low + (high - low) * u[..., 0])
    window = cut_windows(*n[:, k : 4 * k].view(-1, 3, k).unbind(dim=1))
    angle = (2 * u[..., 3] - 1) * math.radians(30)
    flip = u[..., 4] > 0.5
    # The window, not the garment square, is what has to be anywhere on the canvas.
    middle = (window[..., :2] + window[..., 2:]) / (2 * GARMENT_PIXELS) - 0.5
    x = torch.where(flip, -middle[..., 0], middle[..., 0]) * extent
    y = middle[..., 1] * extent
    shift = torch.stack(
        [x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()], dim=-1
    )
    return {
        "source": source,
        "centre": u[..., 1:3] * size - shift,
        "extent": extent,
        "angle": angle,
        "flip": flip,
        "window": window,
        "present": torch.arange(k, device=index.device) < drawn,
        "gamma": torch.ones_like(extent),
    }


def cut_windows(side: Tensor, depth: Tensor, width: Tensor) -> Tensor:
    """Turn integer draws into windows of 11 to 16 rows from one side, 17 to 28 pixels across."""
    keep, across, which = 11 + depth % 6, 17 + width % 12, side % 4
    start = (GARMENT_PIXELS - across) // 2
    near, far = torch.zeros_like(keep), torch.full_like(keep, GARMENT_PIXELS)
    boxes = [
        (near, start, keep, start + across),
        (start, near, start + across, keep),
        (far - keep, start, far, start + across),
        (start, far - keep, start + across, far),
    ]
    options = torch.stack([torch.stack(box, dim=-1) for box in boxes])
    return torch.gather(options, 0, which[None, ..., None].expand(1, *which.shape, 4))[0]
