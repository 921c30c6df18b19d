"""ToMe's merging without removal: who meets whom depends on slots, so matching is done in slots.

The real reduction holds its tokens in slots 0..n-1, and tokens at even slots look for partners at
odd ones. Here the first n places of `order` are those slots. Of the even ones the r most similar
merge; as ranks, the most similar one is the last of the n, so that `mask[rank]` says who stays.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vistoken.kernels.attention import CHUNK
from vistoken.kernels.bipartite import head_mean
from vistoken.kernels.match import unit
from vistoken.kernels.reduce import add_into, take
from vistoken.train.masked import MaskedState, Simulation
from vistoken.train.merging import merge_in_place


class MergeSimulation(Simulation):
    """The hooks of a model whose counts are being learned: ToMe's merging."""

    reads_class: ClassVar[bool] = False

    def signals(
        self, q: Tensor, k: Tensor, bias: Tensor | None, scale: float, alive: Tensor | None
    ) -> dict[str, Any]:
        """Keys, averaged over heads."""
        return {"keys": head_mean(k)}

    def reduce(
        self, block: int, x: Tensor, state: MaskedState, signals: dict[str, Any]
    ) -> tuple[MaskedState, Tensor]:
        """State and residual stream after one block's merging."""
        batch, tokens = x.shape[:2]
        kept, prefix = state.plan.kept.detach(), state.prefix
        first = kept.new_full((), float(tokens)) if block == 0 else kept[block - 1]
        entering, order = first.round().long(), state.order
        if order is None:
            order = torch.arange(tokens, device=x.device).expand(batch, -1)
        looks, turn, partner = pair_up_in_place(take(signals["keys"], order), prefix, entering)
        rank = (entering - 1 - turn).clamp(0, tokens - 1)
        mask = state.plan.masks[self.index[block], -1]
        leaves = (1 - mask.expand(batch, -1).gather(1, rank)) * looks
        gone = _spread(leaves, torch.zeros_like(leaves), tokens)
        slots = torch.arange(tokens, device=x.device).expand(batch, -1)
        joined = torch.where(gone.detach() > 0, _spread(partner, partner, tokens), slots)
        # From slots back to tokens.
        back = torch.empty_like(order).scatter_(1, order, slots)
        gone, partners = take(gone, back), take(take(order, joined), back)

        before = gone.new_ones(()) if state.alive is None else state.alive
        weight, alive = before * gone, before * (1 - gone)
        size = state.sizes(x).to(weight.dtype)
        merged = merge_in_place(x, weight, torch.ones_like(weight)[..., None], partners[..., None],
                                size)  # fmt: skip
        size = add_into(size, partners, size * weight)
        stays = take(alive.detach(), order) > 0
        fresh = take(order, _new_order(stays, prefix))
        after = torch.where(kept[block] < first, fresh, order)
        return state.then(alive.expand(batch, tokens), after, size), merged


def pair_up_in_place(metric: Tensor, prefix: int, entering: Tensor) -> tuple[Tensor, ...]:
    """ToMe's matching among the first slots, some rows at a time.

    Args:
        metric: features `[B, N, d]` in slot order; similarity is the cosine.
        prefix: slots at the start that neither merge nor receive.
        entering: slots in use, a whole number on the device.

    Returns:
        Of the even slots `[ceil(N / 2)]` ones and zeros, who may merge; `[B, ceil(N / 2)]` their
        turn, 0 for the most similar; and the partner's slot.
    """
    tokens = metric.shape[1]
    metric = unit(metric)
    slots = torch.arange(tokens, device=metric.device)
    usable = (slots >= prefix) & (slots < entering)
    odd = metric[:, 1::2].transpose(1, 2)
    found = []
    for first in range(0, tokens, 2 * CHUNK):
        rows = metric[:, first : first + 2 * CHUNK : 2]
        found.append((rows @ odd).masked_fill(~usable[1::2], float("-inf")).max(-1))
    best, partner = (torch.cat([part[i] for part in found], 1) for i in range(2))
    looks = usable[::2]
    best = best.masked_fill(~looks, float("-inf"))
    order = best.argsort(dim=-1, descending=True, stable=True)
    turn = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return looks.to(metric.dtype), turn, 2 * partner + 1


def _spread(even: Tensor, odd: Tensor, tokens: int) -> Tensor:
    """Values `[B, ceil(N / 2)]` of even and odd slots, in turns: `[B, N]`."""
    return torch.stack([even, odd], -1).flatten(1)[:, :tokens]


def _new_order(stays: Tensor, prefix: int) -> Tensor:
    """Slots `[B, N]` as the real merge leaves them: prefix, even ones, odd ones, the gone last."""
    tokens = stays.shape[1]
    slots = torch.arange(tokens, device=stays.device)
    key = torch.where(slots < prefix, slots, slots + tokens * (1 + slots % 2))
    return torch.where(stays, key, slots + 3 * tokens).argsort(-1)
