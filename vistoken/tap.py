"""The attention tap: sees q, k, v where every family calls fused attention, after norms and RoPE.

While it is entered, a `TorchFunctionMode` receives each call of `F.scaled_dot_product_attention`.
It hands the declared signals to the method and adds the log of the token sizes to the host's own
mask. `nn.MultiheadAttention` calls `F.multi_head_attention_forward` instead, which is computed
here, because entering the mode again around that function would never end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vistoken.errors import TapError
from vistoken.kernels import attention as signals
from vistoken.kernels.biased_attention import biased_attention
from vistoken.kernels.dispatch import use_triton
from vistoken.methods.base import Need

Collect = Callable[[Tensor, Tensor, Tensor | None, float], None]


class Tap(TorchFunctionMode):
    """Intercepts the attention call of one module.

    Args:
        log_size: from the keys `[B, H, N, d]`, the additive key bias `[B, N]` in fp32 or fp64, or
            None.
        collect: receives q, k `[B, H, N, d]`, the bias and the scale; None collects nothing.
        columns: gives the indices `[B, N]` of the living tokens among the host's mask columns, or
            None when no token is gone.
    """

    def __init__(
        self,
        log_size: Callable[[Tensor], Tensor | None],
        collect: Collect | None,
        columns: Callable[[], Tensor | None],
    ) -> None:
        super().__init__()
        self.log_size = log_size
        self.collect = collect
        self.columns = columns
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self.multi_head(*args, **kwargs)
        return func(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Fused attention with the size bias; q, k, v `[B, H, N, d]`."""
        self.calls += 1
        bias = self.log_size(key)
        if self.collect is not None:
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            self.collect(query, key, bias, factor)
        if is_causal and (bias is not None or self.columns() is not None):
            raise TapError("causal attention cannot follow merged or removed tokens")
        if bias is not None and attn_mask is None and dropout_p == 0.0:
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            if fits_kernel(query, key, value):
                return biased_attention(query, key, value, bias, factor)[0]
        mask = self.mask(attn_mask, bias, key)
        if enable_gqa:
            return F.scaled_dot_product_attention(
                query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=True
            )
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale
        )

    def mask(self, mask: Tensor | None, bias: Tensor | None, key: Tensor) -> Tensor | None:
        """The host's mask at the living tokens plus the size bias, for all heads and rows."""
        if mask is not None:
            mask = self.living(mask, key.shape[2])
        if bias is None:
            return mask
        row = bias[:, None, None].to(key.dtype)
        if mask is None:
            return row
        if mask.dtype == torch.bool:
            return torch.where(mask, row, float("-inf"))
        return mask + row

    def living(self, mask: Tensor, tokens: int) -> Tensor:
        """Rows and columns of a mask `[.., N0 or 1, N0]` that belong to tokens still there."""
        columns = self.columns()
        if columns is None or mask.shape[-1] == tokens:
            return mask
        while mask.dim() < 4:
            mask = mask[None]
        heads, rows = mask.shape[1], mask.shape[2]
        mask = mask.expand(columns.shape[0], -1, -1, -1)
        index = columns[:, None, None].expand(-1, heads, rows, -1)
        mask = mask.gather(3, index)
        if rows > 1:
            index = columns[:, None, :, None].expand(-1, heads, -1, mask.shape[3])
            mask = mask.gather(2, index)
        return mask

    def multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        static_k: Tensor | None = None,
        static_v: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """`F.multi_head_attention_forward` on `[N, B, C]` tensors; returns no weights."""
        extras = (bias_k, bias_v, static_k, static_v)
        if add_zero_attn or use_separate_proj_weight or any(e is not None for e in extras):
            raise TapError(
                "nn.MultiheadAttention with bias_k, add_zero_attn, static keys or separate "
                "projection widths cannot be tapped"
            )
        assert in_proj_weight is not None
        batch = query.shape[1]

        def heads(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3)

        if query is key and key is value:
            q, k, v = map(heads, F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1))
        else:
            weights = in_proj_weight.chunk(3)
            biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
            q, k, v = (
                heads(F.linear(x, w, b))
                for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        mask = _joined_mask(attn_mask, key_padding_mask, batch, num_heads, q.dtype)
        out = self.attend(q, k, v, mask, dropout_p if training else 0.0)
        out = out.permute(2, 0, 1, 3).reshape(query.shape[0], batch, -1)
        return F.linear(out, out_proj_weight, out_proj_bias), None


def fits_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `biased_attention` can stand in: self-attention, equal heads, one type."""
    alike = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    dense = all(t.stride(-1) == 1 for t in (q, k, v))
    return alike and dense and q.shape[-1] <= 128 and use_triton(q)


def _joined_mask(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """One additive mask from `nn.MultiheadAttention`'s two; in boolean ones True means ignore."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))

    joined = None
    if attn_mask is not None:
        joined = additive(attn_mask)
        if joined.dim() == 3:
            joined = joined.reshape(batch, heads, *joined.shape[1:])
    if padding is not None:
        row = additive(padding)[:, None, None]
        joined = row if joined is None else joined + row
    return joined


def gather_signals(
    needs: frozenset[Need],
    class_tokens: int,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    lse: Tensor | None = None,
) -> dict[str, Any]:
    """The declared signals of one attention call, detached, as keyword arguments of `Features`.

    The log-sum-exp `[B, H, N]` of the attention, where at hand, spares a pass over the keys.
    """
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    found: dict[str, Any] = {"bias": bias, "scale": scale}
    if Need.KEYS in needs:
        found["keys"] = k
    if Need.CLASS_ROW in needs:
        found["class_row"] = signals.class_row(q[:, :, :class_tokens], k, bias, scale)
    if Need.RECEIVED in needs:
        found["received"] = signals.received(q, k, bias, scale, lse)
    if Need.ATTENTION in needs:
        found.update(query=q, keys=k)
    return found
