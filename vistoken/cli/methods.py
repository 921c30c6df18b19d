"""`vistoken methods`: every method with what it reads, what it guarantees and its settings."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vistoken.methods import ATTENTIONS, METHODS, Method, hosted_methods
from vistoken.methods.diffrate import DiffRate


def settings_of(cls: type[Any]) -> list[str]:
    """`name=default` for every setting, as `vistoken.parse` reads it."""
    texts = []
    for field in dataclasses.fields(cls):
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        texts.append(f"{field.name}={str(value).replace(' ', '')}")
    return texts


def reads(cls: type[Any]) -> str:
    """The signals a method needs, in words."""
    if not issubclass(cls, Method):
        return str(cls.reads)
    # DiffRate alone cannot be made from defaults: its counts must be named.
    method = cls(gflops=1.0) if cls is DiffRate else cls()  # type: ignore[call-arg]
    return ", ".join(sorted(need.value for need in method.needs)) or "nothing"


def make_table(title: str, rows: list[tuple[str, ...]]) -> Any:
    """A rich table with one row per method."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", show_lines=True)
    for name in ("name", "paper", "reads", "guarantees", "settings with defaults"):
        table.add_column(name, no_wrap=name == "name", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def rows_of(methods: Mapping[str, type[Any]]) -> list[tuple[str, ...]]:
    """Name, paper, signals, guarantee and settings of every method."""
    return [
        (name, cls.paper, reads(cls), cls.guarantees, "\n".join(settings_of(cls)))
        for name, cls in methods.items()
    ]


def main(args: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="vistoken methods", description=__doc__)
    parser.parse_args(args)
    console = Console()
    console.print(make_table("Methods", rows_of({**METHODS, **ATTENTIONS})))
    console.print(make_table("Methods for vision-language models", rows_of(hosted_methods())))
    console.print(
        "Write name:setting=value,..., for example evit:keep_rate=0.7,at=[3,6]", markup=False
    )
    return 0
