"""The classifier whose counts are learned: built by name, and its parameters in groups."""

from __future__ import annotations

from typing import Any

import timm
from timm.optim import param_groups_layer_decay
from torch import nn

from vistoken.errors import ConfigError, VistokenError
from vistoken.eval.reference import load_reference_model


def make_backbone(
    name: str,
    pretrained: bool = False,
    checkpoint: str | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a classifier in eval mode.

    Args:
        name: `reference` for the embedded model, or a timm name with or without weight tag.
        pretrained: fetch timm's weights.
        checkpoint: local weights of a timm model.
        num_classes: classes, where they differ from those of the weights.
        options: further arguments of `timm.create_model`.

    Raises:
        ConfigError: an unknown name, or options for the embedded model.
        VistokenError: timm cannot build it.
    """
    if name == "reference":
        if pretrained or checkpoint or num_classes not in (None, 10) or any(options.values()):
            raise ConfigError("model_name='reference' is the embedded model and has no options")
        return load_reference_model()
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        raise ConfigError(f"model_name={name!r}: neither 'reference' nor a name that timm knows")
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        model: nn.Module = timm.create_model(
            name, pretrained, checkpoint_path=checkpoint, **options
        )
    except Exception as error:
        raise VistokenError(f"timm could not build {name!r}: {error}") from error
    return model.eval()


def layer_groups(model: nn.Module, lr: float, weight_decay: float, decay: float) -> Any:
    """Parameter groups whose learning rate falls by `decay` a layer from the head down.

    Vectors, position embeddings and class tokens do not decay (BEiT, Bao et al., ICLR 2022).
    """
    skip: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_layer_decay(
        model, weight_decay=weight_decay, no_weight_decay_list=skip, layer_decay=decay
    )
    return [
        {
            "params": group["params"],
            "weight_decay": group["weight_decay"],
            "lr": lr * group["lr_scale"],
        }
        for group in groups
    ]
