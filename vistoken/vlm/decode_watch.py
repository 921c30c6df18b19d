"""Noticing that a model is not the one that was recorded: modules, weights' places and hooks."""

from __future__ import annotations

from typing import Any

from vistoken.vlm.decode_layers import Parts, user_hooks


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
        """Whether the model still has the same modules, hooks, and tensors at the same places."""
        objects, places = _look(parts)
        same = len(objects) == len(self.objects) and places == self.places
        return same and all(new is old for new, old in zip(objects, self.objects, strict=True))


def _look(parts: Parts) -> tuple[list[Any], list[Any]]:
    """Objects that must stay the same ones, and values that must stay equal."""
    objects: list[Any] = []
    places: list[Any] = [parts.config._attn_implementation]
    for module in (*parts.decoder.modules(), *parts.head.modules()):
        objects += (module, module.__dict__.get("forward"), *user_hooks(module))
        tensors = (*module._parameters.values(), *module._buffers.values())
        objects += tensors
        places += [None if t is None else (t.data_ptr(), t.dtype) for t in tensors]
    return objects, places
