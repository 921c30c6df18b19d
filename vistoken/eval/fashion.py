"""Reading Fashion-MNIST from the places it is commonly installed in."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Split = Literal["train", "test"]

SYSTEM_ROOT = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package `dataset-fashion-mnist` puts the files."""

_PREFIX = {"train": "train", "test": "t10k"}
_HEADER = {"images-idx3": 16, "labels-idx1": 8}


def load_fashion_mnist(
    root: str | Path | None = None, split: Split = "train", *, download: bool = False
) -> tuple[Tensor, Tensor]:
    """Read one split of Fashion-MNIST.

    Args:
        root: Folder with the IDX files, gzipped or not, or one that holds torchvision's
            `FashionMNIST/raw`; None means the folder of the Debian package.
        split: `"train"` (60,000 garments) or `"test"` (10,000 garments).
        download: Fetch the files with torchvision into `root` when they are absent.

    Returns:
        Garments `[G, 28, 28]` uint8 and classes `[G]` int64.

    Raises:
        ValueError: If `split` is unknown.
        FileNotFoundError: If the files are absent and `download` is off.
    """
    if split not in _PREFIX:
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'test'")
    base = SYSTEM_ROOT if root is None else Path(root)
    images = _find(base, split, "images-idx3")
    labels = _find(base, split, "labels-idx1")
    if images is None or labels is None:
        if download:
            return _download(base, split)
        raise FileNotFoundError(
            f"no Fashion-MNIST {split} files under {base}; install the Debian package "
            f"dataset-fashion-mnist (it fills {SYSTEM_ROOT}), or pass a writable root with "
            "download=True to fetch them with torchvision"
        )
    return _read(images, "images-idx3").view(-1, 28, 28), _read(labels, "labels-idx1").long()


def _find(base: Path, split: str, kind: str) -> Path | None:
    """Return the first existing spelling of one IDX file."""
    stem = f"{_PREFIX[split]}-{kind}-ubyte"
    for folder in (base, base / "FashionMNIST" / "raw", base / "raw"):
        for name in (f"{stem}.gz", stem):
            if (folder / name).is_file():
                return folder / name
    return None


def _read(path: Path, kind: str) -> Tensor:
    """Return the bytes behind the header of an IDX file, flat."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return torch.frombuffer(bytearray(data[_HEADER[kind] :]), dtype=torch.uint8)


def _download(base: Path, split: str) -> tuple[Tensor, Tensor]:
    """Fetch one split with torchvision."""
    from torchvision.datasets import FashionMNIST

    data = FashionMNIST(str(base), train=split == "train", download=True)
    return data.data, data.targets.long()
