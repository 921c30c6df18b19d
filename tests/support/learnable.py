"""Small models whose counts can be learned, shaken so that every token matters."""

from __future__ import annotations

import timm
import torch
from torch import nn

MODELS = {
    "deit": (
        "deit_tiny_patch16_224",
        {"img_size": 80, "depth": 4, "embed_dim": 96, "num_heads": 3},
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 4}),
    "mae": (
        "vit_base_patch16_224",
        {"img_size": (48, 112), "depth": 5, "embed_dim": 64, "num_heads": 2, "global_pool": "avg"},
    ),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        {"img_size": 70, "depth": 4, "embed_dim": 64, "num_heads": 2},
    ),
    "rotary": ("eva02_tiny_patch14_224", {"img_size": 70, "depth": 4}),
}
"""With a class token: timm names and options."""
NO_CLASS = {
    "no class": (
        "vit_base_patch16_224",
        {"img_size": (48, 112), "depth": 4, "embed_dim": 64, "num_heads": 2, "global_pool": "avg",
         "class_token": False},
    ),
}  # fmt: skip


def build(key: str) -> nn.Module:
    name, options = {**MODELS, **NO_CLASS}[key]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.03))
    return model


def images_for(model: nn.Module, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size)
