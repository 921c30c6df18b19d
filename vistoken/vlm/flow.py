"""Dropping inside the decoder: what one forward pass carries from layer to layer.

Every decoder layer is handed the mask and the rotary tables of the whole prompt, so from the first
stage on a pre-hook replaces them, layer by layer. Layers before it, and their caches, stay whole;
so does what `generate` asks of the cache, which it counts at layer 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.errors import ConfigError
from vistoken.models.llava import LanguageHost
from vistoken.vlm.choose import ranks
from vistoken.vlm.inside import LayerMethod, Stages
from vistoken.vlm.last_row import RowTap, last_place, last_row, text_rows
from vistoken.vlm.places import asking, padding_of
from vistoken.vlm.prompt import Prepared

NOTE = "_vistoken_columns"
"""Attribute of a cache: real columns `[B, n]` at its start, by stage; None for all."""


@dataclass
class Flow:
    """One forward pass.

    Attributes:
        valid: real ones among the tokens that are left `[B, L]`, or None for all.
        image: image tokens among them `[B, L]`; None in passes that drop nothing.
        total: image tokens of every row before anything was dropped.
        left: image tokens of every row now.
        text: other real tokens of every row.
        rotary: tables at the tokens that are left, from the first stage on.
        labels: labels at the tokens that are left, or None.
        fixed: image tokens that every stage keeps `[B, L]`, or None.
        fixes: how many these are of every row.
        asks: most tokens of a row that `asking` names.
        stage: the last edge that was passed, -1 before the first.
        mask: what the layers after that edge attend to, computed once.
        notes: real columns that the cache holds, by edge.
        spans: columns that the cache held before and tokens of this pass, by edge.
        orders: what every stage kept of the tokens before it `[B, L']`, by layer.
        started: image tokens before the first stage `[B, L]`.
    """

    valid: Tensor | None
    image: Tensor | None
    total: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    text: tuple[int, ...] = ()
    rotary: tuple[Tensor, Tensor] | None = None
    labels: Tensor | None = None
    fixed: Tensor | None = None
    fixes: tuple[int, ...] = ()
    asks: int = 1
    stage: int = -1
    mask: Any = None
    notes: dict[int, Tensor | None] = field(default_factory=dict)
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    orders: dict[int, Tensor] = field(default_factory=dict)
    started: Tensor | None = None

    def __post_init__(self) -> None:
        self.started = self.image


@dataclass
class Decoder:
    """The stages of one method on one language model.

    Args:
        host: the model.
        method: the settings.
        stages: share of image tokens from each layer on.
        prompt: what cut the prompt of the coming pass before the language model, or None.
    """

    host: LanguageHost
    method: LayerMethod
    stages: Stages
    flow: Flow | None = None
    prompt: Prepared | None = None
    taps: dict[int, RowTap] = field(default_factory=dict)
    counts: tuple[tuple[int, int], ...] = ()

    @property
    def edges(self) -> tuple[int, ...]:
        """Layers from which on caches differ from those of the layers before, rising."""
        # Layer 0 stays whole: `generate` counts there.
        first = {max(1, min(self.stages) - 1)} if self.method.evicts else set()
        return tuple(sorted({*self.stages, *first}))

    def start(self, inputs: dict[str, Any], images: bool) -> None:
        """Look at a call of the model, with new images or not: what is there to drop?"""
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        tokens = ids if ids is not None else inputs.get("inputs_embeds")
        assert tokens is not None
        length = tokens.shape[1]
        notes = dict(getattr(cache, NOTE, {})) if filled(cache) else {}
        given = inputs.get("attention_mask")
        valid = padding_of(given, length, bool(notes)) if length > 1 else None
        prompt, self.prompt = self.prompt, None
        if prompt is not None:
            self.flow = _cut_before(prompt, valid, inputs.get("labels"), notes)
            self.want(self.flow)
            return
        if not images:
            self.flow = Flow(valid, None, notes=notes) if notes else None
            return
        if ids is None:
            raise ConfigError("images with inputs_embeds: pass input_ids, they say where images go")
        config: Any = self.host.base.config
        image = ids == config.image_token_id
        code = image.to(torch.uint8) if valid is None else image + 2 * valid.to(torch.uint8)
        seen = code.cpu()
        real = torch.ones_like(seen, dtype=torch.bool) if valid is None else seen & 2 == 2
        if given is not None and given.dim() == 4 and not bool(real[:, -1].all()):
            raise ConfigError(
                f"attention_mask of shape {tuple(given.shape)}: a static cache with padding on the "
                f"right cannot be cut by {self.method.name}; pad on the left"
            )
        total = tuple(((seen & 1 == 1) & real).sum(1).tolist())
        text = tuple(((seen & 1 == 0) & real).sum(1).tolist())
        if valid is not None and bool(real.all()):
            valid = None
        self.flow = Flow(
            valid, image, total, total, text, labels=inputs.get("labels"), notes=notes,
            fixes=(0,) * len(total),
        )  # fmt: skip
        self.want(self.flow)

    def want(self, flow: Flow) -> None:
        """Have the layer before the next stage keep its projections."""
        later = [stage for stage in self.taps if stage > flow.stage]
        if later and flow.image is not None:
            self.taps[min(later)].wanted = True

    def enter(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What layer `index` gets instead of `hidden` `[B, L, C]`; changes kwargs in place."""
        flow = self.flow
        assert flow is not None
        if index in self.stages and flow.image is not None:
            flow.rotary = flow.rotary or kwargs["position_embeddings"]
            hidden = self.drop(index, hidden)
        if index in self.edges:
            flow.stage = index
            flow.mask = self.mask(index, hidden, kwargs.get("past_key_values"))
            self.want(flow)
        if flow.rotary is not None:
            kwargs["position_embeddings"] = flow.rotary
            kwargs["position_ids"] = None
        kwargs["attention_mask"] = flow.mask
        return hidden

    def drop(self, index: int, hidden: Tensor) -> Tensor:
        """Keep this stage's share of image tokens; text, order and positions stay."""
        flow = self.flow
        assert flow is not None and flow.image is not None and flow.rotary is not None
        droppable = flow.image if flow.valid is None else flow.image & flow.valid
        scores = self.scores(index, hidden).masked_fill(~droppable, float("-inf"))
        if self.method.by_threshold:
            stays = scores >= 1
            flow.left = tuple(stays.sum(1).tolist())
        else:
            share, rows = self.stages[index], zip(flow.total, flow.left, flow.fixes, strict=True)
            flow.left = tuple(min(max(keep(share, n), least), left) for n, left, least in rows)
            limit = torch.tensor(flow.left).to(hidden.device, non_blocking=True)
            stays = (ranks(scores) < limit[:, None]) & droppable
        counts, stays = flow.left, stays | ~flow.image
        if flow.valid is not None:
            stays = stays & flow.valid
        self.counts = tuple(zip(flow.total, counts, strict=True))
        lengths = [text + count for text, count in zip(flow.text, counts, strict=True)]
        length = max(lengths)
        order = stays.to(torch.uint8).argsort(dim=-1, stable=True)[:, stays.shape[1] - length :]
        flow.valid = stays.gather(1, order) if min(lengths) < length else None
        flow.image = flow.image.gather(1, order)
        flow.fixed = None if flow.fixed is None else flow.fixed.gather(1, order)
        flow.orders[index] = order
        flow.rotary = tuple(  # type: ignore[assignment]
            table.expand(len(order), -1, -1).gather(
                1, order[..., None].expand(-1, -1, table.shape[-1])
            )
            for table in flow.rotary
        )
        if flow.labels is not None:
            flow.labels = flow.labels.gather(1, order)
            if flow.valid is not None:
                real = flow.valid & F.pad(flow.valid, (1, -1))
                flow.labels = flow.labels.masked_fill(~real, -100)
        return hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))

    def scores(self, index: int, hidden: Tensor) -> Tensor:
        """What every token left is worth `[B, L]`, by attention to it."""
        flow = self.flow
        assert flow is not None and flow.rotary is not None and flow.image is not None
        if self.method.row == "text":
            query, keys = self.taps[index].take()
            asks = asking(flow.image, flow.valid)
            at = asks.to(torch.uint8).argsort(dim=1, stable=True)[:, -flow.asks :]
            query = query.gather(1, at[..., None].expand(-1, -1, query.shape[-1]))
            total, peak = text_rows(
                self.host.decoder[index - 1].self_attn,  # type: ignore[arg-type]
                query, keys, flow.rotary, at, asks.gather(1, at), flow.valid,
            )  # fmt: skip
            worth = self.method.worth(total.masked_fill(~flow.image, 0), peak)
            return worth if flow.fixed is None else worth.masked_fill(flow.fixed, float("inf"))
        last = last_place(flow.valid, hidden)
        at = last[:, None, None]
        if self.method.row == "before":
            layer: Any = self.host.decoder[index - 1]
            query, keys = self.taps[index].take()
            query = query.gather(1, at.expand(-1, 1, query.shape[-1]))
        else:
            layer = self.host.decoder[index]
            with torch.no_grad():
                x = layer.input_layernorm(hidden)
                query = layer.self_attn.q_proj(x.gather(1, at.expand(-1, 1, x.shape[-1])))
                keys = layer.self_attn.k_proj(x)
        return last_row(layer.self_attn, query, keys, flow.rotary, last, flow.valid)

    def mask(self, index: int, hidden: Tensor, cache: Any) -> Any:
        """What the layers from `index` to the next stage attend to, as their attention takes it."""
        flow = self.flow
        assert flow is not None
        batch, length = hidden.shape[:2]
        kind = self.host.base.config.get_text_config()._attn_implementation  # type: ignore[union-attr, operator]
        past, columns = _columns(cache, index, length)
        flow.spans[index] = past, length
        old = flow.notes.get(index)
        if past == 0:
            old = None
        if old is None and flow.valid is None:
            flow.notes[index] = None
            whole = None
        else:
            ones = hidden.new_ones(batch, past, dtype=torch.bool)
            if old is not None:
                old = _rows(old, batch)[:, :past]  # a cropped cache ends earlier
                ones = torch.cat([old, ones[:, old.shape[1] :]], 1)
            now = hidden.new_ones(batch, length, dtype=torch.bool)
            whole = torch.cat([ones, now if flow.valid is None else flow.valid], 1)
            flow.notes[index] = whole
        causal = length == 1 or (past == 0 and kind != "eager")  # without being told
        if whole is None and columns == past + length and causal:
            return None
        if kind == "flash_attention_2":
            return whole
        if whole is None:
            whole = hidden.new_ones(batch, past + length, dtype=torch.bool)
        whole = F.pad(whole, (0, columns - whole.shape[1]))
        rows = torch.arange(past, past + length, device=hidden.device)[:, None]
        places = torch.arange(columns, device=hidden.device)
        seen = ((places <= rows) & whole[:, None] | (places == rows))[:, None]
        if kind == "sdpa":
            return seen
        floor = torch.finfo(hidden.dtype).min
        return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, floor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "flow": None, "prompt": None}


def _cut_before(
    prompt: Prepared, valid: Tensor | None, labels: Tensor | None, notes: dict[int, Tensor | None]
) -> Flow:
    """The pass of a prompt whose images were cut before the language model."""
    total, left, fixes = ([0] * len(prompt.lengths) for _ in range(3))
    for row, counts, fixed in zip(prompt.rows, prompt.images, prompt.fixes, strict=True):
        total[row] += counts[0]
        left[row] += counts[1]
        fixes[row] += fixed
    text = tuple(all_ - images for all_, images in zip(prompt.lengths, left, strict=True))
    return Flow(
        None if max(prompt.lengths) == min(prompt.lengths) else valid, prompt.image_mask,
        tuple(total), tuple(left), text, labels=labels, notes=notes, fixed=prompt.fixed,
        fixes=tuple(fixes), asks=max(prompt.asks),
    )  # fmt: skip


def keep(share: float, total: int) -> int:
    """Image tokens left of `total`."""
    return max(min(1, total), int(share * total + 1e-9))


def filled(cache: Any) -> bool:
    """Whether a cache holds anything."""
    return cache is not None and int(cache.get_seq_length()) > 0


def _columns(cache: Any, index: int, length: int) -> tuple[int, int]:
    """Columns that layer `index` holds, and that it attends to after this pass."""
    if cache is None or index >= len(cache.layers):
        return 0, length
    layer = cache.layers[index]
    past = int(layer.get_seq_length())
    fixed = layer.get_max_length() if layer.is_compileable else -1
    return past, fixed if fixed > 0 else past + length


def _rows(mask: Tensor, batch: int) -> Tensor:
    """`[B, n]` for a batch that beams may have widened."""
    return mask if len(mask) == batch else mask.repeat_interleave(batch // len(mask), 0)
