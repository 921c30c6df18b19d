"""Dropping inside the decoder: what one forward pass carries from layer to layer.

Every decoder layer is handed the mask and the rotary tables of the whole prompt, so from the first
stage on a pre-hook replaces them, layer by layer. Layers before it, and their caches, stay whole;
so does what `generate` asks of the cache, which it counts at layer 0.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistoken.errors import ConfigError, UnsupportedMethodError
from vistoken.models.llava import LanguageHost
from vistoken.vlm.choose import ranks
from vistoken.vlm.inside import LayerMethod, Stages
from vistoken.vlm.last_row import Keep, RowTap, check_decoder, last_place, last_row
from vistoken.vlm.places import by_name, padding_of, user_positions

NOTE = "_vistoken_columns"
"""Attribute of a cache: real columns `[B, n]` at its start, by stage; None for all."""


WHOLE = "_vistoken_whole"
"""Attribute of encoded images that reach the model in one piece."""


class Encoder:
    """`get_image_features` of one model; marks what it returns, for pieces of it lose the mark.

    Args:
        host: the model.
    """

    def __init__(self, host: LanguageHost) -> None:
        plain: Any = host.base.get_image_features
        self.plain = plain
        self.__signature__ = inspect.signature(plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The host's output, marked; takes what the host takes."""
        output = self.plain(*args, **kwargs)
        if not isinstance(output, tuple):
            setattr(output, WHOLE, True)
        return output


@dataclass
class Flow:
    """One forward pass.

    Attributes:
        valid: real ones among the tokens that are left `[B, L]`, or None for all.
        image: image tokens among them `[B, L]`; None in passes that drop nothing.
        total: image tokens of every row before any stage.
        text: other real tokens of every row.
        rotary: tables at the tokens that are left, from the first stage on.
        labels: labels at the tokens that are left, or None.
        stage: the last stage that was entered, -1 before the first.
        masks: what the layers after a stage attend to, computed once.
        notes: real columns that the cache holds, by stage.
    """

    valid: Tensor | None
    image: Tensor | None
    total: tuple[int, ...]
    text: tuple[int, ...]
    rotary: tuple[Tensor, Tensor] | None = None
    labels: Tensor | None = None
    stage: int = -1
    mask: Any = None
    notes: dict[int, Tensor | None] = field(default_factory=dict)


@dataclass
class Decoder:
    """The stages of one method on one language model.

    Args:
        host: the model.
        method: the settings.
        stages: share of image tokens from each layer on.
    """

    host: LanguageHost
    method: LayerMethod
    stages: Stages
    flow: Flow | None = None
    taps: dict[int, RowTap] = field(default_factory=dict)
    counts: tuple[tuple[int, int], ...] = ()

    def attach(self) -> list[Any]:
        """Install every hook; returns the handles."""
        top, layers = self.host.top, self.host.decoder
        self.host.base.__dict__["get_image_features"] = Encoder(self.host)
        handles: list[Any] = [
            top.register_forward_pre_hook(Start(self), with_kwargs=True),
            top.register_forward_hook(Finish(self), with_kwargs=True),
        ]
        for index in range(min(self.stages), len(layers)):
            handles.append(
                layers[index].register_forward_pre_hook(AtLayer(self, index), with_kwargs=True)
            )
        if self.method.row == "before":
            for index in self.stages:
                tap = self.taps[index] = RowTap()
                attn: Any = layers[index - 1].self_attn
                for name in ("q_proj", "k_proj"):
                    handles.append(getattr(attn, name).register_forward_hook(Keep(tap, name)))
        return handles

    def start(self, inputs: dict[str, Any]) -> None:
        """Look at a call of the model: is there something to drop, and what is padding?"""
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        tokens = ids if ids is not None else inputs.get("inputs_embeds")
        assert tokens is not None
        length = tokens.shape[1]
        notes = dict(getattr(cache, NOTE, {})) if _filled(cache) else {}
        given = inputs.get("attention_mask")
        valid = padding_of(given, length, bool(notes)) if length > 1 else None
        if not _brings_images(inputs):
            self.flow = Flow(valid, None, (), (), notes=notes) if notes else None
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
        self.flow = Flow(valid, image, total, text, labels=inputs.get("labels"), notes=notes)
        least = min(self.stages.values())
        self.counts = tuple((count, keep(least, count)) for count in total)
        first = self.taps.get(min(self.stages))
        if first is not None:
            first.wanted = True

    def enter(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What layer `index` gets instead of `hidden` `[B, L, C]`; changes kwargs in place."""
        flow = self.flow
        assert flow is not None
        if index in self.stages:
            if flow.image is not None:
                flow.rotary = flow.rotary or kwargs["position_embeddings"]
                hidden = self.drop(index, hidden)
            flow.stage, flow.mask = index, None
            later = [stage for stage in self.stages if stage > index]
            if later and flow.image is not None and self.taps:
                self.taps[min(later)].wanted = True
        if flow.rotary is not None:
            kwargs["position_embeddings"] = flow.rotary
            kwargs["position_ids"] = None
        if index == flow.stage:
            flow.mask = self.mask(index, hidden, kwargs.get("past_key_values"))
        kwargs["attention_mask"] = flow.mask
        return hidden

    def drop(self, index: int, hidden: Tensor) -> Tensor:
        """Keep this stage's share of image tokens; text, order and positions stay."""
        flow = self.flow
        assert flow is not None and flow.image is not None and flow.rotary is not None
        counts = [keep(self.stages[index], total) for total in flow.total]
        scores = self.scores(index, hidden).masked_fill(~flow.image, float("-inf"))
        limit = torch.tensor(counts).to(hidden.device, non_blocking=True)
        stays = (ranks(scores) < limit[:, None]) & flow.image | ~flow.image
        if flow.valid is not None:
            stays = stays & flow.valid
        lengths = [text + count for text, count in zip(flow.text, counts, strict=True)]
        length = max(lengths)
        order = stays.to(torch.uint8).argsort(dim=-1, stable=True)[:, stays.shape[1] - length :]
        flow.valid = stays.gather(1, order) if min(lengths) < length else None
        flow.image = flow.image.gather(1, order)
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
        """Attention of the last token to every token left `[B, L]`."""
        flow = self.flow
        assert flow is not None and flow.rotary is not None
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
        return {**self.__dict__, "flow": None}


def keep(share: float, total: int) -> int:
    """Image tokens left of `total`."""
    return max(min(1, total), int(share * total + 1e-9))


def _filled(cache: Any) -> bool:
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


def _brings_images(inputs: dict[str, Any]) -> bool:
    """Whether a call brings images.

    Raises:
        UnsupportedMethodError: it brings videos.
    """
    encoded = inputs.get("mm_encoder_outputs") or {}
    if inputs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        raise UnsupportedMethodError("videos cannot be reduced; vistoken.unwrap(model) for them")
    output = encoded.get("image")
    if output is not None and not getattr(output, WHOLE, False):
        raise UnsupportedMethodError(
            "image features came in pieces or from elsewhere: features encoded before wrap() and "
            "prefill_chunk_size are not supported; pass pixel_values in one piece"
        )
    return inputs.get("pixel_values") is not None or output is not None


@dataclass
class Start:
    """Pre-hook of the model."""

    decoder: Decoder

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Prepares the pass; labels wait until the last layer is through."""
        inputs = by_name(module, args, kwargs)
        self.decoder.flow = None
        self.decoder.start(inputs)
        flow = self.decoder.flow
        if flow is None:
            _check_pieces(self.decoder.host, inputs)
        if flow is None:
            return None
        if inputs.get("input_ids") is not None and inputs.get("position_ids") is not None:
            inputs["position_ids"] = user_positions(self.decoder.host, inputs, inputs["input_ids"])
        if flow.labels is None:
            return (), inputs
        language: Any = self.decoder.host.base.language_model
        if getattr(language, "gradient_checkpointing", False) and module.training:
            raise UnsupportedMethodError(
                f"{self.decoder.method.name} cannot run under gradient checkpointing"
            )
        return (), {**inputs, "labels": None}


@dataclass
class Finish:
    """Post-hook of the model: the cache notes its columns, the loss is taken on what is left."""

    decoder: Decoder

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        flow, self.decoder.flow = self.decoder.flow, None
        if flow is None:
            return None
        plain = isinstance(output, tuple)  # return_dict=False
        for value in output if plain else (getattr(output, "past_key_values", None),):
            if hasattr(value, "get_query_offset"):
                setattr(value, NOTE, flow.notes)
        if flow.labels is None:
            return None
        size = self.decoder.host.base.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        # A trainer that accumulates gradients says by how many labels the sum is divided.
        total = {n: kwargs[n] for n in ("num_items_in_batch",) if kwargs.get(n) is not None}
        logits = output[0] if plain else output.logits
        loss = module.loss_function(logits=logits, labels=flow.labels, vocab_size=size, **total)
        if plain:
            return (loss, *output)
        output.loss = loss
        return None


@dataclass
class AtLayer:
    """Pre-hook of a decoder layer."""

    decoder: Decoder
    index: int

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """The layer's call with what is left of the prompt."""
        if self.decoder.flow is None:
            return None
        hidden = args[0] if args else kwargs.pop("hidden_states")
        kwargs = dict(kwargs)
        hidden = self.decoder.enter(self.index, hidden, kwargs)
        return (hidden, *args[1:]), kwargs


def _check_pieces(host: LanguageHost, inputs: dict[str, Any]) -> None:
    """Raise where placeholders come without their images."""
    ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    if ids is None or ids.shape[1] == 1 or _filled(cache):
        return
    config: Any = host.base.config
    if bool((ids == config.image_token_id).any()):
        raise UnsupportedMethodError(
            "input_ids hold image tokens, but no image came along; prefill_chunk_size is not "
            "supported on a wrapped model"
        )


def make_decoder(host: LanguageHost, method: LayerMethod) -> Decoder:
    """The stages of a method, checked against the model; installs nothing.

    Raises:
        UnsupportedMethodError: the language model's layers cannot be read.
        ScheduleError: the model has fewer layers than the settings name.
    """
    if host.spec.rotary_3d:
        raise UnsupportedMethodError(
            f"{method.name}: {host.spec.family} turns queries and keys along three axes"
        )
    config: Any = host.base.config
    check_decoder(host.decoder, config.get_text_config(), method.name)
    return Decoder(host, method, method.stages(len(host.decoder)))
