"""Which placeholders of a prompt belong to which image, and the user's positions."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.errors import ConfigError
from vistoken.models.llava import LanguageHost


@dataclass(frozen=True)
class Places:
    """The image tokens of a batch of prompts.

    Attributes:
        flat: indices into `input_ids.flatten()` of all placeholders, rising, on the device.
        spans: the slice of `flat` that every image owns.
        rows: the row of every image.
        text: other real tokens of every row.
        asks: how many of every row's tokens are those of `asking`.
    """

    flat: Tensor
    spans: tuple[slice, ...]
    rows: tuple[int, ...]
    text: tuple[int, ...]
    asks: tuple[int, ...]

    def lengths(self, kept: list[int]) -> tuple[int, ...]:
        """Real tokens of every row when each image keeps so many."""
        tokens = list(self.text)
        for row, count in zip(self.rows, kept, strict=True):
            tokens[row] += count
        return tuple(tokens)


def find_places(is_image: Tensor, mask: Tensor | None, wholes: list[int]) -> Places:
    """Give every image its placeholders; the one place where the host waits for the ids.

    Args:
        is_image: `[B, L]`, True at placeholders.
        mask: `[B, L]`, True at real tokens, or None for all.
        wholes: image tokens of every image, in prompt order.

    Raises:
        ConfigError: an image does not fill its placeholders, even where the totals agree.
    """
    code = is_image.to(torch.uint8) if mask is None else is_image + 2 * mask.to(torch.uint8)
    host = code.cpu()
    image = host & 1 == 1
    real = torch.ones_like(image) if mask is None else host & 2 == 2
    width = image.shape[1]
    flat = image.flatten().nonzero().flatten()
    edge = (flat[1:] != flat[:-1] + 1) | (flat[1:] // width != flat[:-1] // width)
    cuts = [*(edge.nonzero().flatten() + 1).tolist(), flat.shape[0]]
    spans, rows, start = [], [], 0
    for number, whole in enumerate(wholes):
        stop = start + whole
        if stop > flat.shape[0] or any(start < cut < stop for cut in cuts):
            raise ConfigError(
                f"image {number} has {whole} tokens, but its placeholders in input_ids are not "
                f"{whole} in a row; are images and text in the same order?"
            )
        spans.append(slice(start, stop))
        rows.append(int(flat[start]) // width)
        start = stop
    if start != flat.shape[0]:
        raise ConfigError(f"input_ids hold {flat.shape[0]} image tokens, the images make {start}")
    text = (real & ~image).sum(1).tolist()
    asks = asking(image, real).sum(1).tolist()
    flat = flat.to(is_image.device, non_blocking=True)
    return Places(flat, tuple(spans), tuple(rows), tuple(text), tuple(asks))


def asking(image: Tensor, valid: Tensor | None) -> Tensor:
    """True at the text behind a row's first image and at its last token `[B, L]`.

    Args:
        image: True at image tokens `[B, L]`.
        valid: True at real tokens `[B, L]`, or None for all.
    """
    places = torch.arange(image.shape[1], device=image.device)
    last = places[-1] if valid is None else (valid * places).amax(1, keepdim=True)
    found = (image.cumsum(1) > 0) & ~image | (places == last)
    return found if valid is None else found & valid


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments as keywords; the signature is read only where there are others."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def user_positions(host: LanguageHost, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Positions as the plain model would number these tokens: `[B, L]` or `[axes, B, L]`.

    Args:
        host: the model.
        inputs: the user's call.
        tokens: `input_ids` `[B, L]`.
    """
    given: Tensor | None = inputs.get("position_ids")
    batch, length = tokens.shape
    cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
    if given is not None:
        given = given[..., -length:].expand(*given.shape[:-2], batch, length)
        if mask is None or mask.dim() != 2 or given.dim() != 2:
            return given
        return _behind_padding(given, mask)
    if host.spec.rotary_3d:
        found = _three_axes(host, inputs, tokens)
        if found is not None:
            return found
    if mask is not None and mask.dim() == 2:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    else:
        start = 0 if cache is None else cache.get_seq_length()
        row = torch.arange(length, device=tokens.device) + start
        positions = row.expand(batch, length)
    axes: Tensor = positions.expand(3, batch, length) if host.spec.rotary_3d else positions
    return axes


def _behind_padding(given: Tensor, mask: Tensor) -> Tensor:
    """Positions `[B, L]`, true also behind padding on the right, by the mask `[B, past + L]`.

    `generate` numbers padding 0 and counts on from there, but numbers the next turn by the mask.
    """
    real = mask.long()
    count = real.cumsum(-1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    pad = (columns * (1 - real)).amax(-1, keepdim=True)
    inner = (real.gather(1, pad) == 0) & (count.gather(1, pad) > 0)
    wrong = inner & (given == (columns - pad)[:, -given.shape[1] :])
    return torch.where(wrong, count[:, -given.shape[1] :] - 1, given)


def _three_axes(host: LanguageHost, inputs: dict[str, Any], tokens: Tensor) -> Tensor | None:
    """Positions by the model's own rule, which also notes its offset for later steps."""
    base: Any = host.base
    known = inspect.signature(base.compute_3d_position_ids).parameters
    given = {name: inputs.get(name) for name in known if name in inputs}
    given.setdefault("image_grid_thw", None)
    given.setdefault("video_grid_thw", None)
    given.setdefault("attention_mask", None)
    given.setdefault("past_key_values", None)
    given.update(input_ids=tokens, inputs_embeds=tokens[..., None])
    found: Tensor | None = base.compute_3d_position_ids(**given)
    return found


def padding_of(mask: Tensor | None, length: int, past: bool) -> Tensor | None:
    """True at the real ones of the last `length` tokens `[B, length]`, or None for all.

    Raises:
        ConfigError: a four-axis mask that no longer tells padding.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    if past:
        if mask.shape[0] > 1 and length > 1:
            raise ConfigError(
                f"attention_mask of shape {tuple(mask.shape)}: in a later turn of a static cache "
                "it no longer tells which of the new tokens are padding; give one row, or a "
                "dynamic cache"
            )
        return None
    row = mask[:, 0, -1, :length]
    return row if row.dtype == torch.bool else row == 0
