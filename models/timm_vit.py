"""timm's plain vision transformers: ViT, DeiT, DeiT-III, AugReg, MAE, DINOv2, SigLIP, and EVA."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from vistoken.spec import BlockSpec, Readout


def readout(host: nn.Module) -> Readout:
    """From `attn_pool` and `global_pool`."""
    pool = getattr(host, "attn_pool", None)
    if pool is not None:
        # A pool with its own positions adds a table of fixed length to the tokens.
        return "grid" if getattr(pool, "pos_embed", None) is not None else "leave"
    kind = getattr(host, "global_pool", "token")
    if kind == "avg":
        return "weigh_all" if getattr(host, "pool_include_prefix", False) else "weigh"
    return "leave" if kind in ("token", "max") else "grid"


def refuse(host: nn.Module, attn: nn.Module) -> str | None:
    """Attention that does not call the fused kernel, or needs the whole grid."""
    if getattr(attn, "fused_attn", None) is False:
        return (
            "its attention runs unfused; call timm.layers.set_fused_attn(True) before building it"
        )
    if hasattr(attn, "lambda_init"):
        return "its attention subtracts two softmax maps (differential attention)"
    for table in ("relative_position_bias_table", "rel_pos"):
        if getattr(attn, table, None) is not None:
            return "its attention adds a relative position table over the whole grid"
    return None


VIT = BlockSpec(
    family="timm ViT",
    hosts=("timm.models.vision_transformer.VisionTransformer",),
    blocks="blocks",
    block_types=("timm.models.vision_transformer.Block",),
    enter="norm1",
    attn="attn",
    branch_in="norm2",
    branch_out="drop_path2",
    patch="patch_embed.proj",
    class_tokens=("cls_token", "dist_token"),
    registers=("reg_token",),
    exit="norm",
    pool=("attn_pool",),
    positions=None,
    masks=False,
    readout=readout,
    refuse=refuse,
)

POST_NORM = replace(
    VIT,
    family="timm post-norm ViT",
    block_types=("timm.models.vision_transformer.ResPostBlock",),
    enter="attn",
    branch_in="mlp",
)

EVA = replace(
    VIT,
    family="timm EVA",
    hosts=("timm.models.eva.Eva",),
    block_types=("timm.models.eva.EvaBlock",),
    class_tokens=("cls_token",),
    positions="rope",
)

EVA_POST_NORM = replace(
    EVA,
    family="timm post-norm EVA",
    block_types=("timm.models.eva.EvaBlockPostNorm",),
    enter="attn",
    branch_in="mlp",
)

ROWS = (VIT, POST_NORM, EVA, EVA_POST_NORM)
