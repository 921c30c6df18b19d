"""A prompt through the decoder: the layers' own weights, with fused passes between products.

    q, k, v = norm(x) W            x = x + o(attention(rotary(q), rotary(k), v))
    x = x + down(silu(gate(norm(x))) * up(norm(x)))

The modules of transformers spend a fifth of a prompt's time in small passes over activations; here
a norm, rotary with the cache write, and the gate are one pass each, and a residual rides on its
product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.prefill import rotate_and_store, silu_times
from vistoken.vlm.decode_layers import Parts


def prefill_layers(
    parts: Parts, embeds: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The last layer's output `[B, L, C]`, before the final norm; fills the caches.

    Args:
        parts: a model whose layers the decoding chain knows.
        embeds: `[B, L, C]`, left as they are.
        positions: `[B, L]`.
        keys: caches `[layers, B, G, M, D]`, M at least L.
        values: the same.
    """
    x = embeds.clone()
    cos, sin = (t.expand(len(x), -1, -1).contiguous() for t in rotary(parts, x, positions))
    for layer, k, v in zip(parts.decoder.layers, keys, values, strict=True):
        x = prefill_layer(layer, x, cos, sin, k, v)
    return x


def rotary(parts: Parts, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables `[B, L, D]`, halves repeated."""
    cos, sin = parts.decoder.rotary_emb(x, positions)
    return cos, sin


def prefill_layer(
    layer: Any, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """One decoder layer on x `[B, L, C]`, which it overwrites; fills `[B, G, M, D]` caches."""
    own, mlp = layer.self_attn, layer.mlp
    batch, length, _ = x.shape
    h = _normed(x, layer.input_layernorm)
    dim = keys.shape[-1]
    q, k, v = (p(h).view(batch, length, -1, dim) for p in (own.q_proj, own.k_proj, own.v_proj))
    rotate_and_store(q, k, v, cos, sin, keys, values)
    a = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys[:, :, :length], values[:, :, :length], is_causal=True,
        scale=own.scaling, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    x = _add_product(x, a.transpose(1, 2).reshape(batch, length, -1), own.o_proj)
    h = _normed(x, layer.post_attention_layernorm)
    h = silu_times(mlp.gate_proj(h), mlp.up_proj(h))
    return _add_product(x, h, mlp.down_proj)


def _normed(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _add_product(x: Tensor, h: Tensor, linear: torch.nn.Linear) -> Tensor:
    """The sum of x and a linear layer of h, in place of x."""
    flat = x.view(-1, x.shape[-1])
    flat.addmm_(h.view(-1, h.shape[-1]), linear.weight.t())
    if linear.bias is not None:
        flat += linear.bias
    return x
