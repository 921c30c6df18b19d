"""timm models run block by block with explicit attention; see `naive`."""

from __future__ import annotations

import torch
from naive import Reducer, Tokens, Trail, attend, join_heads, run_blocks, split_heads
from torch import Tensor, nn


class TimmBlock:
    """One block of a timm ViT or EVA, before or after norm."""

    def __init__(self, block: nn.Module, rope: Tensor | None, mask: Tensor | None = None) -> None:
        self.block = block
        self.mask = mask
        self.rope = rope
        self.post = type(block).__name__ in ("ResPostBlock", "EvaBlockPostNorm")

    def scaled(self, x: Tensor, number: int) -> Tensor:
        gamma = getattr(self.block, f"gamma_{number}", None)
        scale = getattr(self.block, f"ls{number}", None)
        if gamma is not None:
            return x * gamma
        return x * scale.gamma if hasattr(scale, "gamma") else x

    def attention(self, tokens: Tokens, bias: Tensor | None):
        block, attn = self.block, self.block.attn
        h = tokens.x if self.post else block.norm1(tokens.x)
        q, k, v = qkv(attn, h)
        if self.rope is not None:
            table = rope_at(self.rope, tokens)
            q, k = (rotated(t, table, tokens.prefix, attn) for t in (q, k))
        scale = q.shape[-1] ** -0.5
        if self.mask is not None:
            living = torch.stack([self.mask[own][:, own] for own in tokens.origin])[:, None]
            bias = living if bias is None else bias + living
        out = attn.norm(join_heads(attend(q, k, scale, bias) @ v))
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(h).sigmoid()
        out = attn.proj(out)
        return block.norm1(out) if self.post else self.scaled(out, 1), q, k, scale

    def mlp(self, x: Tensor) -> Tensor:
        if self.post:
            return self.block.norm2(self.block.mlp(x))
        return self.scaled(self.block.mlp(self.block.norm2(x)), 2)


def qkv(attn: nn.Module, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if getattr(attn, "qkv", None) is not None:
        y = h @ attn.qkv.weight.T
        if attn.qkv.bias is not None:
            y = y + attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            y = y + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        parts = y.chunk(3, -1)
    else:
        parts = (attn.q_proj(h), attn.k_proj(h), attn.v_proj(h))
    q, k, v = (split_heads(part, attn.num_heads) for part in parts)
    return attn.q_norm(q), attn.k_norm(k), v


def rope_at(table: Tensor, tokens: Tokens) -> Tensor:
    """Tables `[N, D]` or `[H, N, D]` at every image's kept patches, `[B, 1 or H, n, D]`."""
    patches = tokens.origin[:, tokens.prefix :] - tokens.prefix
    if table.dim() == 2:
        table = table[None]
    return torch.stack([table[:, index] for index in patches])


def rotated(x: Tensor, table: Tensor, prefix: int, attn: nn.Module) -> Tensor:
    sin, cos = table.chunk(2, -1)
    y = x[:, :, prefix:]
    if getattr(attn, "rotate_half", False):
        first, second = y.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)
    return torch.cat([x[:, :, :prefix], y * cos + turned * sin], 2)


def blocks_of(
    model: nn.Module, image: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, list[TimmBlock]]:
    """The tokens that enter block 0, and the blocks."""
    x = model.patch_embed(image)
    found = model._pos_embed(x)
    x, rope = found if isinstance(found, tuple) else (found, None)
    x = model.norm_pre(x)
    tables = rope if getattr(model, "rope_mixed", False) else [rope] * len(model.blocks)
    return x, [TimmBlock(b, t, mask) for b, t in zip(model.blocks, tables, strict=True)]


def timm_trail(
    model: nn.Module, image: Tensor, reducer: Reducer, mask: Tensor | None = None
) -> Trail:
    """The tokens of every block; `mask` `[N0, N0]` is added to the attention scores."""
    with torch.no_grad():
        x, blocks = blocks_of(model, image, mask)
        return run_blocks(x, model.num_prefix_tokens, blocks, reducer)


def timm_head(model: nn.Module, tokens: Tokens) -> Tensor:
    """Logits of the tokens that leave the last block; every token counts by its size."""
    with torch.no_grad():
        x, size = model.norm(tokens.x), tokens.size
        if hasattr(model, "head_dist"):
            return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
        first = 0 if getattr(model, "pool_include_prefix", False) else tokens.prefix
        if model.attn_pool is not None:
            first = 0 if type(model).__name__ == "Eva" else first
            pooled = latent_pool(model.attn_pool, x[:, first:], size[:, first:])
        elif model.global_pool == "avg":
            weight = size[:, first:, None]
            pooled = (weight * x[:, first:]).sum(1) / weight.sum(1)
        else:
            pooled = x[:, 0]
        return model.head(model.fc_norm(pooled))


def latent_pool(pool: nn.Module, x: Tensor, size: Tensor) -> Tensor:
    heads = pool.num_heads
    q = pool.q_norm(split_heads(pool.q(pool.latent.expand(x.shape[0], -1, -1)), heads))
    k, v = (split_heads(part, heads) for part in pool.kv(x).chunk(2, -1))
    weights = attend(q, pool.k_norm(k), q.shape[-1] ** -0.5, size.log()[:, None, None])
    out = pool.proj(join_heads(weights @ v))
    return (out + pool.mlp(pool.norm(out)))[:, 0]
