"""The embedded reference: a small trained model and 1,000 scenes it has not seen."""

from __future__ import annotations

from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vistoken.eval.scenes import TEST_SEED, normalise, render_scenes

MODEL_NAME = "deit_tiny_patch16_224"
WEIGHTS_FILE = "deit_tiny_scenes.safetensors"
GARMENTS_FILE = "fashion_test_1000.npz"
NUM_CLASSES = 10


def _asset(path: Path | None, name: str) -> Traversable | Path:
    """Return the given file, or the one the package carries."""
    return files("vistoken.assets") / name if path is None else path


def load_reference_model(weights: Path | None = None) -> nn.Module:
    """Build the reference classifier: DeiT-Tiny trained on the cluttered Fashion scenes.

    Args:
        weights: Safetensors file to read; None means the embedded one.

    Returns:
        A timm `deit_tiny_patch16_224` with 10 classes, float32, on the CPU, in eval mode. It takes
        normalised images `[B, 3, 224, 224]` and returns logits `[B, 10]`.
    """
    import timm
    from safetensors.torch import load_file

    model: nn.Module = timm.create_model(MODEL_NAME, num_classes=NUM_CLASSES)
    source = _asset(weights, WEIGHTS_FILE)
    with as_file(source) as path:
        state = {name: value.float() for name, value in load_file(path).items()}
    model.load_state_dict(state)
    return model.eval()


class ReferenceScenes(Dataset[tuple[Tensor, int]]):
    """The 1,000 held-out scenes, 100 of each class, drawn from Fashion-MNIST's test split.

    Items are `(image, label)`: a normalised image `[3, 224, 224]` float32 and a class in 0..9.

    Args:
        garments: Npz file with `images` `[G, 28, 28]` uint8 and `labels` `[G]` uint8; None means
            the embedded one.
    """

    def __init__(self, garments: Path | None = None) -> None:
        source = _asset(garments, GARMENTS_FILE)
        with as_file(source) as path, np.load(path) as data:
            self.garments = torch.from_numpy(data["images"])
            self.labels = torch.from_numpy(data["labels"]).long()

    def __len__(self) -> int:
        return len(self.garments)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        if not 0 <= item < len(self):
            raise IndexError(f"scene {item} does not exist; there are {len(self)}")
        images, labels = self.batch(torch.tensor([item]))
        return images[0], int(labels[0])

    def batch(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Draw several scenes at once, which is faster than one by one.

        Args:
            items: Numbers of the scenes `[B]`, int64, on the device to draw on.

        Returns:
            Normalised images `[B, 3, 224, 224]` float32 and labels `[B]` int64.
        """
        garments, labels = self.garments.to(items.device), self.labels.to(items.device)
        images, targets = render_scenes(garments, labels, items, TEST_SEED)
        return normalise(images), targets
