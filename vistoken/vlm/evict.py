"""Caches of earlier layers, cut to the image tokens that the last stage left."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vistoken.vlm.flow import Flow


def evict(cache: Any, flow: Flow, edges: tuple[int, ...]) -> None:
    """Forget what later stages dropped, in every layer from the first edge to the last stage.

    Layers that grow lose the columns; static ones keep them, hidden by the notes in `flow`.

    Args:
        cache: of transformers, after the pass.
        flow: the pass, with what every stage kept.
        edges: layers at which caches begin to differ, rising; all but the first are stages.
    """
    kept: Tensor | None = None  # places among a group's tokens of those that are left at the end
    for edge, after in reversed(list(pairwise(edges))):
        order = flow.orders[after]
        kept = order if kept is None else order.gather(1, kept)
        past, length = flow.spans[edge]
        growing = not cache.layers[edge].is_compileable
        if growing:
            for layer in cache.layers[edge:after]:
                layer.keys = _cut(layer.keys, past, kept)
                layer.values = _cut(layer.values, past, kept)
        before = flow.notes[edge]
        if growing and before is None and flow.valid is None:
            continue
        real = torch.ones_like(kept, dtype=torch.bool) if flow.valid is None else flow.valid
        if not growing:
            # A place may be named twice, as a token and as padding: the token counts.
            hidden = torch.zeros(len(kept), length, dtype=torch.uint8, device=kept.device)
            real = hidden.scatter_reduce(1, kept, real.to(torch.uint8), "amax").bool()
        if before is None:
            before = real.new_ones(len(kept), past)
        flow.notes[edge] = torch.cat([before[:, :past], real], 1)


def _cut(states: Tensor, past: int, kept: Tensor) -> Tensor:
    """`[B, h, past + L, d]` with the last L columns cut to the kept ones `[B, K]`."""
    index = kept[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return torch.cat([states[:, :, :past], states[:, :, past:].gather(2, index)], 2)
