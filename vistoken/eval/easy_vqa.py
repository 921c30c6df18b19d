"""easy-vqa (PyPI `easy-vqa` 1.0, MIT): 64 x 64 pictures of one shape, 48,248 questions."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.errors import ConfigError
from vistoken.eval.vqa_scenes import CANVAS, TILE
from vistoken.eval.vqa_words import ID, PAD, pad_turns, turn

SHOWN = (
    "circle", "rectangle", "triangle",
    "black", "blue", "brown", "gray", "green", "red", "teal", "yellow",
)  # fmt: skip
"""What a picture may show: shapes and colours."""
SIDE = len(SHOWN)


@dataclass(frozen=True)
class EasyVqa:
    """One split of easy-vqa.

    Attributes:
        images: `[N, 3, 64, 64]` uint8.
        ids: turns of every picture `[N, M, L]` int64, filled up with empty turns.
        labels: the same where it is answer or end, else -100.
        counts: turns of every picture `[N]`.
        shown: 1 for what a picture shows, 0 for the rest `[N, 11]`, -1 where no question tells.
    """

    images: Tensor
    ids: Tensor
    labels: Tensor
    counts: Tensor
    shown: Tensor

    def to(self, device: torch.device) -> EasyVqa:
        """The same on a device."""
        return EasyVqa(*(getattr(self, field.name).to(device) for field in fields(self)))


def easy_vqa_root(root: str | Path | None) -> Path:
    """The folder with `train` and `test`.

    Raises:
        ConfigError: neither a folder nor the installed package has them.
    """
    if root is None:
        spec = importlib.util.find_spec("easy_vqa")
        found = spec and spec.submodule_search_locations
        root = Path(next(iter(found))) / "data" if found else Path("easy_vqa/data")
    path = Path(root)
    if not (path / "train" / "questions.json").is_file():
        raise ConfigError(
            f"no easy-vqa under {path}: install the package easy-vqa==1.0, or give its data folder"
        )
    return path


def read_questions(
    root: str | Path | None, split: Literal["train", "test"]
) -> list[tuple[str, str, int]]:
    """(question, answer, picture) of one split, in the order of the file."""
    text = (easy_vqa_root(root) / split / "questions.json").read_text()
    return [(question, answer, number) for question, answer, number in json.loads(text)]


def picture_path(root: str | Path | None, split: str, number: int) -> Path:
    """Where a picture lies."""
    return easy_vqa_root(root) / split / "images" / f"{number}.png"


def load_easy_vqa(
    root: str | Path | None = None, split: Literal["train", "test"] = "train"
) -> EasyVqa:
    """Read one split whole.

    Args:
        root: folder with `train` and `test`; None finds the installed package.
        split: `train` (4,000 pictures) or `test` (1,000).
    """
    from PIL import Image

    entries = read_questions(root, split)
    turns: dict[int, list[list[int]]] = {}
    shown: dict[int, set[str]] = {}
    for question, answer, number in entries:
        turns.setdefault(number, []).append(turn(question, answer))
        shown.setdefault(number, set()).update({answer} & set(SHOWN))
    numbers = sorted(turns)
    folder = picture_path(root, split, 0).parent
    pictures = [np.asarray(Image.open(folder / f"{n}.png").convert("RGB")) for n in numbers]
    most = max(map(len, turns.values()))
    length = max(len(ids) for each in turns.values() for ids in each)
    rows = [pad_turns([*turns[n], *[[]] * (most - len(turns[n]))], length) for n in numbers]
    ids = torch.tensor(rows)
    # The answer and the end are the last two ids of a turn.
    behind = (ids != ID[PAD]).sum(-1, keepdim=True)
    at = torch.arange(length)
    labels = torch.where((at >= behind - 2) & (at < behind), ids, -100)
    marks = [
        [float(word in shown[n]) if len(shown[n]) > 1 else -1.0 for word in SHOWN] for n in numbers
    ]
    return EasyVqa(
        torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), ids, labels,
        torch.tensor([len(turns[n]) for n in numbers]), torch.tensor(marks),
    )  # fmt: skip


def enlarge(images: Tensor) -> tuple[Tensor, Tensor]:
    """Thumbnail `[B, 3, 112, 112]` and canvas `[B, 3, 224, 224]` in 0..1 of uint8 pictures."""
    found = []
    for side in (TILE, CANVAS):
        large = F.interpolate(
            images.float() / 255, size=(side, side), mode="bicubic", antialias=True
        )
        found.append((large.clamp(0, 1) * 255).round() / 255)
    return found[0], found[1]
