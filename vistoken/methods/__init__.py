"""One published method per file, and the table that the command line reads.

Adding a method: one file here with a frozen dataclass, one test file, one line in `METHODS`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vistoken.errors import ConfigError
from vistoken.methods.base import Features, Method, Need, parse_value
from vistoken.methods.baselines import Pool, RandomDrop
from vistoken.methods.diffrate import DiffRate
from vistoken.methods.evit import EViT
from vistoken.methods.hosted import HostedAttachment, HostedMethod, hosted_methods
from vistoken.methods.mctf import MCTF
from vistoken.methods.neighborhood import NeighborhoodAttention
from vistoken.methods.routing import BiLevelRouting
from vistoken.methods.sparse import SparseAttention
from vistoken.methods.tofu import ToFu
from vistoken.methods.tome import ToMe
from vistoken.methods.zero_tprune import ZeroTPrune

__all__ = [
    "ATTENTIONS",
    "MCTF",
    "METHODS",
    "BiLevelRouting",
    "DiffRate",
    "EViT",
    "Features",
    "HostedAttachment",
    "HostedMethod",
    "Method",
    "Need",
    "NeighborhoodAttention",
    "Pool",
    "RandomDrop",
    "SparseAttention",
    "ToFu",
    "ToMe",
    "ZeroTPrune",
    "hosted_methods",
    "parse",
]

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (ToMe, DiffRate, ZeroTPrune, EViT, ToFu, MCTF, RandomDrop, Pool)
}
"""Every method that reduces tokens, by its command-line name."""

ATTENTIONS: dict[str, type[SparseAttention]] = {
    cls.name: cls for cls in (NeighborhoodAttention, BiLevelRouting)
}
"""Every method that replaces attention, by its command-line name."""


def parse(text: str) -> Method:
    """A method from its command-line form, `tome:r=13` or `evit:keep_rate=0.7,at=[3,6,9]`.

    Methods for vision-language models, `hired:budget=0.2`, are read as well.

    Raises:
        ConfigError: unknown method or setting (the allowed ones are listed), or a bad value.
    """
    name, _, rest = text.strip().partition(":")
    known: dict[str, Any] = {**METHODS, **ATTENTIONS}
    if name not in known:
        known |= hosted_methods()
    if name not in known:
        raise ConfigError(f"unknown method {name!r}; there are {', '.join(known)}")
    cls = known[name]
    fields = {field.name for field in dataclasses.fields(cls)}
    settings: dict[str, Any] = {}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or key not in fields:
            allowed = ", ".join(sorted(fields))
            raise ConfigError(f"{text!r}: {part!r} is no setting of {name}; allowed: {allowed}")
        settings[key] = parse_value(value.strip())
    method: Method = cls(**settings)
    return method


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    tail = text[start:]
    return [*parts, tail] if tail.strip() else parts
