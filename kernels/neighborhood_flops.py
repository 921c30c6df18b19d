"""Teaches torch's FLOP counter the neighborhood operators; import it beside `FlopCounterMode`.

A module of its own because importing the counter imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vistoken.kernels import neighborhood_ops as ops

__all__ = ["backward_flops", "forward_flops", "ops"]


@register_flop_formula(torch.ops.vistoken.neighborhood)  # type: ignore[untyped-decorator]
def forward_flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], extra_k: Sequence[int] | None,
    extra_v: Sequence[int] | None, rpb: Sequence[int] | None, window: Sequence[int],
    *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Useful operations of the two products, for torch's counter; arguments are shapes."""
    keys = math.prod(window) + (0 if extra_k is None else extra_k[1])
    return 2 * math.prod(q[:-1]) * keys * (q[-1] + v[-1])


@register_flop_formula(torch.ops.vistoken.neighborhood_backward)  # type: ignore[untyped-decorator]
def backward_flops(
    grad: Sequence[int], grad_lse: Any, q: Sequence[int], k: Sequence[int], v: Sequence[int],
    out: Any, lse: Any, extra_k: Sequence[int] | None, extra_v: Any, rpb: Any,
    window: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Five products to the forward pass's two."""
    forward: int = forward_flops(q, k, v, extra_k, extra_v, rpb, window)
    return forward * 5 // 2
