"""open_clip's own ViT towers (nn.MultiheadAttention). Its timm towers are timm models."""

from __future__ import annotations

from torch import nn

from vistoken.spec import BlockSpec, Readout


def readout(host: nn.Module) -> Readout:
    """Only the plain class token can be read from a short sequence."""
    short = getattr(host, "pool_type", "") == "tok" and getattr(host, "attn_pool", None) is None
    return "leave" if short and not getattr(host, "output_tokens", False) else "grid"


def refuse(host: nn.Module, attn: nn.Module) -> str | None:
    """Sequence-first towers of older releases."""
    if getattr(getattr(host, "transformer", None), "batch_first", True) is False:
        return "its transformer runs sequence first; build it with batch_first=True"
    return None


ROWS = (
    BlockSpec(
        family="open_clip ViT",
        hosts=("open_clip.transformer.VisionTransformer",),
        blocks="transformer.resblocks",
        block_types=("open_clip.transformer.ResidualAttentionBlock",),
        enter="ln_1",
        attn="attn",
        branch_in="ln_2",
        branch_out="ls_2",
        patch="conv1",
        class_tokens=("class_embedding",),
        registers=(),
        exit="transformer",
        pool=(),
        positions=None,
        masks=False,
        readout=readout,
        refuse=refuse,
    ),
)
