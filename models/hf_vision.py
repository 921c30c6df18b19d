"""transformers 5 vision encoders: ViT, DeiT, DINOv2 (with registers), CLIP and SigLIP."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from vistoken.spec import BlockSpec, Readout


def readout(host: nn.Module) -> Readout:
    """Heads inside the host read the class token or attend; its output object is expanded."""
    return "leave"


def refuse(host: nn.Module, attn: nn.Module) -> str | None:
    """Attention implementations that never call `F.scaled_dot_product_attention`."""
    config = getattr(host, "config", None)
    kind = getattr(config, "_attn_implementation", "sdpa")
    if kind != "sdpa":
        return f"it runs attn_implementation={kind!r}; load it with attn_implementation='sdpa'"
    return None


def _types(model: str, *names: str) -> tuple[str, ...]:
    return tuple(f"transformers.models.{model}.modeling_{model}.{name}" for name in names)


VIT = BlockSpec(
    family="transformers ViT",
    hosts=_types("vit", "ViTModel"),
    blocks="layers",
    block_types=_types("vit", "ViTLayer"),
    enter="layernorm_before",
    attn="attention",
    branch_in="layernorm_after",
    branch_out="dropout",
    patch="embeddings.patch_embeddings.projection",
    class_tokens=("embeddings.cls_token",),
    registers=(),
    exit="",
    pool=(),
    positions=None,
    masks=True,
    readout=readout,
    refuse=refuse,
)

DEIT = replace(
    VIT,
    family="transformers DeiT",
    hosts=_types("deit", "DeiTModel"),
    block_types=_types("deit", "DeiTLayer"),
    class_tokens=("embeddings.cls_token", "embeddings.distillation_token"),
)

DINOV2 = replace(
    VIT,
    family="transformers DINOv2",
    hosts=_types("dinov2", "Dinov2Model")
    + _types("dinov2_with_registers", "Dinov2WithRegistersModel"),
    blocks="encoder.layer",
    block_types=_types("dinov2", "Dinov2Layer")
    + _types("dinov2_with_registers", "Dinov2WithRegistersLayer"),
    enter="norm1",
    branch_in="norm2",
    branch_out="drop_path",
    registers=("embeddings.register_tokens",),
)

CLIP = replace(
    VIT,
    family="transformers CLIP",
    hosts=_types("clip", "CLIPVisionModel", "CLIPVisionTransformer"),
    blocks="encoder.layers",
    block_types=_types("clip", "CLIPEncoderLayer"),
    enter="layer_norm1",
    attn="self_attn",
    branch_in="layer_norm2",
    branch_out="mlp",
    patch="embeddings.patch_embedding",
    class_tokens=("embeddings.class_embedding",),
)

SIGLIP = replace(
    CLIP,
    family="transformers SigLIP",
    hosts=_types("siglip", "SiglipVisionModel", "SiglipVisionTransformer"),
    block_types=_types("siglip", "SiglipEncoderLayer"),
    class_tokens=(),
    pool=("head.attention",),
)

ROWS = (VIT, DEIT, DINOV2, CLIP, SIGLIP)
