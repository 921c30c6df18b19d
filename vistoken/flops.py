"""Closed-form cost of a vision transformer with a token schedule.

Every paper of this field counts one multiply-accumulate as one FLOP, the patch embedding over all
tokens that enter block 0 (prefix included, as DiffRate does), and nothing for norms and softmax:

    F = N0 stem + head + sum_l [ N_{l-1} attn_linear + attention(N_{l-1}) + N'_l mlp_linear ]

with `attention(N) = 2 N^2 C` for softmax attention and `N'_l` the tokens that the MLP of block l
sees: those after the reduction when it happens between the branches, those before it otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from vistoken.errors import ScheduleError
from vistoken.shape import ModelShape

Where = Literal["mlp", "block"]


def count_macs(
    shape: ModelShape,
    kept: Sequence[int] | None = None,
    where: Where = "mlp",
    attention: Callable[[int, int], float] | None = None,
) -> float:
    """Multiply-accumulates of one image.

    Args:
        shape: lengths and costs of the model.
        kept: tokens that leave each block, prefix included; None is the dense model.
        where: `mlp` when tokens go between attention and MLP, `block` when they go after the block.
        attention: cost of one block's token mixing from (tokens, attention width); the default is
            softmax attention, `2 N^2 C`.

    Returns:
        Multiply-accumulates, what the papers call FLOPs. Divide by 1e9 for G.

    Raises:
        ScheduleError: `kept` has another length than the model has blocks.
    """
    if kept is None:
        kept = (shape.tokens,) * shape.depth
    if len(kept) != shape.depth:
        raise ScheduleError(f"kept has {len(kept)} counts, the model has {shape.depth} blocks")
    mix = attention or softmax_attention
    total = float(shape.tokens * shape.stem + shape.head)
    before = shape.tokens
    for block, after in zip(shape.blocks, kept, strict=True):
        in_mlp = after if where == "mlp" else before
        total += before * block.attn_linear + mix(before, block.attn_width)
        total += in_mlp * block.mlp_linear
        before = after
    return total


def softmax_attention(tokens: int, width: int) -> float:
    """Scores and weighted sum of softmax attention: `2 N^2 C`."""
    return 2.0 * tokens * tokens * width


def agent_attention(agents: int, kernel: int = 3) -> Callable[[int, int], float]:
    """Agent attention (Han et al., ECCV 2024): `4 N n C`, and a depth-wise convolution on V."""
    return lambda tokens, width: 4.0 * tokens * agents * width + kernel * kernel * tokens * width
