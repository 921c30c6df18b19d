"""Pictures that are read once, kept as bytes, and augmented on the device a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_dataset
from torch import Tensor
from torch.utils.data import DataLoader

from vistoken.errors import ConfigError, VistokenError
from vistoken.eval.sources import Pictures
from vistoken.train.images import IMAGENET_MEAN, IMAGENET_STD
from vistoken.train.order import ResumableData, ResumableLoader, ShareOrder
from vistoken.train.scenes_data import SceneNumbers

Table = tuple[Tensor, Tensor]


def read_images(
    root: str, split: str, side: int, num_workers: int = 0, limit: int | None = None
) -> Table:
    """All pictures of a folder or tar file with one subfolder per class, as bytes.

    Args:
        root: folder or tar file.
        split: its subfolder.
        side: pictures are cut to their middle square and brought to this side in pixels.
        num_workers: processes that read.
        limit: read only so many, spread evenly over the split; None is all.

    Returns:
        Images `[n, 3, side, side]` uint8 and classes `[n]` int64.

    Raises:
        VistokenError: timm cannot read it.
    """
    try:
        source: Any = create_dataset("", root=root, split=split)
    except Exception as error:
        raise VistokenError(f"root={root!r}, split {split!r}: {error}") from error
    if limit is not None and limit < len(source):
        picked = torch.linspace(0, len(source) - 1, limit).round().long().tolist()
        source = torch.utils.data.Subset(source, picked)
    pictures = Pictures(source, Square(side))
    loader = DataLoader(pictures, batch_size=256, num_workers=num_workers)
    # Copies, for what workers send holds open files.
    images, labels = zip(*((x.clone(), y.clone()) for x, y in loader), strict=True)
    return torch.cat(images), torch.cat(labels)


class Square:
    """The middle square of a PIL image, resized, as `[3, side, side]` uint8."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Any) -> Tensor:
        """Cut, resize, copy."""
        from PIL import Image, ImageOps

        fitted = ImageOps.fit(image, (self.side,) * 2, Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        return pixels.view(self.side, self.side, 3).permute(2, 0, 1).contiguous()


def normalised(
    images: Tensor,
    size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Bytes `[B, 3, s, s]` as a model takes them: `[B, 3, size, size]` float32."""
    x = images.float() / 255
    if x.shape[-1] != size:
        smaller = size < x.shape[-1]
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=smaller).clamp(0, 1)
    return standardised(x, mean, std)


def standardised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Shift and scale the channels of `[B, 3, H, W]`."""
    shift, scale = (x.new_tensor(list(v))[:, None, None] for v in (mean, std))
    return (x - shift) / scale


def random_crops(x: Tensor, size: int, scale: Sequence[float], hflip: float) -> Tensor:
    """A random part of every image `[B, 3, s, s]`, resized to `[B, 3, size, size]`.

    Args:
        x: images in 0..1.
        size: side of the result; much smaller than s it aliases.
        scale: smallest and largest share of the area, aspect between 3:4 and 4:3.
        hflip: chance of a mirror image.
    """
    draw = torch.rand(5, len(x), device=x.device)
    area = scale[0] + (scale[1] - scale[0]) * draw[0]
    aspect = ((2 * draw[1] - 1) * math.log(4 / 3)).exp()
    width, height = ((area * a).sqrt().clamp(max=1) for a in (aspect, 1 / aspect))
    sign = torch.where(draw[4] < hflip, -1.0, 1.0)
    zero = torch.zeros_like(width)
    rows = [sign * width, zero, (2 * draw[2] - 1) * (1 - width),
            zero, height, (2 * draw[3] - 1) * (1 - height)]  # fmt: skip
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(x), 3, size, size], align_corners=False)
    out = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return out.clamp(0, 1)


def jittered(x: Tensor, strength: float) -> Tensor:
    """Brightness, contrast and saturation of every image changed by up to `strength`."""
    draw = 1 + strength * (2 * torch.rand(3, len(x), 1, 1, 1, device=x.device) - 1)
    x = x * draw[0]
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, draw[1])
    x = torch.lerp(x.mean(1, keepdim=True), x, draw[2])
    return x.clamp(0, 1)


class MemoryImages(ResumableData):
    """An image folder held in memory: no decoding while training, so one GPU stays busy.

    Augmentation draws from the generators of the run, which `StepSeeds` sets at every step: a
    seeded run that resumes inside an epoch goes on with the pictures, cuts and mixes that are left.

    Args:
        root: folder or tar file with one subfolder per split and class.
        train_split: subfolder to learn on.
        val_splits: subfolders to validate on, one after the other.
        test_splits: subfolders to test on; None is those of validation.
        num_classes: classes, needed by mixup and cutmix.
        stored: side in pixels that pictures are kept at; `image_size` or less.
        image_size: side of the model's input.
        batch_size: pictures a step and process.
        num_workers: processes that read, once.
        limit: use only so many pictures of each split; None is all.
        scale: smallest and largest share of the area that a training crop takes.
        hflip: chance of a mirror image.
        jitter: greatest change of brightness, contrast and saturation.
        mixup: its alpha; 0 is off.
        cutmix: its alpha; 0 is off.
        mean: per-channel mean of the model's input.
        std: per-channel deviation.
    """

    def __init__(
        self,
        root: str,
        train_split: str = "train",
        val_splits: Sequence[str] = ("validation",),
        test_splits: Sequence[str] | None = None,
        num_classes: int = 10,
        stored: int = 224,
        image_size: int = 224,
        batch_size: int = 128,
        num_workers: int = 8,
        limit: int | None = None,
        scale: Sequence[float] = (0.35, 1.0),
        hflip: float = 0.5,
        jitter: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, value in (("stored", stored), ("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be 1 or larger")
        if stored > image_size:
            raise ConfigError(f"stored={stored}: must be at most image_size={image_size}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(f"scale={tuple(scale)}: must be two rising numbers in (0, 1]")
        self.tables: dict[str, Table] = {}
        self.mix: Mixup | None = None
        if mixup or cutmix:
            if batch_size % 2:
                raise ConfigError(f"batch_size={batch_size}: mixup and cutmix need an even number")
            self.mix = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes)

    def table(self, part: str) -> Table:
        """The pictures of `train`, `val` or `test`; read when first asked for.

        Raises:
            VistokenError: they cannot be read.
        """
        if part not in self.tables:
            given = self.hparams
            splits = {
                "train": [given["train_split"]],
                "val": given["val_splits"],
                "test": given["test_splits"] or given["val_splits"],
            }[part]
            options = (given["stored"], given["num_workers"], given["limit"])
            read = [read_images(given["root"], split, *options) for split in splits]
            images, labels = zip(*read, strict=True)
            self.tables[part] = torch.cat(images), torch.cat(labels)
        return self.tables[part]

    def _loader(self, part: str) -> DataLoader[int]:
        numbers = SceneNumbers(len(self.table(part)[0]))
        batch = self.hparams["batch_size"]
        if part != "train":
            return DataLoader(numbers, batch)
        world = 1 if self.trainer is None else self.trainer.world_size
        rank = 0 if self.trainer is None else self.trainer.global_rank
        if len(numbers) < batch * world:
            raise ConfigError(
                f"{len(numbers)} pictures do not fill one batch of {batch} in each of {world} "
                "processes"
            )
        order = ShareOrder(numbers, world, rank, drop_last=True)
        return self.resumable(ResumableLoader(numbers, order, batch))

    def train_dataloader(self) -> DataLoader[int]:
        """Shuffled numbers of training pictures."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[int]:
        """Numbers of the validation pictures in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[int]:
        """Numbers of the test pictures in order."""
        return self._loader("test")

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Table:
        """Pictures of the numbers `[B]`, on their device.

        Returns:
            Images `[B, 3, image_size, image_size]` float32 and classes `[B]`, or mixed shares
            `[B, classes]`.
        """
        trainer, given = self.trainer, self.hparams
        training = trainer is not None and trainer.training
        part = "train" if training else "test" if trainer is None or trainer.testing else "val"
        images, labels = self.table(part)
        if images.device != batch.device:
            images, labels = images.to(batch.device), labels.to(batch.device)
            self.tables[part] = images, labels
        images, labels = images[batch], labels[batch]
        look = (given["mean"], given["std"])
        if not training:
            return normalised(images, given["image_size"], *look), labels
        x = random_crops(images.float() / 255, given["image_size"], given["scale"], given["hflip"])
        if given["jitter"]:
            x = jittered(x, given["jitter"])
        x = standardised(x, *look)
        if self.mix is not None:
            x, labels = self.mix(x, labels)
        return x, labels
