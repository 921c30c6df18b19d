"""Published BiFormer checkpoints in the key layout of `vistoken.models.biformer`.

Three layouts exist: BiFormer-T/S/B, BiFormer-STL (stages hold `blocks`), and its `nchw` form, whose
linear layers are 1 x 1 convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

RENAMED = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
        (r"\.attn\.qkv_linear\.", ".attn.qkv."),
        (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.[23]\.", ".mlp.fc2."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
)
LINEAR = re.compile(r"\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight$")


def convert(state: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names.

    Args:
        state: one of the published layouts or our own, or a file's content that holds it under
            `state_dict` or `model`.
        model: not used; timm hands it over.
    """
    for outer in ("state_dict", "model"):
        if isinstance(state.get(outer), Mapping):
            state = state[outer]
    found = {}
    for key, value in state.items():
        for pattern, new in RENAMED:
            key = pattern.sub(new, key)
        found[key] = value.flatten(1) if LINEAR.search(key) else value
    return found
