"""Methods that attach themselves: they work on a whole model, not on blocks of a transformer."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class HostedAttachment(Protocol):
    """A method on a model, as `unwrap` and `info` see it."""

    method: HostedMethod

    def detach(self) -> None:
        """Take everything off again."""

    def describe(self) -> Any:
        """What `vistoken.info` returns."""


@runtime_checkable
class HostedMethod(Protocol):
    """Settings that know how to attach themselves."""

    def to_string(self) -> str:
        """The command-line form."""
        ...

    def attach_to(self, model: nn.Module) -> HostedAttachment:
        """Check the model, then install the method."""
        ...


def hosted_methods() -> dict[str, Any]:
    """Every such method by its command-line name; loaded on first use."""
    found: dict[str, Any] = import_module("vistoken.vlm").METHODS
    return found
