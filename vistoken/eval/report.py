"""The results as a table, as Markdown and as a plot."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]

STYLES: dict[str, tuple[str, str]] = {
    "tome": ("#0072B2", "o"),
    "diffrate": ("#D55E00", "s"),
    "zero_tprune": ("#009E73", "^"),
    "evit": ("#CC79A7", "D"),
    "tofu": ("#56B4E9", "v"),
    "mctf": ("#E69F00", "P"),
    "random": ("#666666", "X"),
    "pool": ("#000000", "h"),
}
"""Colour and marker of each method: the colour-blind safe set of Okabe and Ito."""


def number(key: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    """How a column prints one field; a dash where it was not measured."""

    def show(row: Row) -> str:
        value = row.get(key)
        return "-" if value is None else f"{value * scale:.{digits}f}"

    return show


def split_method(row: Row) -> tuple[str, str]:
    """A row's method and its settings, shortened to what tells it apart."""
    name, _, settings = str(row["method"]).partition(":")
    short = []
    for pair in re.split(r",(?![^\[]*\])", settings):
        key, equals, value = pair.partition("=")
        with contextlib.suppress(ValueError):
            value = f"{float(value):.4g}"
        short.append(f"{key}{equals}{value}")
    return name, " ".join(filter(None, short))


FILE_WIDTH = 110
"""Columns of a table that goes to a file or a pipe."""
TEXT = ("method", "settings")
"""Columns that are set flush left."""

EVAL_COLUMNS: tuple[Column, ...] = (
    ("method", lambda row: split_method(row)[0]),
    ("settings", lambda row: split_method(row)[1]),
    ("GFLOPs", number("gflops", 3)),
    ("top-1 %", number("top1", 1, 100)),
    ("agree %", number("agreement", 1, 100)),
    ("KL", number("kl", 4)),
    ("images/s", number("per_second", 1)),
    ("speed-up", number("speedup", 2)),
    ("tokens", number("tokens", 0)),
)
BENCH_COLUMNS: tuple[Column, ...] = (
    ("method", lambda row: split_method(row)[0]),
    ("settings", lambda row: split_method(row)[1]),
    ("images/s", number("per_second", 1)),
    ("dense", number("dense_per_second", 1)),
    ("speed-up", number("speedup", 2)),
    ("ms", number("ms", 2)),
    ("GFLOPs", number("gflops", 3)),
    ("peak MiB", number("peak_mib", 0)),
    ("tokens", number("tokens", 0)),
)


def make_console() -> Console:
    """A console that keeps tables whole where the output is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def make_table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A rich table; a line separates one method from the next."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    for name, _ in columns:
        text = name in TEXT
        table.add_column(
            name,
            justify="left" if text else "right",
            no_wrap=name != "settings",
            overflow="fold",
        )
    for index, row in enumerate(rows):
        name = split_method(row)[0]
        last = index + 1 == len(rows) or split_method(rows[index + 1])[0] != name
        style = "bold" if name == "dense" else None
        table.add_row(*(show(row) for _, show in columns), end_section=last, style=style)
    return table


def to_markdown(title: str, record: dict[str, Any], columns: Sequence[Column]) -> str:
    """The same table in Markdown, with how it was made."""
    rows = record["rows"]
    names = [name for name, _ in columns]
    lines = [f"# {title}", "", f"| {' | '.join(names)} |"]
    lines.append("|" + "|".join("---" if name in TEXT else "--:" for name in names) + "|")
    lines += ["| " + " | ".join(show(row) for _, show in columns) + " |" for row in rows]
    made = ", ".join(f"{name} {text}" for name, text in record["versions"].items())
    lines += ["", f"Device: {record['device']}. {made}. {record['date']}.", ""]
    lines += [f"Command: `{record['command']}`", ""]
    notes = record.get("notes", [])
    lines += [*(f"- {note}" for note in notes), *([""] if notes else [])]
    return "\n".join(lines)


def plot(title: str, rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against cost: one line per method, the dense model as a star.

    Args:
        title: above the plot.
        rows: with `method`, `gflops` and `top1`; the dense one is called `dense`.
        path: PNG to write.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(split_method(row)[0] for row in rows))
    for name in names:
        points = sorted(
            (row["gflops"], 100 * row["top1"]) for row in rows if split_method(row)[0] == name
        )
        x, y = zip(*points, strict=True)
        if name == "dense":
            axes.plot(x, y, "*", color="black", markersize=17, label=name, zorder=5)
            axes.axhline(y[0], color="#999999", linewidth=0.8, linestyle=":", zorder=0)
            continue
        colour, marker = STYLES.get(name, ("#444444", "."))
        dashes = "--" if name in ("random", "pool") else "-"
        axes.plot(
            x, y, dashes, marker=marker, color=colour, label=name, markersize=7, linewidth=1.8
        )
    axes.set_xlabel("GFLOPs per image (multiply-accumulates)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
