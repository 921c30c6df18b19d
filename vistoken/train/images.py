"""Pictures for training: any data set that timm reads, with timm's augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup, create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from vistoken.errors import ConfigError, VistokenError
from vistoken.eval.sources import SCHEMES, Pictures, PictureStream
from vistoken.train.order import EpochOrder, Numbered, ResumableData, ResumableLoader

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImagesData(ResumableData):
    """Training and validation pictures of an image folder, a tar file, or a stream.

    Args:
        root: folder or tar file; for data sets by name, where they are or go.
        name: timm's name: empty for a folder or tar file, `wds/...`, `hfds/...`, `hfids/...`
            (streamed), `torch/cifar10` and the like.
        val_root: another folder or tar file for validation.
        train_split: subfolder or split to learn on.
        val_split: subfolder or split to validate on.
        num_classes: classes, needed by mixup and cutmix.
        class_map: text file that orders the classes.
        download: let data sets by name fetch themselves.
        batch_size: pictures a step and process.
        num_workers: processes that read pictures.
        subset: learn on only this many pictures, the same in every epoch, chosen by `seed`; of a
            stream, on the first that come.
        val_subset: validate on only this many.
        num_samples: pictures of a training stream that does not say how many it holds.
        val_num_samples: pictures of such a validation stream.
        image_size: side in pixels.
        mean: per-channel mean of the model's input.
        std: per-channel deviation.
        interpolation: of resizing.
        crop_pct: share of the side that validation keeps.
        scale: smallest and largest share of the area that a training crop takes.
        hflip: chance of a mirror image.
        auto_augment: timm's policy such as `rand-m9-mstd0.5-inc1`; None is none.
        erasing: chance of random erasing.
        mixup: its alpha; 0, the default, is off, as rates want whole pictures.
        cutmix: its alpha; 0 is off.
        seed: of order, subset and augmentation.
    """

    def __init__(
        self,
        root: str | None = None,
        name: str = "",
        val_root: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        num_classes: int = 1000,
        class_map: str = "",
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 8,
        subset: int | None = None,
        val_subset: int | None = None,
        num_samples: int | None = None,
        val_num_samples: int | None = None,
        image_size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        interpolation: str = "bicubic",
        crop_pct: float = 0.9,
        scale: Sequence[float] = (0.08, 1.0),
        hflip: float = 0.5,
        auto_augment: str | None = None,
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for key in ("subset", "val_subset", "num_samples", "val_num_samples"):
            value = self.hparams[key]
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value}: must be 1 or larger, or null")
        if name and not name.startswith(SCHEMES):
            raise ConfigError(f"name={name!r}: must begin with one of {', '.join(SCHEMES)}")
        if not name and (root is None or not Path(root).exists()):
            raise ConfigError(f"root={root!r}: there is no such folder or tar file")
        self.mix: Mixup | None = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes)

    # Data sets ------------------------------------------------------------------------------------

    def _open(self, training: bool) -> Any:
        """One part, images still as PIL.

        Raises:
            VistokenError: timm cannot read it.
        """
        given = self.hparams
        root = given["root"] if training else given["val_root"] or given["root"]
        split = given["train_split"] if training else given["val_split"]
        try:
            return create_dataset(
                given["name"],
                root=root,
                split=split,
                class_map=given["class_map"],
                download=given["download"],
                is_training=training,
                batch_size=given["batch_size"],
                num_samples=given["num_samples" if training else "val_num_samples"],
                seed=given["seed"],
            )
        except Exception as error:
            raise VistokenError(f"root={root!r}, split {split!r}: {error}") from error

    def transform(self, training: bool) -> Any:
        """Timm's transform of a part."""
        given = self.hparams
        options: dict[str, Any] = {"crop_pct": given["crop_pct"]}
        if training:
            options = {
                "is_training": True,
                "scale": tuple(given["scale"]),
                "hflip": given["hflip"],
                "color_jitter": None,
                "auto_augment": given["auto_augment"],
                "re_prob": given["erasing"],
            }
        return create_transform(
            given["image_size"],
            interpolation=given["interpolation"],
            mean=tuple(given["mean"]),
            std=tuple(given["std"]),
            **options,
        )

    def _loader(self, training: bool) -> DataLoader[Any]:
        given = self.hparams
        source, transform = self._open(training), self.transform(training)
        batch = given["batch_size"]
        options: dict[str, Any] = {
            "num_workers": given["num_workers"],
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": given["num_workers"] > 0,
        }
        limit = given["subset"] if training else given["val_subset"]
        world = 1 if self.trainer is None else self.trainer.world_size
        rank = 0 if self.trainer is None else self.trainer.global_rank
        if isinstance(source, IterableDataset):
            return self._stream(source, transform, training, world, options)
        if limit is not None and limit < len(source):
            order = torch.randperm(
                len(source), generator=torch.Generator().manual_seed(given["seed"])
            )
            source = Subset(source, order[:limit].tolist())
        if not training:
            return DataLoader(Pictures(source, transform), batch, **options)
        data = Numbered(source, transform, given["seed"])
        if len(data) < batch * world:
            raise ConfigError(
                f"{len(data)} pictures do not fill one batch of {batch} in each of "
                f"{world} processes"
            )
        sampler = EpochOrder(data, world, rank, shuffle=True, seed=given["seed"], drop_last=True)
        return self.resumable(ResumableLoader(data, sampler, batch, options))

    def _stream(
        self, source: Any, transform: Any, training: bool, world: int, options: dict[str, Any]
    ) -> DataLoader[Any]:
        """Batches of a stream, whose readers divide the subset and drop what fills no batch.

        Raises:
            ConfigError: the share of a reader fills no batch.
        """
        batch, readers = self.hparams["batch_size"], max(1, self.hparams["num_workers"])
        limit = self.hparams["subset" if training else "val_subset"]
        self._prepare_stream(source)
        each = None if limit is None else -(-limit // (world * readers))
        if training and each is not None and each < batch:
            raise ConfigError(
                f"subset={limit}: each reader of the stream gets {each} pictures, which do not "
                f"fill one batch of {batch}; take a larger subset, smaller batches, or fewer than "
                f"num_workers={readers}"
            )
        stream = Stream(source, transform, each, (readers, batch) if training else None)
        return DataLoader(stream, batch, drop_last=training, **options)

    def _prepare_stream(self, source: Any) -> None:
        """Tell a stream of timm the epoch, which shuffles it, and the workers that share it."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        for name, value in (
            ("set_epoch", epoch),
            ("set_loader_cfg", self.hparams["num_workers"]),
        ):
            if hasattr(source, name):
                getattr(source, name)(value)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training pictures, in an order that seed and epoch fix."""
        return self._loader(True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation pictures in order."""
        return self._loader(False)

    test_dataloader = val_dataloader

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Mix pictures on the device, where that is asked for."""
        training = self.trainer is not None and self.trainer.training
        if self.mix is None or not training:
            return batch
        images, labels = self.mix(*batch)
        return images, labels


class Stream(PictureStream):
    """A stream under a transform, of which every reader takes the first `each` pictures.

    Args:
        source: anything that can be iterated over.
        transform: image to tensor.
        each: pictures of one reader; None is all.
        whole: readers, and the size of the batches that each of them fills; None where pictures
            that fill none are kept, so that the length is not known.
    """

    def __init__(
        self, source: Any, transform: Any, each: int | None, whole: tuple[int, int] | None
    ) -> None:
        super().__init__(source, transform)
        self.each, self.whole = each, whole

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return islice(super().__iter__(), self.each)

    def __len__(self) -> int:
        """Pictures in whole batches; learning rates need to know how long an epoch is.

        Raises:
            TypeError: the source does not know.
        """
        if self.whole is None:
            raise TypeError("the length of this stream is not known")
        readers, batch = self.whole
        own = len(self.source) // readers
        if own == 0:  # So timm says that it does not know.
            raise TypeError("the length of this stream is not known")
        return readers * (min(own, own if self.each is None else self.each) // batch * batch)
