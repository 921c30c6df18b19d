"""Dropping inside the decoder: the hooks that carry a pass, and what refuses to be carried."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from vistoken.errors import UnsupportedMethodError
from vistoken.models.llava import LanguageHost
from vistoken.vlm.evict import evict
from vistoken.vlm.flow import NOTE, Decoder, filled
from vistoken.vlm.inside import LayerMethod
from vistoken.vlm.last_row import Keep, RowTap, check_decoder
from vistoken.vlm.places import by_name, user_positions

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
class Start:
    """Pre-hook of the model."""

    decoder: Decoder

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Prepares the pass; labels wait until the last layer is through."""
        inputs = by_name(module, args, kwargs)
        self.decoder.flow = None
        self.decoder.start(inputs, self.decoder.prompt is None and _brings_images(inputs))
        flow = self.decoder.flow
        if flow is None:
            _check_pieces(self.decoder.host, inputs)
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
        if flow is None or output is None:  # None where the pass failed
            return None
        plain = isinstance(output, tuple)  # return_dict=False
        for value in output if plain else (getattr(output, "past_key_values", None),):
            if hasattr(value, "get_query_offset"):
                if flow.orders and self.decoder.method.evicts:
                    evict(value, flow, self.decoder.edges)
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
    if ids is None or ids.shape[1] == 1 or filled(cache):
        return
    config: Any = host.base.config
    if bool((ids == config.image_token_id).any()):
        raise UnsupportedMethodError(
            "input_ids hold image tokens, but no image came along; prefill_chunk_size is not "
            "supported on a wrapped model"
        )


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


def attach_decoder(decoder: Decoder) -> list[Any]:
    """Install every hook of a method's stages; returns the handles."""
    top, layers = decoder.host.top, decoder.host.decoder
    handles: list[Any] = [
        top.register_forward_pre_hook(Start(decoder), with_kwargs=True),
        top.register_forward_hook(Finish(decoder), with_kwargs=True, always_call=True),
    ]
    for index in range(decoder.edges[0], len(layers)):
        handles.append(
            layers[index].register_forward_pre_hook(AtLayer(decoder, index), with_kwargs=True)
        )
    if decoder.method.row != "own":
        for index in decoder.stages:
            tap = decoder.taps[index] = RowTap()
            attn: Any = layers[index - 1].self_attn
            for name in ("q_proj", "k_proj"):
                handles.append(getattr(attn, name).register_forward_hook(Keep(tap, name)))
    return handles


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
