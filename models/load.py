"""Classifiers by name: timm, open_clip (zero-shot), transformers, or the embedded reference."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.errors import ConfigError, VistokenError

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Classifier:
    """A model that names images, with what it expects of them.

    Attributes:
        name: what `load_classifier` was asked for.
        model: images `[B, 3, H, W]` to logits `[B, classes]`, in eval mode; what to wrap.
        transform: a PIL image to a normalised tensor `[3, H, W]`.
        num_classes: length of a row of logits.
        image_size: (height, width) in pixels.
        mean: per-channel mean that `transform` subtracts, in 0..1.
        std: per-channel deviation that `transform` divides by.
    """

    name: str
    model: nn.Module
    transform: Callable[[Any], Tensor]
    num_classes: int
    image_size: tuple[int, int]
    mean: Colour
    std: Colour

    def logits(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of normalised images `[B, 3, H, W]`, without gradient."""
        with torch.inference_mode():
            logits: Tensor = self.model(images)
        return logits


Reference = Callable[[], Classifier]


def load_classifier(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    *,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    reference: Reference | None = None,
) -> Classifier:
    """Build a classifier.

    Args:
        name: a timm name (`deit_small_patch16_224`, with or without a weight tag);
            `open_clip:ViT-B-32` or `open_clip:ViT-B-32/laion2b_s34b_b79k`, zero-shot from
            `class_names`; `hf:` and a local folder or hub id of transformers; or `reference`.
        pretrained: fetch a timm model's weights; without it and `checkpoint` they are random.
        checkpoint: local weights of a timm, open_clip or reference model, instead of fetched ones.
        num_classes: classes of a timm model that is built with a head of its own.
        image_size: side in pixels; None is the model's own.
        class_names: names that open_clip's text tower turns into the zero-shot classifier.
        reference: builds the classifier called `reference`.

    Returns:
        The classifier on the CPU, in float32 and eval mode.

    Raises:
        ConfigError: an unknown name, or options that this kind of model does not have.
        VistokenError: the weights could not be read or fetched.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ConfigError(f"checkpoint={str(checkpoint)!r}: there is no such file")
    kind, _, rest = name.partition(":")
    if name == "reference":
        return _reference(reference, checkpoint, num_classes, image_size)
    if kind == "open_clip":
        if num_classes is not None:
            raise ConfigError(f"model={name!r}: its classes come from class names, not a number")
        return _open_clip(name, rest, pretrained, checkpoint, class_names, image_size)
    if kind == "hf":
        return _transformers(name, rest, checkpoint, num_classes, image_size)
    return _timm(name, pretrained, checkpoint, num_classes, image_size)


def _reference(
    build: Reference | None,
    checkpoint: str | Path | None,
    num_classes: int | None,
    image_size: int | None,
) -> Classifier:
    """The embedded model, which has no options."""
    given = {"checkpoint": checkpoint, "num_classes": num_classes, "image_size": image_size}
    wrong = [key for key, value in given.items() if value is not None]
    if wrong:
        raise ConfigError(
            f"the reference model has no option {', '.join(wrong)}; name a timm model to use it"
        )
    if build is None:
        raise ConfigError("'reference' is known to vistoken.eval only; name another model here")
    return build()


def _timm(
    name: str,
    pretrained: bool,
    checkpoint: str | Path | None,
    num_classes: int | None,
    image_size: int | None,
) -> Classifier:
    """A timm model with the transform of its weights."""
    import timm
    from timm.data import create_transform, resolve_data_config

    import_module("vistoken.models.dinat")  # registers our own models with timm

    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() shows all"
        raise ConfigError(f"model={name!r}: timm has no model of this name; {hint}")
    options: dict[str, Any] = {"num_classes": num_classes, "img_size": image_size}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        model = timm.create_model(name, pretrained, checkpoint_path=checkpoint, **options)
    except TypeError as error:
        raise ConfigError(f"model={name!r} does not take {sorted(options)}: {error}") from error
    except Exception as error:
        raise _failed(name, checkpoint, error) from error
    size = {} if image_size is None else {"input_size": (3, image_size, image_size)}
    data = resolve_data_config(size, model=model)
    return Classifier(
        name=name,
        model=model.eval(),
        transform=create_transform(**data, is_training=False),
        num_classes=model.num_classes,
        image_size=tuple(data["input_size"][1:]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


class ZeroShot(nn.Module):
    """A CLIP model as a classifier: image features against one text feature per class.

    Args:
        clip: an open_clip model.
        weights: text features `[D, classes]` of unit length.
    """

    weights: Tensor

    def __init__(self, clip: nn.Module, weights: Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("weights", weights)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of images `[B, 3, H, W]`."""
        clip: Any = self.clip
        features: Tensor = clip.encode_image(images, normalize=True)
        logits = clip.logit_scale.exp() * features @ self.weights.to(features.dtype)
        bias = getattr(clip, "logit_bias", None)
        return logits if bias is None else logits + bias  # type: ignore[no-any-return]


def _open_clip(
    name: str,
    spec: str,
    pretrained: bool,
    checkpoint: str | Path | None,
    class_names: Sequence[str] | None,
    image_size: int | None,
) -> Classifier:
    """An open_clip model and its zero-shot classifier, built once."""
    import open_clip

    whole = spec.startswith(("hf-hub:", "local-dir:"))
    architecture, _, tag = (spec, "", "") if whole else spec.partition("/")
    if not whole:
        _check_open_clip(name, architecture, tag, pretrained and checkpoint is None)
    if not class_names:
        raise ConfigError(
            f"model={name!r} is zero-shot: it needs class names (--class_names FILE with one name "
            "a line, or 'imagenet'; image folders bring their own)"
        )
    source = str(checkpoint) if checkpoint is not None else tag or None
    try:
        clip, _, transform = open_clip.create_model_and_transforms(
            architecture, pretrained=source, force_image_size=image_size
        )
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:
        raise _failed(name, checkpoint, error) from error
    clip.eval()
    weights = open_clip.build_zero_shot_classifier(
        clip, tokenizer, list(class_names), _templates(class_names)
    )
    size = clip.visual.image_size
    return Classifier(
        name=name,
        model=ZeroShot(clip, weights).eval(),
        transform=transform,
        num_classes=len(class_names),
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(clip.visual.image_mean),
        std=tuple(clip.visual.image_std),
    )


def _check_open_clip(name: str, architecture: str, tag: str, wants_tag: bool) -> None:
    """Raise for an unknown architecture or weight tag, naming the known ones."""
    import open_clip

    models = open_clip.list_models()
    if architecture not in models:
        near = difflib.get_close_matches(architecture, models, n=3) or models[:3]
        raise ConfigError(
            f"model={name!r}: open_clip has no {architecture!r}; near it: {', '.join(near)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if (tag and tag not in tags) or (wants_tag and not tag):
        raise ConfigError(
            f"model={name!r}: write open_clip:{architecture}/TAG with one of {', '.join(tags)}"
        )


def _templates(class_names: Sequence[str]) -> Sequence[Callable[[str], str]]:
    """CLIP's 80 prompts for ImageNet, its 7 general ones for any other set of classes."""
    import open_clip

    imagenet = list(class_names) == list(open_clip.IMAGENET_CLASSNAMES)
    chosen: Sequence[Callable[[str], str]] = (
        open_clip.OPENAI_IMAGENET_TEMPLATES if imagenet else open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    return chosen


class LogitsOnly(nn.Module):
    """A transformers classifier that returns plain logits.

    Args:
        net: a model of `AutoModelForImageClassification`.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of images `[B, 3, H, W]`."""
        logits: Tensor = self.net(pixel_values=images).logits
        return logits


@dataclass(frozen=True)
class ProcessorTransform:
    """A transformers image processor as a transform of one image."""

    processor: Any

    def __call__(self, image: Any) -> Tensor:
        """A PIL image to a normalised tensor `[3, H, W]`."""
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels


def _transformers(
    name: str,
    source: str,
    checkpoint: str | Path | None,
    num_classes: int | None,
    image_size: int | None,
) -> Classifier:
    """A transformers classifier and its image processor, from a folder or the hub."""
    given = {"checkpoint": checkpoint, "num_classes": num_classes, "image_size": image_size}
    wrong = [key for key, value in given.items() if value is not None]
    if wrong or not source:
        raise ConfigError(
            f"model={name!r}: write hf: and a folder or hub id; weights, classes and image size "
            f"come from there{', not from ' + ', '.join(wrong) if wrong else ''}"
        )
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        net = AutoModelForImageClassification.from_pretrained(source, attn_implementation="sdpa")
        processor = AutoImageProcessor.from_pretrained(source)
    except Exception as error:
        raise _failed(name, None, error) from error
    size = getattr(processor, "crop_size", None) or processor.size
    height, width = (size.get(key, size.get("shortest_edge")) for key in ("height", "width"))
    return Classifier(
        name=name,
        model=LogitsOnly(net.float()).eval(),
        transform=ProcessorTransform(processor),
        num_classes=net.config.num_labels,
        image_size=(int(height), int(width)),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )


def _failed(name: str, checkpoint: str | Path | None, error: Exception) -> VistokenError:
    """The error for weights that could not be had."""
    source = f"from {checkpoint} " if checkpoint is not None else ""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:300] + " ..."
    advice = (
        "the file must hold weights of this architecture (and number of classes)"
        if checkpoint is not None
        else "without a network, pass local weights with --checkpoint, or hf:FOLDER"
    )
    return VistokenError(
        f"model={name!r} could not be loaded {source}({type(error).__name__}: {text}); {advice}"
    )
