"""Vision-language models of transformers 5: where tower, packer and decoder layers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from vistoken.errors import UnsupportedBackboneError
from vistoken.spec import class_path, lookup


@dataclass(frozen=True)
class VLMSpec:
    """One family of vision-language models, as data. Paths start at the model without head.

    Attributes:
        family: name in messages.
        tops: full class names of the models that generate.
        tower: the vision tower.
        layers: the tower's blocks, path in the tower; each holds `self_attn.{q,k}_proj`.
        packing: how features become the prompt's image tokens: `none` (one partition, raster),
            `anyres` (thumbnail, mosaic of crops, newlines) or `tiles` (an image may be several
            equal tiles, each packed alone).
        class_token: whether the tower's patches line up with a class token's attention.
        rotary_3d: whether positions are `[3 or 4, B, L]`.
        decoder: the language model's layers.
    """

    family: str
    tops: tuple[str, ...]
    tower: str
    layers: str
    packing: Literal["none", "anyres", "tiles"]
    class_token: bool = True
    rotary_3d: bool = False
    decoder: str = "language_model.layers"


def _tops(model: str, name: str) -> tuple[str, ...]:
    return (f"transformers.models.{model}.modeling_{model}.{name}ForConditionalGeneration",)


LLAVA = VLMSpec("LLaVA", _tops("llava", "Llava"), "vision_tower", "encoder.layers", "none")
LLAVA_NEXT = VLMSpec(
    "LLaVA-NeXT", _tops("llava_next", "LlavaNext"), "vision_tower", "encoder.layers", "anyres"
)
LLAVA_ONEVISION = VLMSpec(
    "LLaVA-OneVision",
    _tops("llava_onevision", "LlavaOnevision"),
    "vision_tower",
    "encoder.layers",
    "anyres",
    class_token=False,
)
QWEN2_5_VL = VLMSpec(
    "Qwen2.5-VL",
    _tops("qwen2_5_vl", "Qwen2_5_VL"),
    "visual",
    "blocks",
    "none",
    class_token=False,
    rotary_3d=True,
)
INTERNVL = VLMSpec(
    "InternVL", _tops("internvl", "InternVL"), "vision_tower", "encoder.layer", "tiles", False
)

ROWS = (LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_5_VL, INTERNVL)


@dataclass(frozen=True)
class LanguageHost:
    """A vision-language model with its parts.

    Attributes:
        spec: the family's row.
        top: the model that generates.
        base: the model without head, which encodes images.
        tower: the vision tower.
        blocks: the tower's blocks.
        decoder: the language model's layers.
        class_token: whether class rows line up with the image tokens of this very model.
        consumed: index of the tower block whose output the projector reads (the last, for lists).
    """

    spec: VLMSpec
    top: nn.Module
    base: nn.Module
    tower: nn.Module
    blocks: tuple[nn.Module, ...]
    decoder: tuple[nn.Module, ...]
    class_token: bool
    consumed: int


def find_language(model: nn.Module) -> LanguageHost:
    """The vision-language model in `model`.

    Raises:
        UnsupportedBackboneError: there is none of a known family; lists the families.
    """
    for row in ROWS:
        for module in model.modules():
            if class_path(type(module)) in row.tops:
                return _parts(row, module)
    names = ", ".join(row.family for row in ROWS)
    raise UnsupportedBackboneError(
        f"model={class_path(type(model))}: no vision-language model of a known family ({names}); "
        "pass the transformers model that has generate()"
    )


def _parts(row: VLMSpec, top: nn.Module) -> LanguageHost:
    """The parts of one model of the family."""
    base = lookup(top, "model")
    assert isinstance(base, nn.Module)
    tower = lookup(base, row.tower)
    blocks, decoder = lookup(tower, row.layers) if isinstance(tower, nn.Module) else None, None
    if isinstance(tower, nn.Module) and blocks is None:  # towers that wrap the encoder once more
        blocks = lookup(tower, f"vision_model.{row.layers}")
    decoder = lookup(base, row.decoder)
    if not isinstance(tower, nn.Module) or not isinstance(decoder, nn.ModuleList):
        raise UnsupportedBackboneError(
            f"{class_path(type(top))}: expected modules at {row.tower!r} and {row.decoder!r}"
        )
    config = getattr(top, "config", None)
    layer = getattr(config, "vision_feature_layer", -1)
    layer = layer[-1] if isinstance(layer, (list, tuple)) else layer
    found = tuple(blocks) if isinstance(blocks, nn.ModuleList) else ()
    consumed = layer - 1 if layer >= 0 else len(found) + layer
    embeddings = lookup(tower, "embeddings") or lookup(tower, "vision_model.embeddings")
    classes = hasattr(embeddings, "class_embedding")
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    class_token = row.class_token and classes and bool(found) and strategy == "default"
    return LanguageHost(row, top, base, tower, found, tuple(decoder), class_token, consumed)
