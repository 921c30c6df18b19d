"""Attention of a few tokens of the prompt at O(L) cost, from projections the host computes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.errors import UnsupportedMethodError
from vistoken.spec import class_path

ROWS = 32
"""Rows of attention, all heads of each, that are held at once."""


@torch.no_grad()
def last_row(
    attn: nn.Module,
    query: Tensor,
    keys: Tensor,
    rotary: tuple[Tensor, Tensor],
    last: Tensor,
    valid: Tensor | None,
) -> Tensor:
    """Attention `[B, L]` that one token of every row pays, averaged over heads, fp32.

    Args:
        attn: the host's attention module.
        query: output of its query projection at that token `[B, 1, H d]`.
        keys: output of its key projection `[B, L, h d]`.
        rotary: cosines and sines `[B or 1, L, d]`.
        last: that token's place in every row `[B]`.
        valid: True at real tokens `[B, L]`, or None.
    """
    q, k = _turned(attn, query, keys, rotary, last[:, None])
    return _rows(q, k, last[:, None], valid)[:, 0]


@torch.no_grad()
def text_rows(
    attn: nn.Module,
    query: Tensor,
    keys: Tensor,
    rotary: tuple[Tensor, Tensor],
    at: Tensor,
    real: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sum and maximum `[B, L]` of the attention that several tokens pay, heads averaged, fp32.

    Args:
        attn: the host's attention module.
        query: output of its query projection at those tokens `[B, T, H d]`.
        keys: output of its key projection `[B, L, h d]`.
        rotary: cosines and sines `[B or 1, L, d]`.
        at: places of those tokens `[B, T]`.
        real: True at the tokens that count `[B, T]`; rows of a batch have different numbers.
        valid: True at real tokens `[B, L]`, or None.
    """
    q, k = _turned(attn, query, keys, rotary, at)
    total = peak = q.new_zeros(len(q), k.shape[2])
    for start in range(0, at.shape[1], ROWS):
        part = slice(start, start + ROWS)
        rows = _rows(q[:, :, :, part], k, at[:, part], valid)
        rows = rows.masked_fill(~real[:, part, None], 0)
        total, peak = total + rows.sum(1), torch.maximum(peak, rows.amax(1))
    return total, peak


def _turned(
    attn: nn.Module, query: Tensor, keys: Tensor, rotary: tuple[Tensor, Tensor], at: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotated, scaled queries `[B, h, H / h, T, d]` and rotated keys `[B, h, L, d]`, fp32."""
    rotate: Any = vars(sys.modules[type(attn).__module__])["apply_rotary_pos_emb"]
    width: int = attn.head_dim  # type: ignore[assignment]
    q = query.unflatten(-1, (-1, width)).transpose(1, 2)
    k = keys.unflatten(-1, (-1, width)).transpose(1, 2)
    cos, sin = (table.expand(k.shape[0], -1, -1) for table in rotary)
    index = at[..., None].expand(-1, -1, cos.shape[-1])
    q = rotate(q, q, cos.gather(1, index), sin.gather(1, index))[0]
    k = rotate(k, k, cos, sin)[1]
    return q.float().unflatten(1, (k.shape[1], -1)) * width**-0.5, k.float()


def _rows(q: Tensor, k: Tensor, at: Tensor, valid: Tensor | None) -> Tensor:
    """Attention `[B, T, L]` of the tokens at `[B, T]` to real tokens up to them."""
    scores = torch.einsum("bgrtd,bgld->bgrtl", q, k)
    seen = torch.arange(k.shape[2], device=k.device) <= at[..., None]
    seen = seen if valid is None else seen & valid[:, None]
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    return scores.softmax(-1).mean((1, 2))


def last_place(valid: Tensor | None, tokens: Tensor) -> Tensor:
    """Place of the last real token of every row `[B]`; tokens is `[B, L, ..]`."""
    batch, length = tokens.shape[:2]
    if valid is None:
        return torch.full((batch,), length - 1, device=tokens.device)
    places = torch.arange(length, device=tokens.device)
    return (valid * places).amax(1)


@dataclass
class RowTap:
    """Keeps the projections of one layer's attention while asked to; a forward hook of both.

    Attributes:
        wanted: whether the running pass needs them.
        found: projections by name.
    """

    wanted: bool = False
    found: dict[str, Tensor] = field(default_factory=dict)

    def take(self) -> tuple[Tensor, Tensor]:
        """Queries and keys of the pass, once."""
        found, self.found, self.wanted = self.found, {}, False
        return found["q_proj"], found["k_proj"]

    def __getstate__(self) -> dict[str, Any]:
        return {"wanted": False, "found": {}}


@dataclass
class Keep:
    """Forward hook of a projection."""

    tap: RowTap
    name: str

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if self.tap.wanted:
            self.tap.found[self.name] = out.detach()


def check_decoder(layers: tuple[nn.Module, ...], config: Any, name: str) -> None:
    """Raise `UnsupportedMethodError` for language models whose rows or caches differ."""
    first: Any = layers[0]
    attn = getattr(first, "self_attn", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    reason = ""
    if attn is None or not hasattr(attn, "q_proj") or not hasattr(attn, "k_proj"):
        reason = "has no separate query and key projections"
    elif hasattr(attn, "q_norm") or hasattr(attn, "k_norm"):
        reason = "normalises queries and keys by head"
    elif "apply_rotary_pos_emb" not in vars(sys.modules[type(attn).__module__]):
        reason = "turns queries and keys in a way of its own"
    elif kinds != {"full_attention"} or (
        not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None)
    ):
        reason = "has layers with windows, whose caches count by place"
    elif config._attn_implementation not in ("sdpa", "eager", "flash_attention_2"):
        reason = f"runs attn_implementation={config._attn_implementation!r}; use 'sdpa'"
    if reason:
        raise UnsupportedMethodError(f"{name}: {class_path(type(first))} {reason}")
