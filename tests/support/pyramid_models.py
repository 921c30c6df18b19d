"""Small NAT, DiNAT and BiFormer models with weights that make every parameter count."""

from typing import Any

import timm
import torch
from torch import nn

import vistoken.models.biformer
import vistoken.models.dinat  # noqa: F401 (registers the models)
from vistoken.models.pyramid import Pyramid

NAT_TINY: dict[str, Any] = {
    "embed_dim": 32, "depths": (2, 1, 1), "kernel_size": 3, "num_classes": 5,
}  # fmt: skip
NATS: dict[str, dict[str, Any]] = {
    "nat_tiny": {**NAT_TINY, "layer_scale": 0.3},
    "dinat_tiny": {**NAT_TINY, "dilations": ((1, 3), (2,), (1,))},
    "dinat_s_tiny": {**NAT_TINY, "dilations": ((1, 3), (2,), (1,))},
    "dinat_isotropic_small": {
        **NAT_TINY,
        "depths": (3,),
        "dilations": ((1, 2, 1),),
        "patch_size": 8,
    },
}
BIFORMER_TINY: dict[str, Any] = {
    "embed_dims": (32, 64, 64), "depths": (1, 2, 1), "topks": (1, 2, None), "n_win": 3,
    "num_classes": 5,
}  # fmt: skip
PYRAMIDS: dict[str, dict[str, Any]] = {
    **NATS,
    "biformer_tiny": BIFORMER_TINY,
    "biformer_stl": BIFORMER_TINY,
}


def tiny(name: str, **more: Any) -> Pyramid:
    """A small model of a family, without stochastic depth unless asked for."""
    torch.manual_seed(0)
    model: Pyramid = timm.create_model(name, **{**PYRAMIDS[name], "drop_path_rate": 0.0, **more})
    for key, parameter in model.named_parameters():
        if "rpb" in key:
            nn.init.normal_(parameter)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in key and "weight" in key else 0.0, 0.3)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape))
    return model


def meta(name: str, **settings: Any) -> Pyramid:
    """A model of published size that holds no numbers."""
    with torch.device("meta"):
        model: Pyramid = timm.create_model(name, **settings)
    return model
