"""Published NAT and DiNAT checkpoints in the key layout of `vistoken.models.nat`.

Three layouts exist: the authors' files of NAT and DiNAT (ours, but for the head), those of DiNAT_s
and the isotropic models (`layers` for levels or blocks), and the transformers port (queries, keys
and values apart).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RENAMED = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        # transformers
        (r"^(nat|dinat)\.", ""),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.", r"levels.\1.blocks.\2."),
        (r"^encoder\.levels\.", "levels."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.self\.(rpb|query|key|value)", r".attn.\1"),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head.fc."),
        # the authors' files
        (r"^layers\.(\d+)\.(blocks|downsample)\.", r"levels.\1.\2."),
        (r"^layers\.(\d+)\.", r"levels.0.blocks.\1."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
)
QUERY = re.compile(r"\.attn\.query\.(weight|bias)$")


def convert(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names that `model` has.

    Args:
        state: one of the published layouts or our own, or a file's content that holds it under
            `state_dict` or `model`.
        model: a model of `vistoken.models.nat`; position biases that were trained with another
            window are interpolated to its own, bicubically as the authors did.
    """
    for outer in ("state_dict", "model"):
        if isinstance(state.get(outer), Mapping):
            state = state[outer]
    named = {rename(key): value for key, value in state.items()}
    named = {k: v for k, v in named.items() if not k.endswith("relative_position_index")}
    found: dict[str, Tensor] = {}
    for key, value in named.items():
        if QUERY.search(key):
            parts = (key.replace(".query.", f".{part}.") for part in ("query", "key", "value"))
            found[key.replace(".query.", ".qkv.")] = torch.cat([named[part] for part in parts])
        elif key.endswith(".layer_scale_parameters"):
            stem = key.removesuffix("layer_scale_parameters")
            found[f"{stem}gamma1"], found[f"{stem}gamma2"] = value.unbind()
        elif not re.search(r"\.attn\.(key|value)\.", key):
            found[key] = value
    own = dict(model.named_parameters())
    for key, value in found.items():
        if key.endswith(".rpb") and key in own and own[key].shape != value.shape:
            found[key] = resize_bias(value, own[key].shape[-2:])
    return found


def rename(key: str) -> str:
    """Our name of a published key."""
    for pattern, new in RENAMED:
        key = pattern.sub(new, key)
    return key


def resize_bias(rpb: Tensor, size: torch.Size) -> Tensor:
    """A relative position bias `[H, h, w]` for windows of another size."""
    resized = F.interpolate(rpb[None].float(), size=tuple(size), mode="bicubic")
    return resized[0].to(rpb.dtype)
