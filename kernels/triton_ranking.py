"""Ranking by counting who scores higher, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.dispatch import on_device


@on_device
def rank_tokens_triton(score: Tensor, prefix: int) -> Tensor:
    """See `vistoken.kernels.ranking.rank_tokens`."""
    score = score.contiguous()
    batch, tokens = score.shape
    order = torch.empty(batch, tokens, dtype=torch.int64, device=score.device)
    block = max(16, triton.next_power_of_2(tokens))
    part = min(block, 128)
    _rank[(triton.cdiv(tokens, part), batch)](
        score, order, tokens, prefix, BLOCK=block, PART=part, num_warps=4
    )
    return order


@triton.jit(do_not_specialize=["tokens", "prefix"])
def _rank(score_ptr, order_ptr, tokens, prefix, BLOCK: tl.constexpr, PART: tl.constexpr):
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = part * PART + tl.arange(0, PART)
    score = tl.load(score_ptr + b * tokens + own, mask=own < tokens, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))  # a NaN goes last, in its order
    rank = tl.zeros([PART], tl.int32)
    for start in range(0, tokens, 64):
        other = start + tl.arange(0, 64)
        rival = (other >= prefix) & (other < tokens)
        value = tl.load(score_ptr + b * tokens + other, mask=rival, other=float("-inf"))
        value = tl.where(value == value, value, float("-inf"))
        beats = (value[None, :] > score[:, None]) | (
            (value[None, :] == score[:, None]) & (other[None, :] < own[:, None])
        )
        rank += tl.sum((beats & rival[None, :]).to(tl.int32), 1)
    place = tl.where(own < prefix, own, prefix + rank)
    tl.store(order_ptr + b * tokens + place, own.to(tl.int64), mask=own < tokens)
