"""Putting a method on a vision-language model: two hooks on the model, some on its tower."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.errors import UnsupportedMethodError
from vistoken.models.llava import LanguageHost, find_language
from vistoken.vlm.base import Image, ImageMethod, LanguageMethod, Positions
from vistoken.vlm.cache import short_of, shorten
from vistoken.vlm.flow import Decoder
from vistoken.vlm.flow_hooks import Encoder as WholeEncoder
from vistoken.vlm.flow_hooks import attach_decoder, make_decoder
from vistoken.vlm.inside import LayerMethod
from vistoken.vlm.layout import Layout, layout_of
from vistoken.vlm.places import by_name, padding_of, user_positions
from vistoken.vlm.prompt import BY, LAYERS, SIZES, TAG, Prepared, past_mask, shorten_prompt
from vistoken.vlm.rows import RowReader

DROPPED = (
    "input_ids", "pixel_values", *SIZES, *LAYERS, "mm_encoder_outputs", "mm_token_type_ids",
    "token_type_ids", "cache_position",
)  # fmt: skip
LAYOUTS_KEPT = 256


class Encoder:
    """`get_image_features` of one model, followed by scores and selection.

    The features stay whole; what is left of an image hangs on its tensor, for beam search repeats
    those tensors by reference.

    Args:
        host: the model.
        method: the settings.
        reader: reads the class rows that the method needs.
    """

    def __init__(self, host: LanguageHost, method: ImageMethod, reader: RowReader) -> None:
        self.host = host
        self.method = method
        self.reader = reader
        self.plain = host.base.get_image_features
        self.__signature__ = inspect.signature(self.plain)  # type: ignore[arg-type]
        self.layouts: dict[tuple[Any, ...], Layout] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The host's output, with every image's features tagged; takes what the host takes."""
        plain: Any = self.plain
        bound = self.__signature__.bind(*args, **kwargs).arguments
        kwargs["return_dict"] = True
        output = plain(*args, **kwargs)
        features = list(output.pooler_output)
        rows, outputs, start = self.reader.take(), self.reader.take_outputs(), 0
        for one, layout in zip(features, self.plan(features, bound), strict=True):
            parts = len(layout.sizes)
            mine = {index: row.part(start, parts) for index, row in rows.items()}
            seen = {index: out[start : start + parts] for index, out in outputs.items()}
            start += parts
            image = Image(one, layout.to(one.device), self.host.consumed, mine, seen)
            setattr(one, TAG, self.method.reduce(image))
            setattr(one, BY, self.method)
        output.pooler_output = features
        return output

    def plan(self, features: Sequence[Tensor], bound: dict[str, Any]) -> list[Layout]:
        """The layout of every image, from its size alone."""
        sizes: Any = bound.get("image_sizes")
        sizes = None if sizes is None else torch.as_tensor(sizes).tolist()
        alone = _alone(bound.get("batch_num_images"), len(features))
        found = []
        for index, one in enumerate(features):
            size = tuple(sizes[index]) if sizes is not None else None
            key = (one.shape[0], size, alone[index])
            if key not in self.layouts:
                if len(self.layouts) >= LAYOUTS_KEPT:
                    self.layouts.clear()
                self.layouts[key] = layout_of(self.host, one.shape[0], size, not alone[index])
            found.append(self.layouts[key])
        return found


def _alone(numbers: Any, images: int) -> list[bool]:
    """Whether each image is its prompt's only one; several are encoded as one partition each."""
    if numbers is None:
        return [True] * images
    counts: list[int] = torch.as_tensor(numbers).tolist()
    return [count == 1 for count in counts for _ in range(count)]


@dataclass(frozen=True)
class LanguageInfo:
    """What `vistoken.info` says about a wrapped vision-language model.

    Attributes:
        method: its settings in command-line form.
        family: the model's family.
        images: (image tokens before, after) of the last call: of every image, or for methods
            inside the language model of every prompt, in the last layers.
    """

    method: str
    family: str
    images: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        cuts = ", ".join(f"{before} -> {after}" for before, after in self.images)
        return f"{self.method} on {self.family}: image tokens {cuts or 'not yet seen'}"


@dataclass
class LanguageAttachment:
    """One method on one vision-language model.

    Attributes:
        host: the model's parts.
        method: the settings.
        reduces: whether image tokens are cut before the language model.
        positions: how short prompts are numbered.
        handles: everything installed.
        pending: the prompt that is running.
        counts: (tokens before, after) of the last images.
        decoder: the stages inside the language model, for methods that have them.
    """

    host: LanguageHost
    method: LanguageMethod
    reduces: bool = False
    positions: Positions = "compact"
    handles: list[Any] = field(default_factory=list)
    pending: Prepared | None = None
    counts: tuple[tuple[int, int], ...] = ()
    decoder: Decoder | None = None

    def detach(self) -> None:
        """Take everything off again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.host.base.__dict__.pop("get_image_features", None)

    def describe(self) -> LanguageInfo:
        """What `vistoken.info` returns."""
        counts = self.counts if self.decoder is None else self.decoder.counts
        return LanguageInfo(self.method.to_string(), self.host.spec.family, counts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": None}


def attach(model: nn.Module, method: LanguageMethod) -> LanguageAttachment:
    """Check the method against the model, then install it.

    Raises:
        UnsupportedBackboneError: no vision-language model of a known family.
        UnsupportedMethodError: the model lacks what the method reads.
    """
    host = find_language(model)
    if model is not host.top:
        raise UnsupportedMethodError("pass the model that has generate(), not a module around it")
    attachment = LanguageAttachment(host, method)
    if isinstance(method, ImageMethod):
        method.check_host(host)
    if isinstance(method, LayerMethod):
        attachment.decoder = make_decoder(host, method)
    if method.idle:
        return attachment
    if isinstance(method, ImageMethod):
        _attach_before(attachment, method.fitted(host))
    if attachment.decoder is not None and attachment.decoder.stages:
        if not isinstance(method, ImageMethod):
            host.base.__dict__["get_image_features"] = WholeEncoder(host)
        attachment.handles += attach_decoder(attachment.decoder)
    return attachment


def _attach_before(attachment: LanguageAttachment, method: ImageMethod) -> None:
    """Install what cuts prompts before the language model."""
    host = attachment.host
    attachment.reduces, attachment.positions = True, method.positions
    reader = RowReader(method.layers(host), method.watched(host))
    reader.attach(host)
    host.base.__dict__["get_image_features"] = Encoder(host, method, reader)
    attachment.handles += [
        reader,
        host.top.register_forward_pre_hook(Enter(attachment), with_kwargs=True),
        host.top.register_forward_hook(Leave(attachment), with_kwargs=True, always_call=True),
    ]


@dataclass
class Enter:
    """Pre-hook of the model: shortens prompts with images, translates the steps after them."""

    attachment: LanguageAttachment

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """The call with the short prompt, or None to leave it alone."""
        attachment = self.attachment
        attachment.pending = None
        if attachment.decoder is not None:
            attachment.decoder.prompt = None
        inputs = by_name(module, args, kwargs)
        if has_images(inputs):
            prepared = shorten_prompt(attachment.host, inputs, attachment.positions, True)
            attachment.pending, attachment.counts = prepared, prepared.images
            if attachment.decoder is not None:
                attachment.decoder.prompt = prepared
            kept = {name: value for name, value in inputs.items() if name not in DROPPED}
            kept.update(
                inputs_embeds=prepared.inputs_embeds,
                attention_mask=prepared.attention_mask,
                position_ids=prepared.position_ids,
            )
            if prepared.labels is not None:
                kept["labels"] = prepared.labels
            return (), kept
        if short_of(inputs.get("past_key_values")) is not None:
            return (), later_step(attachment.host, inputs)
        check_pieces(attachment.host, inputs)
        return None


@dataclass
class Leave:
    """Post-hook of the model: the cache learns what the prompt lost; a pass that failed is over."""

    attachment: LanguageAttachment

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        prepared, self.attachment.pending = self.attachment.pending, None
        if prepared is None:
            return
        found = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        for value in found:
            if hasattr(value, "get_query_offset"):
                shorten(value, prepared.short)
        if hasattr(output, "image_hidden_states"):
            output.image_hidden_states = torch.cat(prepared.features)


def has_images(inputs: dict[str, Any]) -> bool:
    """Whether a call brings images or videos."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    pixels = (inputs.get("pixel_values"), inputs.get("pixel_values_videos"))
    return any(value is not None for value in (*pixels, *encoded.values()))


def later_step(host: LanguageHost, inputs: dict[str, Any]) -> dict[str, Any]:
    """A step after a short prompt, in the short prompt's columns and positions."""
    cache = inputs["past_key_values"]
    short = short_of(cache)
    assert short is not None
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs["inputs_embeds"][..., 0].long()
    batch, length = tokens.shape
    positions = user_positions(host, inputs, tokens)
    if short.offset is not None:
        offset = short.offset
        if offset.shape[-2] not in (1, batch):
            offset = offset.repeat_interleave(batch // offset.shape[-2], -2)
        positions = positions - offset
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 4:
        padding_of(mask, length, past=True)
        # A static cache: its mask is as long as what is stored, but tells the user's padding.
        known = short.valid
        if known is None:
            known = tokens.new_ones(batch, short.columns)
        rest = tokens.new_ones(batch, mask.shape[-1] - short.columns)
        mask = torch.cat([known.long(), rest], 1)
    elif mask is not None or short.valid is not None:
        columns = int(cache.get_query_offset())
        before = past_mask({**inputs, "input_ids": tokens}, columns)
        now = tokens.new_ones(batch, length) if mask is None else mask[:, -length:]
        mask = None if before is None else torch.cat([before.long(), now.long()], 1)
    return {**inputs, "attention_mask": mask, "position_ids": positions}


def check_pieces(host: LanguageHost, inputs: dict[str, Any]) -> None:
    """Raise where a prompt holds placeholders but its images did not come with it."""
    ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    if ids is None or ids.shape[1] == 1 or (cache is not None and int(cache.get_seq_length()) > 0):
        return
    config: Any = host.base.config
    if bool((ids == config.image_token_id).any()):
        raise UnsupportedMethodError(
            "input_ids hold image tokens, but no image came along; prefill_chunk_size is not "
            "supported on a wrapped model"
        )
