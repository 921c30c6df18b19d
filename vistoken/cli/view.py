"""`vistoken view IMAGE --model NAME --method A`: a picture of the token regions.

With methods for vision-language models, NAME is a folder or hub name of transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistoken.cli.errors import guarded
from vistoken.errors import ConfigError
from vistoken.methods import parse
from vistoken.vlm.base import LanguageMethod

if TYPE_CHECKING:
    from torch import Tensor

    from vistoken.models.load import Classifier

DEFAULT_METHODS = ("tome:r=13", "evit:keep_rate=0.7")
SCENE = "reference:"


def make_parser() -> argparse.ArgumentParser:
    """The options of `vistoken view`."""
    parser = argparse.ArgumentParser(
        prog="vistoken view",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", help="an image file, or reference:17 for an embedded scene")
    add(
        "--model",
        default="reference",
        help="timm name, open_clip:NAME, hf:..., reference, or a VLM",
    )
    add("--pretrained", action="store_true", help="fetch the weights of a timm model")
    add("--checkpoint", default=None, help="local weights of a timm or open_clip model")
    add("--num_classes", type=int, default=None, help="classes of a timm model's own head")
    add("--image_size", type=int, default=None, help="side in pixels")
    add(
        "--method",
        action="append",
        help=f"repeatable, one row each; default: {', '.join(DEFAULT_METHODS)}",
    )
    add(
        "--blocks",
        type=int,
        nargs="+",
        default=None,
        help="blocks to show, 0 is the first; default: 3 6 9 11 of 12",
    )
    add("--prompt", default="What is in the picture?", help="question to a vision-language model")
    add("--out", type=Path, default=Path("tokens.png"), help="PNG to write")
    return parser


def run_view(options: argparse.Namespace, reference: Any = None) -> Path:
    """Draw one image under every method.

    Args:
        options: from `make_parser`.
        reference: builds the model called `reference`; None is the embedded one.

    Returns:
        The PNG's path.

    Raises:
        VistokenError: wrong options, an unsupported model, or an image that cannot be read.
    """
    from vistoken.eval.sources import reference_classifier
    from vistoken.models.load import load_classifier
    from vistoken.view.tokens import draw

    if options.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {options.out}: must end in .png")
    if not options.image.startswith(SCENE) and not Path(options.image).is_file():
        raise ConfigError(f"IMAGE {options.image}: there is no such file (or write reference:17)")
    methods = [parse(text) for text in options.method or ()]
    language = [isinstance(method, LanguageMethod) for method in methods]
    if any(language):
        if not all(language):
            raise ConfigError("--method: classifiers and vision-language models need a call each")
        from vistoken.cli.view_vlm import run_view_vlm

        return run_view_vlm(options, methods)
    classifier = load_classifier(
        options.model,
        options.pretrained,
        options.checkpoint,
        options.num_classes,
        image_size=options.image_size,
        class_names=("object",),
        reference=reference or reference_classifier,
    )
    image = load_image(options.image, classifier)
    path = draw(
        classifier.model,
        image,
        options.method or DEFAULT_METHODS,
        options.blocks,
        options.out,
        mean=classifier.mean,
        std=classifier.std,
        title=f"{classifier.name}, {Path(options.image).name}",
    )
    print(f"wrote {path}")
    return path


def load_image(name: str, classifier: Classifier) -> Tensor:
    """An image file or an embedded scene as the model takes it, `[3, H, W]`.

    Raises:
        ConfigError: no such scene, or a file that is no image.
    """
    from PIL import Image, UnidentifiedImageError

    if name.startswith(SCENE):
        return classifier.transform(scene(name.removeprefix(SCENE)))
    try:
        with Image.open(name) as picture:
            return classifier.transform(picture.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ConfigError(f"IMAGE {name}: Pillow cannot read it as an image") from error


def scene(number: str) -> Any:
    """An embedded scene as a PIL image.

    Raises:
        ConfigError: no such scene.
    """
    from PIL import Image

    from vistoken.eval.reference import ReferenceScenes
    from vistoken.eval.scenes import MEAN, STD
    from vistoken.view.tokens import to_pixels

    scenes = ReferenceScenes()
    if not number.isdigit() or int(number) >= len(scenes):
        raise ConfigError(
            f"IMAGE {SCENE}{number}: the scenes are {SCENE}0 to {SCENE}{len(scenes) - 1}"
        )
    return Image.fromarray(to_pixels(scenes[int(number)][0], MEAN, STD))


def main(args: Sequence[str] | None = None) -> int:
    """Draw a picture; returns the exit code: 0 ok, 1 failed, 2 wrong options."""
    options = make_parser().parse_args(list(sys.argv[1:] if args is None else args))
    return guarded(lambda: run_view(options))
