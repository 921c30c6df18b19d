"""Reduction without removal: tokens stay in their places, a mask says which of them are alive.

In training every block sees all N0 tokens, so that counts can have gradients. What the method does
with the same counts is simulated exactly: dead tokens are no keys but their own, sources join their
partners as in the real merge, sizes grow alike, and pooling weighs the living. Positions never
move, so rotary tables need no care.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistoken.api import attachment_of
from vistoken.attach import Attachment, undisturbed, widened
from vistoken.errors import (
    AlreadyWrappedError,
    ScheduleError,
    TapError,
    UnsupportedBackboneError,
    UnsupportedMethodError,
)
from vistoken.hooks import Hook, attach, detach
from vistoken.kernels.attention import class_row
from vistoken.kernels.biased_attention import biased_attention, biased_attention_reference
from vistoken.kernels.ranking import rank_tokens
from vistoken.kernels.reduce import add_into, take
from vistoken.methods import DiffRate
from vistoken.models.detect import find
from vistoken.schedule import Schedule
from vistoken.state import Frame, TokenState
from vistoken.tap import Collect, Tap
from vistoken.train.matching import Matching
from vistoken.train.merging import best_partners, hard_shares, merge_in_place
from vistoken.train.rates import Plan, Rates

KEY = "_vistoken_simulation"
"""Attribute of a simulated model that holds its attachment."""
WIDEST_HEAD = 128
"""Largest head width of the attention kernel."""


class MaskedState(TokenState):
    """The tokens that enter a block of a simulated model.

    Attributes:
        plan: counts of this forward pass.
        alive: `[B, N0]` zeros and ones with a gradient; None while all are alive.
        order: `[B, N0]` tokens in the order in which the real reduction would hold them.
    """

    def __init__(self, before: TokenState, plan: Plan) -> None:
        super().__init__(before.tokens, before.prefix, before.grid)
        self.plan = plan
        self.alive: Tensor | None = None
        self.order: Tensor | None = None

    def then(self, alive: Tensor, order: Tensor, size: Tensor) -> MaskedState:
        """The state after a block."""
        state = MaskedState(self, self.plan)
        state.alive, state.order, state.size = alive, order, size
        return state


class MaskedTap(Tap):
    """Attention among the living.

    Args:
        state: the tokens that enter the block.
        collect: receives q, k `[B, H, N0, d]`, the size bias and the scale; None collects nothing.
    """

    def __init__(self, state: MaskedState, collect: Collect | None) -> None:
        super().__init__(lambda key: None, collect, lambda: None)
        self.state = state

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
        """Attention of q, k, v `[B, H, N0, d]` over living keys and each query's own.

        Raises:
            TapError: a mask, causal attention or dropout of attention weights.
        """
        self.calls += 1
        if attn_mask is not None or is_causal or dropout_p > 0.0:
            raise TapError(
                "counts cannot be learned where the model masks attention or drops attention "
                "weights; set attn_drop (attention_dropout) to 0 and pass no mask"
            )
        state = self.state
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        bias = None if state.size is None else state.size.log()
        alive = state.alive
        if query.shape[-1] <= WIDEST_HEAD:
            out = biased_attention(query, key, value, bias, scale, alive=alive)[0]
        else:
            out = biased_attention_reference(query, key, value, bias, scale, 0, alive)[0]
        if self.collect is not None:
            with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                self.collect(query, key, bias, scale)
        return out


class Simulation(Attachment):
    """The hooks of a model whose counts are being learned: DiffRate's pruning and merging.

    Args:
        rates: the counts.
        matching: learned matching features, or None to match the residual stream.
        given: the other arguments of `Attachment`.
    """

    reads_class: ClassVar[bool] = True
    """Whether the operator needs a class token."""

    def __init__(self, rates: Rates, matching: Matching | None, *given: Any) -> None:
        super().__init__(*given)
        self.rates = rates
        self.matching = matching
        self.index = {block: place for place, block in enumerate(rates.blocks)}
        self.ahead: Plan | None = None

    def open(self, x: Tensor) -> Frame:
        """The frame of a new forward pass, with the counts of this moment."""
        if x.shape[1] != self.shape.tokens:
            raise ScheduleError(
                f"{x.shape[1]} tokens came in, the counts are learned for {self.shape.tokens}; "
                "train at the model's image size"
            )
        frame = Frame(TokenState(x.shape[1], self.shape.prefix, self.grid), self.shape.depth)
        plan, self.ahead = self.ahead, None
        frame.states[0] = MaskedState(frame.state(0), self.rates() if plan is None else plan)
        return frame

    def masked(self, block: int) -> MaskedState:
        """The tokens that enter `block`."""
        state = self.running().state(block)
        assert isinstance(state, MaskedState)
        return state

    def tap(self, block: int, masked: bool = False) -> Tap | None:
        """The tap of a block, or None where all tokens are alive and nothing is to be read."""
        frame, state = self.running(), self.masked(block)
        learned = block in self.index
        if state.alive is None and not learned:
            return None

        def collect(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> None:
            frame.features[block] = self.signals(query, key, bias, scale, state.alive)

        return MaskedTap(state, collect if learned else None)

    def signals(
        self, q: Tensor, k: Tensor, bias: Tensor | None, scale: float, alive: Tensor | None
    ) -> dict[str, Any]:
        """What the operator reads of a block's attention."""
        return {"class_row": class_row(q[:, :, : self.shape.cls], k, bias, scale, alive)}

    def pool_tap(self) -> Tap | None:
        """No pool by attention is ever simulated."""
        return None

    def shorten(self, block: int, x: Tensor) -> Tensor:
        """The residual stream `[B, N0, C]` with this block's sources merged into their partners."""
        if block not in self.index:
            return x
        frame, state = self.running(), self.masked(block)
        signals, frame.features[block] = frame.features[block], None
        if signals is None:
            raise TapError(f"no fused attention call passed through block {block}")
        with torch.autocast(x.device.type, enabled=False):
            after, merged = self.reduce(block, x, state, signals)
        if frame.states[block + 1] is None:  # else activation checkpointing recomputes
            frame.states[block + 1] = after
        return merged

    def reduce(
        self, block: int, x: Tensor, state: MaskedState, signals: dict[str, Any]
    ) -> tuple[MaskedState, Tensor]:
        """State and residual stream after one block's pruning and merging."""
        place, row = self.index[block], signals["class_row"]
        order = _rank(row, state)
        # The inverse of a permutation: ranks by token.
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=x.device).expand_as(order)
        )
        masks = state.plan.masks[place].to(row.dtype)
        prune, merge = (mask.expand_as(rank).gather(1, rank) for mask in masks)
        before = prune.new_ones(()) if state.alive is None else state.alive
        survives = before * prune
        weight, alive = survives * (1 - merge), survives * merge
        receives = alive.detach() > 0
        receives[:, : state.prefix] = False
        cosine, partners, share = self._match(block, x, receives)
        merged = merge_in_place(x, weight, share, partners)
        # Sizes have a gradient too: what is pruned instead of merged takes its weight along.
        size = state.sizes(x).to(weight.dtype)
        joins = size * weight * cosine[..., 0].clamp_min(0)
        size = add_into(size, partners[..., 0], joins)
        return state.then(alive, order, size.to(widened(x))), merged

    def _match(self, block: int, x: Tensor, receives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines, partners and shares `[B, N0, K]` of every token."""
        if self.matching is None:
            cosine, partners = undisturbed(
                x.device.type, lambda: best_partners(x.detach(), receives)
            )
            return cosine, partners, torch.ones_like(cosine)
        metric = self.matching(x.detach(), self.index[block])
        with torch.no_grad():
            _, partners = best_partners(metric, receives, self.matching.partners)
        cosine = self.matching.cosine(metric, partners)
        own = torch.arange(x.shape[1], device=x.device)[:, None]
        shares = hard_shares(
            cosine.masked_fill(partners == own, float("-inf")).clamp_min(-1e4),
            self.matching.temperature,
        )
        return cosine.detach(), partners, shares

    def advance(self, block: int) -> None:
        """A block that is not learned hands its tokens on."""
        frame = self.running()
        if frame.states[block + 1] is None:
            frame.states[block + 1] = frame.state(block)

    def full(self, y: Tensor, blocks: int | None = None) -> Tensor:
        """All tokens are in their places already."""
        return y

    def weigh(self, y: Tensor) -> Tensor:
        """Scale tokens so that the host's plain mean becomes that of the living by their size."""
        state = self.masked(self.shape.depth)
        if state.alive is None:
            return y
        first = 0 if self.readout == "weigh_all" else state.prefix
        size = (state.sizes(y) * state.alive)[:, first:].to(widened(y))
        share = size * (size.shape[1] / size.sum(1, keepdim=True))
        share = torch.cat([share.new_ones(share.shape[0], first), share], 1)
        return (y * share[..., None]).to(y.dtype)


class PlanAhead(Hook):
    """Pre-hook of the host: counts are planned before any block that may be recomputed."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        simulation = self.attachment
        assert isinstance(simulation, Simulation)
        simulation.ahead = simulation.rates()


def _rank(row: Tensor, state: MaskedState) -> Tensor:
    """Tokens `[B, N0]` from the most attended down, prefix first, the dead last.

    Equal scores keep the order that the real reduction would hold them in.
    """
    if state.alive is not None:
        row = torch.where(state.alive.detach() > 0, row, -1.0)
    if state.order is None:
        return rank_tokens(row, state.prefix)
    return take(state.order, rank_tokens(take(row, state.order), state.prefix))


def simulate(
    model: nn.Module,
    rates: Rates,
    matching: Matching | None = None,
    kind: type[Simulation] = Simulation,
) -> Simulation:
    """Attach the simulation to a model, in place.

    Args:
        model: a supported model that carries no method; with a class token if `kind` reads it.
        rates: the counts, made for its shape.
        matching: learned matching features.
        kind: the operator.

    Returns:
        The attachment; `release` takes it off.

    Raises:
        UnsupportedBackboneError: no supported vision transformer is in the model.
        UnsupportedMethodError: no class token, or a head that pools by attention or reads the grid.
        AlreadyWrappedError: the model carries a method or a simulation.
    """
    if attachment_of(model) is not None or KEY in model.__dict__:
        raise AlreadyWrappedError("the model carries a method already; unwrap it first")
    backbone = find(model)
    if backbone.shape != rates.shape:
        raise UnsupportedBackboneError("the rates were made for a model of another shape")
    readout, shape = backbone.spec.readout(backbone.host), backbone.shape
    check_learnable(readout, shape.cls, shape.pool, kind.reads_class)
    tokens, prefix, depth = rates.shape.tokens, rates.shape.prefix, rates.shape.depth
    dense = Schedule(tokens, prefix, ((tokens, tokens),) * depth)
    found = (backbone.spec, DiffRate(schedule=dense), backbone.shape, backbone.host)
    simulation = kind(rates, matching, *found, backbone.blocks, "nearest")
    attach(simulation)
    ahead = backbone.host.register_forward_pre_hook(PlanAhead(simulation))
    simulation.handles.append(ahead)
    model.__dict__[KEY] = simulation
    return simulation


def release(model: nn.Module) -> None:
    """Take the simulation off; the model computes what it did before."""
    detach(model.__dict__.pop(KEY))


def check_learnable(readout: str, cls: int, pool: str, reads_class: bool = True) -> None:
    """Raise `UnsupportedMethodError` for heads and models whose counts cannot be learned."""
    if cls == 0 and reads_class:
        raise UnsupportedMethodError(
            "DiffRate ranks by the class token's attention; the model has no class token. "
            "operator='tome' learns counts without one"
        )
    if readout == "grid" or pool == "map":
        raise UnsupportedMethodError(
            f"the head reads the tokens by pool={pool!r} ({readout}); counts can be learned for "
            "heads that read the class token or an average"
        )


def twin(model: nn.Module, shared: bool = True) -> nn.Module:
    """A copy of a model without a method, in eval mode; with `shared` parameters or its own."""
    memo: dict[int, Any] = {}
    if shared:
        memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo).eval()
