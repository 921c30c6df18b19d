"""Turns a finished run into the embedded reference and measures it.

Run as `python -m vistoken.train.export --checkpoint runs/reference/last.ckpt`.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vistoken.eval.intervals import wilson_interval
from vistoken.eval.reference import (
    GARMENTS_FILE,
    WEIGHTS_FILE,
    ReferenceScenes,
    load_reference_model,
)
from vistoken.eval.scenes import TEST_SEED, load_fashion_mnist, normalise, render_scenes


def evaluation_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the averaged weights of a checkpoint, or the plain ones where it has no average.

    Args:
        checkpoint: What `Trainer.save_checkpoint` wrote for a `Classifier`.

    Returns:
        The timm model's state dict in float16.
    """
    state: dict[str, Tensor] = checkpoint["state_dict"]
    prefix = "ema.module." if any(name.startswith("ema.") for name in state) else "net."
    return {
        name.removeprefix(prefix): value.half().contiguous()
        for name, value in state.items()
        if name.startswith(prefix)
    }


def balanced_garments(images: Tensor, labels: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
    """Take the first garments of every class, in their order in the split.

    Args:
        images: Garments `[G, 28, 28]`.
        labels: Classes `[G]`.
        per_class: Garments to take of each class.

    Returns:
        Garments `[per_class * classes, 28, 28]` and their classes.
    """
    ranks = torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    keep = ranks <= per_class
    return images[keep], labels[keep]


def count_hits(
    model: nn.Module, garments: Tensor, labels: Tensor, device: str, batch_size: int = 250
) -> int:
    """Count the scenes that a model names rightly, one scene for each garment.

    Args:
        model: Classifier of normalised images `[B, 3, 224, 224]`.
        garments: Garments `[G, 28, 28]` uint8.
        labels: Classes `[G]`.
        device: Where to draw and classify.
        batch_size: Scenes drawn and classified at a time.

    Returns:
        Hits among the `G` scenes of `TEST_SEED`, in float32 without TF32.
    """
    torch.set_float32_matmul_precision("highest")
    model, garments, labels = model.to(device), garments.to(device), labels.to(device)
    hits = 0
    for start in range(0, len(garments), batch_size):
        index = torch.arange(start, min(start + batch_size, len(garments)), device=device)
        with torch.inference_mode():
            images, targets = render_scenes(garments, labels, index, TEST_SEED)
            hits += int((model(normalise(images)).argmax(1) == targets).sum())
    return hits


def describe_run(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return recipe, steps, images seen and seconds as the checkpoint holds them."""
    data = checkpoint["datamodule_hyper_parameters"]
    timer = checkpoint.get("callbacks", {}).get("Timer", {}).get("time_elapsed", {})
    recipe = {**checkpoint["hyper_parameters"], **data}
    recipe = {name: value for name, value in recipe.items() if not name.startswith("_")}
    recipe.pop("root", None)
    return {
        "recipe": recipe,
        "steps": checkpoint["global_step"],
        "images_seen": checkpoint["global_step"] * data["batch_size"],
        "train_seconds": round(timer.get("train", 0.0), 1),
    }


def _score(hits: int, total: int) -> dict[str, Any]:
    """Return one accuracy with its 95 % interval."""
    low, high = wilson_interval(hits, total)
    return {"top1": hits / total, "n": total, "interval95": [round(low, 4), round(high, 4)]}


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--root", help="folder with Fashion-MNIST", default=None)
    parser.add_argument("--assets", type=Path, default=Path("vistoken/assets"))
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/reference.json"))
    parser.add_argument("--command", default="", help="the training command, for the record")
    parser.add_argument("--seed", type=int, default=0, help="the run's seed, for the record")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """Write the weights, the garments and the measurements of a finished run."""
    given = _parse(args)
    checkpoint = torch.load(given.checkpoint, map_location="cpu", weights_only=True)
    images, labels = load_fashion_mnist(given.root, "test")
    weights, table = given.assets / WEIGHTS_FILE, given.assets / GARMENTS_FILE
    save_file(evaluation_weights(checkpoint), weights)
    chosen, classes = balanced_garments(images, labels, per_class=100)
    np.savez_compressed(table, images=chosen.numpy(), labels=classes.to(torch.uint8).numpy())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, scenes = load_reference_model(weights), ReferenceScenes(table)
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {m.__name__: str(m.__version__) for m in (torch, timm, lightning)},
        "date": datetime.date.today().isoformat(),
        "command": given.command,
        "seed": given.seed,
        **describe_run(checkpoint),
        "dtype": "float32",
        "scene_seed": TEST_SEED,
        "test": _score(count_hits(model, images, labels, device), len(images)),
        "embedded": _score(count_hits(model, scenes.garments, scenes.labels, device), len(scenes)),
    }
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
