"""What a plain pre-norm block of timm consists of, and whether anyone has changed it since.

The fused chain computes what these modules compute without calling them, so each of them must be of
a known class, and nobody may have hung a hook on it or given it another `forward`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vistoken.spec import class_path, lookup

BLOCK = "timm.models.vision_transformer.Block"
IDENTITY = "torch.nn.modules.linear.Identity"
DROP = ("torch.nn.modules.dropout.Dropout", "timm.layers.drop.DropPath", IDENTITY)
DROPS = ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2", "drop_path1", "drop_path2")
PARTS = {
    "norm1": ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"),
    "attn": ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"),
    "attn.qkv": ("torch.nn.modules.linear.Linear",),
    "attn.proj": ("torch.nn.modules.linear.Linear",),
    "norm2": ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"),
    "mlp": ("timm.layers.mlp.Mlp",),
    "mlp.fc1": ("torch.nn.modules.linear.Linear",),
    "mlp.fc2": ("torch.nn.modules.linear.Linear",),
    "mlp.act": ("torch.nn.modules.activation.GELU", "timm.layers.activations.GELU"),
    **dict.fromkeys(("attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm"), (IDENTITY,)),
    **dict.fromkeys(("ls1", "ls2"), (IDENTITY, "timm.layers.layer_scale.LayerScale")),
    **dict.fromkeys(DROPS, DROP),
}
"""Classes that the chain reproduces, by module path in a block."""
OPTIONAL = ("attn.norm", "ls1", "ls2")


def why_not(block: Any) -> str | None:
    """The reason why a block is not one that the chain reproduces, or None."""
    if class_path(type(block)) != BLOCK:
        return f"its blocks are {class_path(type(block))}"
    for path, allowed in PARTS.items():
        part = lookup(block, path)
        if part is None and path in OPTIONAL:
            continue
        if not isinstance(part, nn.Module):
            return f"a block has no module '{path}'"
        if class_path(type(part)) not in allowed:
            return f"'{path}' of a block is {class_path(type(part))}"
        if "forward" in part.__dict__:
            return f"'{path}' of a block has a forward of its own"
        if path in DROPS and part.training and class_path(type(part)) != IDENTITY:
            return f"'{path}' of a block is in training mode"
    if any(norm.weight is None or norm.bias is None for norm in (block.norm1, block.norm2)):
        return "its norms have no weight and bias"
    if getattr(block.attn, "gate", None) is not None:
        return "its attention is gated"
    if getattr(block.mlp.act, "approximate", "none") != "none":
        return "its GELU is approximate already"
    return None


class Watch:
    """Whether a block's parts still are what the chain reproduces.

    Layers can be exchanged and hooks added after wrap, so this looks at every call; the inspection
    itself is repeated only where something changed.
    """

    def __init__(self) -> None:
        self.places: list[tuple[dict[str, Any], str]] = []
        self.seen: tuple[list[Any], list[Any]] | None = None
        self.untouched = False

    def __getstate__(self) -> dict[str, Any]:
        return {"places": [], "seen": None, "untouched": False}

    def intact(self, block: nn.Module) -> bool:
        """Whether all parts of the block are of the known kind and nobody listens in."""
        parts = [modules.get(name) for modules, name in self.places]
        if not parts or (parts, marks(parts)) != self.seen:
            self.places = [_place(block, path) for path in PARTS]
            parts = [modules.get(name) for modules, name in self.places]
            self.seen = (parts, marks(parts))
            self.untouched = why_not(block) is None and not any(map(is_watched, parts))
        return self.untouched


def marks(parts: list[Any]) -> list[Any]:
    """What tells that a module was changed in place: hooks (torch numbers each), forward, mode."""
    return [
        mark
        for part in parts
        if part is not None
        for mark in (
            *part._forward_pre_hooks,
            *part._forward_hooks,
            part.training,
            "forward" in part.__dict__,
        )
    ]


def is_watched(part: nn.Module | None) -> bool:
    """Whether someone else's forward hook sits on a module."""
    if part is None or not (part._forward_hooks or part._forward_pre_hooks):
        return False
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return any(type(hook).__module__ != "vistoken.hooks" for hook in hooks)


def _place(owner: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """Where a module of a block is kept: the parent's table of modules, and the name in it."""
    parent, _, name = path.rpartition(".")
    found = lookup(owner, parent)
    return (found._modules if isinstance(found, nn.Module) else {}), name
