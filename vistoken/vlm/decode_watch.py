"""Noticing that a model is not the one that was recorded: modules, settings, weights, hooks."""

from __future__ import annotations

from copy import copy
from typing import Any

from vistoken.vlm.decode_layers import Parts, user_hooks


def plain(value: Any) -> bool:
    """Whether a value is a number, a word, or a list of these."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(entry, (int, float, str)) for entry in value)
    return isinstance(value, (int, float, str))


class Snapshot:
    """What recorded graphs took from a language model and its head.

    It holds modules, parameters and hooks themselves, so that none of another object can come to
    stand at the same address unseen. Values of weights may change in place: graphs read them anew.

    Args:
        parts: the model.
    """

    def __init__(self, parts: Parts) -> None:
        self.objects, self.places = _look(parts)

    def fits(self, parts: Parts) -> bool:
        """Whether modules, settings and hooks are the same, and tensors at the same places."""
        objects, places = _look(parts)
        same = len(objects) == len(self.objects) and places == self.places
        return same and all(new is old for new, old in zip(objects, self.objects, strict=True))


def _look(parts: Parts) -> tuple[list[Any], list[Any]]:
    """Objects that must stay the same ones, and values that must stay equal."""
    objects: list[Any] = []
    places: list[Any] = [parts.config._attn_implementation]
    for module in (*parts.decoder.modules(), *parts.head.modules()):
        # Settings in Python, like an adapter that is switched off, are no tensors and no hooks.
        places.append([copy(value) for value in vars(module).values() if plain(value)])
        objects += (module, module.__dict__.get("forward"), *user_hooks(module))
        tensors = (*module._parameters.values(), *module._buffers.values())
        objects += tensors
        places += [None if t is None else (t.data_ptr(), t.dtype) for t in tensors]
    return objects, places
