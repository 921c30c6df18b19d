"""`vistoken methods`: every method with what it reads, what it guarantees and its settings."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from vistoken.methods import ATTENTIONS, METHODS, Method
from vistoken.methods.diffrate import DiffRate


def settings_of(cls: type[Method]) -> list[str]:
    """`name=default` for every setting, as `vistoken.parse` reads it."""
    texts = []
    for field in dataclasses.fields(cls):
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        texts.append(f"{field.name}={str(value).replace(' ', '')}")
    return texts


def reads(cls: type[Method]) -> str:
    """The signals a method needs, in words."""
    # DiffRate alone cannot be made from defaults: its counts must be named.
    method = cls(gflops=1.0) if cls is DiffRate else cls()  # type: ignore[call-arg]
    return ", ".join(sorted(need.value for need in method.needs)) or "nothing"


def make_table() -> Any:
    """A rich table with one row per method."""
    from rich.table import Table

    table = Table(title="Methods", title_justify="left", header_style="bold", show_lines=True)
    for name in ("name", "paper", "reads", "guarantees", "settings with defaults"):
        table.add_column(name, no_wrap=name == "name", overflow="fold")
    for name, cls in {**METHODS, **ATTENTIONS}.items():
        table.add_row(name, cls.paper, reads(cls), cls.guarantees, "\n".join(settings_of(cls)))
    return table


def main(args: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="vistoken methods", description=__doc__)
    parser.parse_args(args)
    console = Console()
    console.print(make_table())
    console.print(
        "Write name:setting=value,..., for example evit:keep_rate=0.7,at=[3,6]", markup=False
    )
    return 0
