"""Layout of Fashion scenes with several garments, one per cell of a 3 x 3 grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vistoken.eval.hashing import hash_integers, hash_uniform
from vistoken.eval.scene_plan import GARMENT_PIXELS, ScenePlan, cut_windows
from vistoken.eval.scenes import cover_of
from vistoken.eval.vqa_words import NAME_OF_CLASS, NAMES

EXTENT = (40 / 224, 76 / 224)
"""Least and greatest side of a garment's square, as shares of the canvas."""
FRAGMENT_EXTENT = (44 / 224, 76 / 224)
MOST, LEAST = 6, 3
"""Garments of a scene."""
FRAGMENTS = 4
COPIES = 0.3
"""Chance that a garment takes the name of the first one, so that there is something to count."""

_PLACE, _NAMES, _PIECES, _TINT = range(16, 20)


@dataclass(frozen=True)
class Garments:
    """Fashion-MNIST sorted by name.

    Attributes:
        images: `[G, 28, 28]` uint8.
        starts: first row of each name `[7]`.
        counts: rows of each name `[7]`.
        areas: share of a garment's square that is cloth `[G]`.
    """

    images: Tensor
    starts: Tensor
    counts: Tensor
    areas: Tensor

    def to(self, device: torch.device) -> Garments:
        """The same table on a device."""
        return Garments(
            self.images.to(device), self.starts.to(device), self.counts.to(device),
            self.areas.to(device),
        )  # fmt: skip


def sort_garments(images: Tensor, labels: Tensor) -> Garments:
    """Sort a table of garments by name.

    Args:
        images: `[G, 28, 28]` uint8.
        labels: Fashion-MNIST class of each `[G]`.

    Raises:
        ValueError: a name without a garment.
    """
    names = torch.tensor(NAME_OF_CLASS)[labels]
    order = names.argsort(stable=True)
    counts = torch.bincount(names, minlength=len(NAMES))
    if (counts == 0).any():
        raise ValueError(f"every name needs a garment; found {counts.tolist()} of {NAMES}")
    images = images[order]
    areas = torch.cat([cover_of(part / 255).mean((1, 2)) for part in images.split(4096)])
    return Garments(images, counts.cumsum(0) - counts, counts, areas)


@dataclass(frozen=True)
class Layout:
    """What a batch of scenes shows; the first garments are present, the others are -1 or 0.

    Attributes:
        plan: layers to paint, fragments below garments.
        name: name of each garment `[B, 6]`, -1 where there is none.
        cell: cell of the 3 x 3 grid of each garment `[B, 6]`, all different.
        area: pixels of cloth of each garment `[B, 6]`, 0 where there is none.
    """

    plan: ScenePlan
    name: Tensor
    cell: Tensor
    area: Tensor


def plan_layout(index: Tensor, seed: int, garments: Garments, size: int = 224) -> Layout:
    """Draw the layout of scenes.

    Args:
        index: number of each scene `[B]`, int64.
        seed: any integer; names the family of scenes.
        garments: the table, on the device of `index`.
        size: side of the square canvas in pixels.
    """
    u = hash_uniform(seed, index, _PLACE, 9 + MOST * 5)
    n = hash_integers(seed, index, _NAMES, 1 + 3 * MOST)
    cell = u[:, :9].argsort(dim=1)[:, :MOST]
    place = u[:, 9:].view(-1, MOST, 5)
    present = torch.arange(MOST, device=index.device) < (LEAST + n[:, :1] % (MOST - LEAST + 1))
    name = n[:, 1 : 1 + MOST] % len(NAMES)
    copied = n[:, 1 + MOST : 1 + 2 * MOST] % 1000 < int(1000 * COPIES)
    name = torch.where(copied, name[:, :1], name)
    source = garments.starts[name] + n[:, 1 + 2 * MOST :] % garments.counts[name]
    low, high = EXTENT
    extent = size * (low + (high - low) * place[..., 0])
    middle = torch.stack([cell % 3, cell // 3], dim=-1) + 0.5
    slack = (size / 3 - 0.9 * extent).clamp(min=0)
    centre = middle * (size / 3) + (place[..., 1:3] - 0.5) * slack[..., None]
    whole = (torch.arange(4, device=index.device) // 2) * GARMENT_PIXELS
    main = {
        "source": source,
        "centre": centre,
        "extent": extent,
        "angle": (2 * place[..., 3] - 1) * math.radians(10),
        "flip": place[..., 4] > 0.5,
        "window": whole.expand(len(index), MOST, 4),
        "present": present,
        "gamma": torch.ones_like(extent),
    }
    pieces = _plan_pieces(index, seed, len(garments.images), size)
    layers = FRAGMENTS + MOST
    tint = hash_uniform(seed, index, _TINT, layers * 3).view(-1, layers, 3)
    joined = {key: torch.cat([pieces[key], main[key]], dim=1) for key in main}
    area = garments.areas[source] * extent.square() * present
    return Layout(
        ScenePlan(tint=0.55 + 0.45 * tint, **joined), name.masked_fill(~present, -1), cell, area
    )


def _plan_pieces(index: Tensor, seed: int, total: int, size: int) -> dict[str, Tensor]:
    """Cut pieces, never whole, anywhere on the canvas."""
    k = FRAGMENTS
    n = hash_integers(seed, index, _PIECES, 4 * k + 1)
    u = hash_uniform(seed, index, _PIECES + 16, k * 5).view(-1, k, 5)
    low, high = FRAGMENT_EXTENT
    extent = size * (low + (high - low) * u[..., 0])
    return {
        "source": n[:, :k] % total,
        "centre": u[..., 1:3] * size,
        "extent": extent,
        "angle": (2 * u[..., 3] - 1) * math.radians(30),
        "flip": u[..., 4] > 0.5,
        "window": cut_windows(*n[:, k : 4 * k].view(-1, 3, k).unbind(dim=1)),
        "present": torch.arange(k, device=index.device) < 1 + n[:, 4 * k :] % k,
        "gamma": torch.ones_like(extent),
    }
