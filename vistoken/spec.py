"""The data row that says where to hook a family of backbones; strings, no host library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

Readout = Literal["leave", "weigh", "weigh_all", "grid"]
"""What happens to the last block's tokens before the host pools them.

`leave`: the head reads the class token, a maximum, or attends with sizes; nothing to do.
`weigh`: the head takes the plain mean of the patch tokens, which are scaled so that it becomes the
mean weighted by size (`weigh_all`: prefix tokens are in the mean too).
`grid`: tokens go back to the full grid first.
"""


@dataclass(frozen=True)
class BlockSpec:
    """Where the parts of one backbone family are. Paths are dotted, relative to host or block.

    Attributes:
        family: name for messages.
        hosts: full class names of the modules that own the blocks.
        blocks: path of the block list in the host.
        block_types: full class names of the blocks that follow this row.
        enter: first module of a block; its input is the block's input.
        attn: the attention module.
        branch_in: first module of the MLP branch; its input is the residual stream.
        branch_out: last module of the MLP branch; what it returns is added to the residual stream.
        patch: convolution that makes the patch grid, path in the host.
        class_tokens: parameters of class and distillation tokens, paths in the host.
        registers: parameters of register tokens, paths in the host.
        exit: module that returns all tokens before pooling, path in the host; empty when the host
            itself returns them in an output object with `last_hidden_state`.
        pool: paths in the host of modules that pool by attention.
        positions: keyword by which a block receives rotary tables, or None.
        masks: whether hosts hand their blocks attention masks over all N0 tokens.
        readout: decides the readout of one host.
        refuse: says why one host or attention module cannot be tapped, or None.
    """

    family: str
    hosts: tuple[str, ...]
    blocks: str
    block_types: tuple[str, ...]
    enter: str
    attn: str
    branch_in: str
    branch_out: str
    patch: str
    class_tokens: tuple[str, ...]
    registers: tuple[str, ...]
    exit: str
    pool: tuple[str, ...]
    positions: str | None
    masks: bool
    readout: Callable[[nn.Module], Readout]
    refuse: Callable[[nn.Module, nn.Module], str | None]


def class_path(cls: type) -> str:
    """Full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def lookup(owner: nn.Module, path: str) -> object | None:
    """The attribute at a dotted path, or None where a part is missing or None."""
    found: object | None = owner
    for part in path.split(".") if path else ():
        found = getattr(found, part, None)
    return found
