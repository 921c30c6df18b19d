"""Where images come from: the embedded scenes, or any data set that timm reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from vistoken.errors import ConfigError, VistokenError
from vistoken.eval.options import EvalOptions
from vistoken.eval.reference import MODEL_NAME, NUM_CLASSES, ReferenceScenes, load_reference_model
from vistoken.eval.scenes import CLASSES, MEAN, STD
from vistoken.models.load import Classifier

Transform = Callable[[Any], Tensor]
SCHEMES = ("wds/", "hfds/", "hfids/", "tfds/", "torch/")
SCENE_SIZE = 224


def reference_classifier() -> Classifier:
    """The embedded model; its transform brings any picture to the scenes' size and scale."""
    from timm.data import create_transform

    return Classifier(
        name=f"reference ({MODEL_NAME})",
        model=load_reference_model(),
        transform=create_transform(
            SCENE_SIZE, mean=MEAN, std=STD, crop_pct=1.0, interpolation="bicubic"
        ),
        num_classes=NUM_CLASSES,
        image_size=(SCENE_SIZE, SCENE_SIZE),
        mean=MEAN,
        std=STD,
    )


class SceneBatches(Dataset[tuple[Tensor, int]]):
    """The embedded scenes, drawn a whole batch at a time.

    Args:
        scenes: the held-out scenes.
    """

    def __init__(self, scenes: ReferenceScenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return self.scenes[item]

    def __getitems__(self, items: list[int]) -> list[tuple[Tensor, int]]:
        """Several scenes; a data loader calls this instead of `__getitem__`."""
        images, labels = self.scenes.batch(torch.tensor(items))
        return [(image, int(label)) for image, label in zip(images, labels, strict=True)]


class Pictures(Dataset[tuple[Tensor, int]]):
    """A data set of (PIL image, class) under a model's transform.

    Args:
        source: anything with a length and items.
        transform: image to tensor.
    """

    def __init__(self, source: Any, transform: Transform) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        image, label = self.source[item]
        return self.transform(image.convert("RGB")), int(label)


class PictureStream(IterableDataset[tuple[Tensor, int]]):
    """A stream of (PIL image, class) under a model's transform.

    Args:
        source: anything that can be iterated over.
        transform: image to tensor.
    """

    def __init__(self, source: Any, transform: Transform) -> None:
        self.source = source
        self.transform = transform

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for image, label in self.source:
            yield self.transform(image.convert("RGB")), int(label)


def open_source(options: EvalOptions) -> Any:
    """The data set of `options`, images still as PIL (the embedded scenes as tensors).

    Raises:
        ConfigError: no such folder, file or kind of data set.
        VistokenError: timm cannot read what is there.
    """
    if options.data == "reference":
        return SceneBatches(ReferenceScenes())
    named = options.data.startswith(SCHEMES)
    if not named and not Path(options.data).exists():
        raise ConfigError(
            f"--data {options.data}: there is no such folder or file; data sets by name begin "
            f"with one of {', '.join(SCHEMES)}"
        )
    from timm.data import create_dataset

    try:
        return create_dataset(
            options.data if named else "",
            root=options.data_dir if named else options.data,
            split=options.split,
            class_map=options.class_map,
            download=options.download,
            batch_size=options.batch_size,
        )
    except Exception as error:
        raise VistokenError(
            f"--data {options.data} --split {options.split} could not be opened "
            f"({type(error).__name__}: {error})"
        ) from error


def class_names_of(options: EvalOptions, source: Any) -> Sequence[str] | None:
    """Names of the classes in order: from `--class_names`, the scenes, or the folders.

    Raises:
        ConfigError: `--class_names` is neither `imagenet` nor a file.
    """
    if options.class_names == "imagenet":
        import open_clip

        return list(open_clip.IMAGENET_CLASSNAMES)
    if options.class_names is not None:
        path = Path(options.class_names)
        if not path.is_file():
            raise ConfigError(f"--class_names {path}: no such file, and not 'imagenet'")
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if isinstance(source, SceneBatches):
        return CLASSES
    for owner in (source, getattr(source, "reader", None)):
        for name in ("class_to_idx", "class_name_to_idx"):
            known = getattr(owner, name, None)
            if known:
                return [str(key).replace("_", " ") for key in sorted(known, key=known.get)]
    return None


def with_transform(source: Any, transform: Transform) -> Any:
    """The data set as tensors."""
    if isinstance(source, SceneBatches):
        return source
    kind = PictureStream if isinstance(source, IterableDataset) else Pictures
    return kind(source, transform)


class Share(Sampler[int]):
    """Every world-th item from `rank` on: each item once over all processes, none repeated.

    Args:
        count: items of the data set.
        rank: this process, from 0.
        world: processes.
    """

    def __init__(self, count: int, rank: int = 0, world: int = 1) -> None:
        self.items = range(rank, count, world)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)


def make_loader(data: Any, options: EvalOptions, rank: int = 0, world: int = 1) -> DataLoader[Any]:
    """Batches of this process's share of the data, in order.

    Raises:
        ConfigError: more processes than images, or several processes on a stream, which would see
            images twice.
    """
    settings: dict[str, Any] = {
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "pin_memory": torch.cuda.is_available(),
    }
    if not isinstance(data, IterableDataset):
        count = len(data) if options.limit is None else min(options.limit, len(data))
        if count < world:
            raise ConfigError(f"{count} images cannot be shared by {world} processes")
        return DataLoader(data, sampler=Share(count, rank, world), **settings)
    if world > 1:
        raise ConfigError(
            f"--data {options.data} is a stream, which {world} processes cannot share without "
            "counting images twice; use --devices 1"
        )
    return DataLoader(data, **settings)
