"""`vistoken view` for vision-language models: what of a picture a method keeps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vistoken.cli.errors import loading
from vistoken.errors import ConfigError


def run_view_vlm(options: argparse.Namespace, methods: Sequence[Any]) -> Path:
    """Draw one picture under methods for vision-language models.

    Args:
        options: of `vistoken view`.
        methods: the parsed methods.

    Returns:
        The PNG's path.

    Raises:
        VistokenError: wrong options, an unsupported model, or an image that cannot be read.
    """
    from vistoken.models.llava import find_language
    from vistoken.view.images import draw_images

    check(options, methods)
    picture = open_picture(options.image)
    model, processor = load(options.model)
    find_language(model)
    inputs = make_inputs(processor, picture, options.prompt)
    inputs = inputs.to(model.device, model.dtype)
    settings = processor.image_processor
    path = draw_images(
        model,
        dict(inputs),
        picture,
        methods,
        options.out,
        mean=settings.image_mean,
        std=settings.image_std,
        title=f"{Path(options.model).name}, {Path(options.image).name}",
    )
    print(f"wrote {path}")
    return path


def check(options: argparse.Namespace, methods: Sequence[Any]) -> None:
    """Raise `ConfigError` for options of image classifiers."""
    if options.model == "reference":
        raise ConfigError(
            f"--method {methods[0].name} is for vision-language models: give --model a folder or "
            "hub name of one"
        )
    for name in ("pretrained", "checkpoint", "num_classes", "image_size", "blocks"):
        if getattr(options, name) not in (None, False):
            raise ConfigError(f"--{name}: no option for vision-language models")


def open_picture(name: str) -> Any:
    """A PIL image in RGB.

    Raises:
        ConfigError: a file that is no image.
    """
    from PIL import Image, UnidentifiedImageError

    from vistoken.cli.view import SCENE, scene

    if name.startswith(SCENE):
        return scene(name.removeprefix(SCENE))
    try:
        with Image.open(name) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError as error:
        raise ConfigError(f"IMAGE {name}: Pillow cannot read it as an image") from error


def load(name: str) -> tuple[Any, Any]:
    """A vision-language model in eval mode and its processor.

    Raises:
        ConfigError: transformers finds none.
        UnsupportedBackboneError: a model of another kind.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with loading(name):
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        processor = AutoProcessor.from_pretrained(name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def make_inputs(processor: Any, picture: Any, prompt: str) -> Any:
    """What the processor makes of a picture and a question, by its chat template if it has one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    else:
        text = f"{processor.image_token}\n{prompt}"
    return processor(images=picture, text=text, return_tensors="pt")
