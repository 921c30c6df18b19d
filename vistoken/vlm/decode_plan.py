"""Which tiles decode fastest here: tried on the model's own layers, and checked against them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vistoken.graphs import record
from vistoken.kernels.decode_linear import Product, Tile, tiles
from vistoken.kernels.dispatch import why_not_triton
from vistoken.vlm.decode_layers import (
    Parts,
    Plan,
    Rows,
    chain_layer,
    head_logits,
    mask_for,
    why_not_chain,
)
from vistoken.vlm.prefill import prefill_layer

LOG = logging.getLogger(__name__)

PRODUCTS: tuple[Product, ...] = ("qkv", "back", "gate", "head")

SECONDS = 2.0
"""Time for trying tiles; compiling them takes most of it, and is remembered between processes."""

LAYERS, KEYS = 4, 256
"""Layers that are timed together, more than a cache holds, and tokens in their caches."""

REPLAYS = 5

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Relative error to the model's own layer that rounding explains."""


def choose_plan(parts: Parts, batch: int, seconds: float = SECONDS) -> tuple[Plan | None, str]:
    """The fastest plan that agrees with the model's own layers, or None for these; and in words.

    Args:
        parts: the model.
        batch: rows.
        seconds: time for trying tiles after the first.
    """
    reason = why_not_chain(parts)
    if reason is not None:
        return None, f"the model's own modules: {reason}"
    allowed = TOLERANCE.get(parts.head.weight.dtype, 0.0)
    reasons = []
    for plan in first_plans(parts, batch):
        try:
            error = worst_error(parts, plan, batch)
        except Exception as failure:
            # Whatever keeps a kernel from being built or launched here, torch's products remain.
            reasons.append(f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}")
            continue
        if error <= allowed:
            if plan != Plan():
                best = tune(parts, batch, plan, seconds)
                plan = best if worst_error(parts, best, batch) <= allowed else plan
            notes = "".join(f"; not {note}" for note in reasons)
            return plan, f"fused chain{describe(plan)}{notes}"
        reasons.append(f"a layer differs from the model's own by {error:.1e}")
    return None, f"the model's own modules: {reasons[-1]}"


def worst_error(parts: Parts, plan: Plan, batch: int) -> float:
    """The largest error of the first and the last layer, in a prompt and in a decoding step."""
    ends = parts.decoder.layers[0], parts.decoder.layers[-1]
    steps = max(layer_error(parts, layer, plan, batch) for layer in ends)
    return max(steps, *(prompt_error(parts, layer) for layer in ends))


def first_plans(parts: Parts, batch: int) -> list[Plan]:
    """Plans to begin with, the most promising first."""
    weight = parts.head.weight
    if why_not_triton(weight.device, weight.dtype) is not None or not tiles(batch, "qkv"):
        return [Plan()]
    qkv, back, gate, head = (tiles(batch, name)[0] for name in PRODUCTS)
    plan = Plan(qkv, back, gate, head)
    capable = torch.version.hip is None and torch.cuda.get_device_capability(weight.device)[0] >= 9
    # With more rows, programs that wait for those before them keep these from shared memory.
    early = [replace(plan, early=True)] if capable and batch == 1 else []
    return [*early, plan, Plan()]


def tune(parts: Parts, batch: int, plan: Plan, seconds: float) -> Plan:
    """Change one product's tile at a time while that is faster and the time is not over."""
    end = time.monotonic() + seconds
    clock = Stopwatch(parts, batch)
    best = clock(plan)
    for name in PRODUCTS:
        choices: list[Tile | None] = [*tiles(batch, name)[1:], None]
        for tile in choices:
            if time.monotonic() > end:
                return plan
            change: dict[str, Any] = {name: tile}
            trial = replace(plan, **change)
            taken = clock(trial)
            if taken < best:
                plan, best = trial, taken
    if plan.early and time.monotonic() < end:
        trial = replace(plan, early=False)
        plan = trial if clock(trial) < best else plan
    return plan


class Stopwatch:
    """Times a plan on a few layers and the head, recorded in a CUDA graph.

    Args:
        parts: the model.
        batch: rows.
    """

    @torch.no_grad()
    def __init__(self, parts: Parts, batch: int) -> None:
        self.parts = parts
        self.layers = list(parts.decoder.layers)[:LAYERS]
        weight = parts.head.weight
        groups, dim = parts.cache_shape
        shape = (len(self.layers), 2, batch, groups, KEYS + 64, dim)
        self.caches = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.x = torch.ones(batch, weight.shape[1], device=weight.device, dtype=weight.dtype)
        self.lengths = torch.full((batch,), KEYS, device=weight.device)
        tables = parts.decoder.rotary_emb(self.x[:, None], self.lengths[:, None])
        self.tables = [table[:, 0].contiguous() for table in tables]
        self.arrivals = torch.zeros(batch * groups, dtype=torch.int32, device=weight.device)
        self.wanted = self._run(Plan()).float()
        self.got = torch.empty_like(self.wanted)

    @torch.no_grad()
    def __call__(self, plan: Plan) -> float:
        """Milliseconds, the least of some replays; infinity where the plan does not hold."""
        self.got.zero_()
        try:
            taken = least_time(lambda: self.got.copy_(self._run(plan)))
            error = float((self.got - self.wanted).norm() / self.wanted.norm())
        except Exception as failure:
            LOG.debug("%s: %s", plan, failure)
            return float("inf")
        LOG.debug("%.4f ms, error %.0e%s", taken, error, describe(plan))
        return taken if error < 2 * TOLERANCE[self.x.dtype] else float("inf")

    def _run(self, plan: Plan) -> Tensor:
        x, (cos, sin) = self.x, self.tables
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            x = chain_layer(layer, x, cos, sin, keys, values, self.lengths, self.arrivals, plan)
        return head_logits(self.parts, x, plan)


def least_time(run: Callable[[], Any]) -> float:
    """Milliseconds of a function in a CUDA graph, the least of some replays."""
    graph, _ = record(run)
    graph.replay()
    taken: list[float] = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return min(taken)


@torch.no_grad()
def layer_error(parts: Parts, layer: Any, plan: Plan, batch: int = 2, tokens: int = 70) -> float:
    """Relative difference between the chain and the model's own layer on random input."""
    weight = parts.head.weight
    groups, dim = parts.cache_shape
    source = torch.Generator(weight.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=source, device=weight.device)
        return values.to(weight.dtype)

    x, buffers = draw(batch, weight.shape[1]), draw(2, batch, groups, 2 * tokens, dim)
    lengths = tokens + torch.arange(batch, device=weight.device) % tokens
    tables = parts.decoder.rotary_emb(x[:, None], lengths[:, None])
    mask = torch.arange(2 * tokens, device=weight.device) <= lengths[:, None]
    index = layer.self_attn.layer_idx
    cache = Cache(
        layers=[Rows(buffers[0].clone(), buffers[1].clone(), lengths) for _ in range(index + 1)]
    )
    own = layer(
        x[:, None],
        attention_mask=mask_for(parts, mask[:, None, None], x.dtype),
        position_ids=lengths[:, None],
        past_key_values=cache,
        use_cache=True,
        position_embeddings=tables,
    )
    own = (own[0] if isinstance(own, tuple) else own)[:, 0]
    arrivals = torch.zeros(batch * groups, dtype=torch.int32, device=weight.device)
    cos, sin = (table[:, 0].contiguous() for table in tables)
    got = chain_layer(layer, x, cos, sin, buffers[0], buffers[1], lengths, arrivals, plan)
    # A layer that changes little is judged by what it passes on: rounding alone is as large.
    size = torch.maximum((own - x).float().norm(), own.float().norm() / 4)
    return float((got - own).float().norm() / size)


@torch.no_grad()
def prompt_error(parts: Parts, layer: Any, batch: int = 2, tokens: int = 70) -> float:
    """Relative difference to the model's own layer on a random prompt, caches included."""
    weight = parts.head.weight
    groups, dim = parts.cache_shape
    source = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(batch, tokens, weight.shape[1], generator=source, device=weight.device)
    x = x.to(weight.dtype)
    positions = torch.arange(tokens, device=weight.device).expand(batch, -1)
    lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
    wanted, got = x.new_zeros(2, 2, batch, groups, tokens + 3, dim)
    keys, values = wanted
    tables = parts.decoder.rotary_emb(x, positions)
    index = layer.self_attn.layer_idx
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
    own = layer(
        x,
        attention_mask=mask_for(parts, mask[None, None].expand(batch, -1, -1, -1), x.dtype),
        position_ids=positions,
        past_key_values=Cache(layers=[Rows(keys, values, lengths) for _ in range(index + 1)]),
        use_cache=True,
        position_embeddings=tables,
    )
    own = own[0] if isinstance(own, tuple) else own
    cos, sin = (table.expand(batch, -1, -1).contiguous() for table in tables)
    out = prefill_layer(layer, x.clone(), cos, sin, got[0], got[1])
    size = torch.maximum((own - x).float().norm(), own.float().norm() / 4)
    caches = (got - wanted).float().norm() / wanted.float().norm()
    return max(float((out - own).float().norm() / size), float(caches))


def describe(plan: Plan) -> str:
    """A plan's tiles in a few words."""
    if plan == Plan():
        return ""
    words = []
    for field in fields(Plan):
        tile = getattr(plan, field.name)
        if isinstance(tile, Tile):
            words.append(f"{field.name} {tile.rows}x{tile.columns}w{tile.warps}")
        elif field.name != "early":
            words.append(f"{field.name} torch")
    return f" ({', '.join(words)}{', early' if plan.early else ''})"
