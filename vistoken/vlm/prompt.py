"""Prompts whose image tokens are cut: embeddings, mask, positions and labels together."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistoken.errors import ConfigError, UnsupportedMethodError
from vistoken.models.llava import LanguageHost, find_language
from vistoken.vlm.base import Positions, Reduced
from vistoken.vlm.cache import Short, short_of, stored
from vistoken.vlm.places import find_places, padding_of, user_positions

TAG = "_vistoken_reduced"
"""Attribute of an image's whole features that holds what a method left of them."""

BY = "_vistoken_method"
"""Attribute beside it: the method, for features may outlive what is on the model."""

SIZES = ("image_sizes", "image_grid_thw", "batch_num_images", "vision_aspect_ratio")
LAYERS = ("vision_feature_layer", "vision_feature_select_strategy")


@dataclass(frozen=True)
class Prepared:
    """A prompt as the language model gets it, after tower, projector, packing and reduction.

    Rows are right-aligned: padding is on the left, the last column is every row's last token.

    Attributes:
        inputs_embeds: `[B, L, C]`.
        attention_mask: `[B, past + L]` int64, columns of a given cache included; None when no
            column is padding.
        position_ids: `[B, L]`, or `[axes, B, L]` for three-axis rotary positions.
        lengths: real tokens of every row, without past columns.
        prompt_length: columns of the user's ids, placeholders and padding included.
        short: what the cache must remember after this prefill: `shorten(cache, short)`. The
            user's position p after the prompt is `p - short.offset` here.
        labels: `[B, L]`, -100 at padding, or None.
        images: (tokens before, tokens after) of every image, newlines included.
        features: what is left of every image `[K, C]`.
        image_mask: `[B, L]`, True at image tokens.
        rows: the row of every image.
        asks: tokens of every row that `vistoken.vlm.places.asking` names.
        fixed: `[B, L]`, True at image tokens that are to stay in every layer; None without any.
        fixes: how many these are of every image.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    lengths: tuple[int, ...]
    prompt_length: int
    short: Short
    labels: Tensor | None
    images: tuple[tuple[int, int], ...]
    features: tuple[Tensor, ...]
    image_mask: Tensor
    rows: tuple[int, ...] = ()
    asks: tuple[int, ...] = ()
    fixed: Tensor | None = None
    fixes: tuple[int, ...] = ()


def prepare(model: nn.Module, inputs: dict[str, Any]) -> Prepared:
    """Everything before the language model, for a wrapped vision-language model or a plain one.

    Args:
        model: the transformers model that generates.
        inputs: what its processor returned: `input_ids` `[B, L]` and, with images, `pixel_values`
            and the family's sizes; optionally `attention_mask`, `position_ids`, `labels`,
            `past_key_values`.

    Raises:
        ConfigError: placeholders and images do not match, or `input_ids` are missing.
        UnsupportedMethodError: videos, features that were encoded without scores, or a method
            that drops tokens inside the language model.
        UnsupportedBackboneError: no vision-language model of a known family.
    """
    attachment: Any = model.__dict__.get("_vistoken")
    host = getattr(attachment, "host", None)
    host = host if isinstance(host, LanguageHost) else find_language(model)
    if getattr(attachment, "decoder", None) is not None and attachment.handles:
        raise UnsupportedMethodError(
            f"{attachment.method.to_string()} drops tokens inside the language model; only "
            "methods that cut the prompt before it can be prepared"
        )
    positions: Positions = getattr(attachment, "positions", "compact")
    reduces = getattr(attachment, "reduces", False)
    prepared = shorten_prompt(host, inputs, positions, reduces)
    if reduces:
        attachment.counts = prepared.images
    return prepared


def shorten_prompt(
    host: LanguageHost, inputs: dict[str, Any], positions: Positions, reduces: bool
) -> Prepared:
    """Encode the images, find their placeholders and build the short prompt.

    Args:
        host: the model.
        inputs: the user's call, as for `prepare`.
        positions: how the short prompt is numbered.
        reduces: whether the model carries a method, so that features must come with scores.
    """
    ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    if ids is None:
        raise ConfigError("images with inputs_embeds: pass input_ids, they say where images go")
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise ConfigError("logits_to_keep: indices do not fit a shortened prompt; pass a number")
    images = encode_images(host, inputs, reduces)
    base: Any = host.base
    mark = base.config.image_token_id
    past, is_image = short_of(cache), ids == mark
    mask = padding_of(inputs.get("attention_mask"), ids.shape[1], past is not None)
    places = find_places(is_image, mask, [whole for whole, _ in images])
    lengths = places.lengths([r.index.shape[0] for _, r in images])
    keep = ~is_image if mask is None else ~is_image & mask
    if images:
        spans = zip(places.spans, images, strict=True)
        kept = torch.cat([places.flat[span][r.index] for span, (_, r) in spans])
        keep = keep.flatten().index_fill(0, kept, True).view_as(keep)
    length = max(*lengths, 1)
    order = keep.to(torch.uint8).argsort(dim=-1, stable=True)[:, ids.shape[1] - length :]
    valid = keep.gather(1, order) if min(lengths) < length else None
    short_ids = _cut(ids, order, valid, 0)
    embeds = base.get_input_embeddings()(short_ids)
    here = short_ids == mark
    if images:
        features = torch.cat([r.features for _, r in images]).to(embeds.device, embeds.dtype)
        embeds = embeds.masked_scatter(here[..., None], features)
    gaps = positions == "original" or host.spec.rotary_3d
    user = user_positions(host, inputs, ids)
    old = user if past is None or past.offset is None else user - past.offset
    if not gaps:
        gone = ~keep if mask is None else ~keep & mask
        old = old - gone.long().cumsum(-1)
    new = _cut(old, order, valid, 0)
    columns = int(stored(cache))
    whole = _whole_mask(inputs, columns, valid, (ids.shape[0], length))
    if whole is None and cache is None and gaps:
        # Without mask and cache, gaps in the positions would be read as packed sequences.
        whole = torch.ones_like(short_ids)
    labels = inputs.get("labels")
    length_before = 0 if cache is None else int(cache.get_seq_length())
    return Prepared(
        inputs_embeds=embeds,
        attention_mask=whole,
        position_ids=new,
        lengths=lengths,
        prompt_length=ids.shape[1],
        short=Short(
            length=length_before + ids.shape[1],
            columns=columns + length,
            valid=None if whole is None else whole.bool(),
            offset=user[..., -1:] - new[..., -1:],
        ),
        labels=None if labels is None else _cut_labels(labels, order, valid),
        images=tuple((whole_count, r.index.shape[0]) for whole_count, r in images),
        features=tuple(r.features for _, r in images),
        image_mask=here,
        rows=places.rows,
        asks=places.asks,
        fixed=_fixed(here, [r for _, r in images]),
        fixes=tuple(r.fixes for _, r in images),
    )


def _fixed(here: Tensor, images: list[Reduced]) -> Tensor | None:
    """True at the tokens of images that are to stay `[B, L]`, where a method names any."""
    marks = [r.fixed for r in images if r.fixed is not None]
    return torch.zeros_like(here).masked_scatter(here, torch.cat(marks)) if marks else None


def _cut(values: Tensor, order: Tensor, valid: Tensor | None, fill: int) -> Tensor:
    """`[.., B, L]` at the tokens that stay, `fill` at padding."""
    index = order.expand(*values.shape[:-2], *order.shape)
    found = values.gather(-1, index)
    return found if valid is None else found.masked_fill(~valid, fill)


def _cut_labels(labels: Tensor, order: Tensor, valid: Tensor | None) -> Tensor:
    """Labels at the tokens that stay; a row's first one has nothing to be predicted from."""
    labels = _cut(labels, order, valid, -100)
    return labels if valid is None else labels.masked_fill(~F.pad(valid, (1, -1)), -100)


def _whole_mask(
    inputs: dict[str, Any], columns: int, valid: Tensor | None, shape: tuple[int, int]
) -> Tensor | None:
    """Mask over stored columns and the short prompt `[B, columns + L']`; None if all are real."""
    before = past_mask(inputs, columns) if columns else None
    if before is None and valid is None:
        return None
    ids: Tensor = inputs["input_ids"]
    if before is None:
        before = ids.new_ones(shape[0], columns)
    now = ids.new_ones(shape) if valid is None else valid.long()
    return torch.cat([before.long(), now], 1)


def past_mask(inputs: dict[str, Any], columns: int) -> Tensor | None:
    """Real ones among the columns that a cache stores `[B, columns]`, or None for all."""
    cache, mask = inputs["past_key_values"], inputs.get("attention_mask")
    tokens: Tensor = inputs["input_ids"]
    short = short_of(cache)
    user = mask if mask is not None and mask.dim() == 2 else None
    user = None if user is None else user[:, : user.shape[1] - tokens.shape[1]]
    if short is None:
        return user
    if user is None and short.valid is None:
        return None
    known = short.valid
    if known is None:
        known = tokens.new_ones(tokens.shape[0], short.columns)
    elif known.shape[0] != tokens.shape[0]:
        known = known.repeat_interleave(tokens.shape[0] // known.shape[0], 0)
    rest = tokens.new_ones(tokens.shape[0], columns - short.columns)
    if user is not None:
        rest = user[:, short.length :]
    return torch.cat([known.long(), rest.long()], 1)


def encode_images(
    host: LanguageHost, inputs: dict[str, Any], reduces: bool
) -> list[tuple[int, Reduced]]:
    """Whole length and remainder of every image, in prompt order."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    if inputs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        raise UnsupportedMethodError("videos cannot be reduced; vistoken.unwrap(model) for them")
    output, pixels = encoded.get("image"), inputs.get("pixel_values")
    if output is None:
        if pixels is None or pixels.shape[0] == 0:
            return []
        encode: Any = host.base.get_image_features
        known = inspect.signature(encode).parameters
        names = [n for n in (*SIZES, *LAYERS) if n in known and inputs.get(n) is not None]
        output = encode(pixels, **{name: inputs[name] for name in names}, return_dict=True)
    method = getattr(host.base.__dict__.get("get_image_features"), "method", None)
    found = []
    for features in output.pooler_output:
        ours = getattr(features, BY, None) == method
        reduced: Reduced | None = getattr(features, TAG, None) if ours else None
        if reduced is None:
            if reduces:
                raise UnsupportedMethodError(
                    "image features came without scores: features encoded under another method and "
                    "prefill_chunk_size are not supported; pass pixel_values in one piece"
                )
            reduced = Reduced(features, torch.arange(features.shape[0], device=features.device))
        found.append((features.shape[0], reduced))
    return found
