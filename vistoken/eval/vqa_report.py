"""Accuracy against image tokens: columns of the table, and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vistoken.eval.report import Column, Row, number, split_method

STYLES: dict[str, tuple[str, str]] = {
    "hired": ("#D55E00", "s"),
    "globalcom2": ("#0072B2", "o"),
    "visionzip": ("#009E73", "^"),
    "holov": ("#CC79A7", "D"),
    "max_min": ("#56B4E9", "v"),
    "random_tokens": ("#666666", "X"),
    "pool_tokens": ("#000000", "h"),
    "fastv": ("#E69F00", "P"),
    "pyramiddrop": ("#8C510A", "<"),
    "psigmoid": ("#7B3294", ">"),
    "mustdrop": ("#B2182B", "*"),
}
"""Colour and marker of each method."""


TICKS = (1, 2, 5, 10, 20, 40, 60, 100)
"""Percentages on the plot's axis."""


def _interval(row: Row) -> str:
    """The 95 % interval."""
    return f"{row['low'] * 100:.1f}-{row['high'] * 100:.1f}"


VQA_COLUMNS: tuple[Column, ...] = (
    ("method", lambda row: split_method(row)[0]),
    ("settings", lambda row: split_method(row)[1]),
    ("asked %", number("share", 1, 100)),
    ("kept %", number("kept", 1, 100)),
    ("tokens", number("tokens", 0)),
    ("accuracy %", number("accuracy", 1, 100)),
    ("95 %", _interval),
    ("agree %", number("agreement", 1, 100)),
    ("n", number("n", 0)),
)


def plot_budgets(title: str, rows: Sequence[Row], constant: float, path: Path) -> Path:
    """Accuracy against the mean share of image tokens that the decoder's layers saw.

    Args:
        title: above the plot.
        rows: with `method`, `kept`, `accuracy`, `low` and `high`; the dense one is called `dense`.
        constant: accuracy that needs no picture, a dotted line.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for name in dict.fromkeys(split_method(row)[0] for row in rows):
        points = sorted(
            (row["kept"], row["accuracy"], row["low"], row["high"])
            for row in rows if split_method(row)[0] == name
        )  # fmt: skip
        x, y, low, high = (
            [100 * value for value in column] for column in zip(*points, strict=True)
        )
        if name == "dense":
            axes.axhline(y[0], color="#999999", linewidth=0.8, zorder=0)
            axes.plot(x, y, "*", color="black", markersize=15, label=name, zorder=5)
            continue
        colour, marker = STYLES.get(name, ("#444444", "."))
        errors = [[a - b for a, b in zip(y, low, strict=True)],
                  [b - a for a, b in zip(y, high, strict=True)]]  # fmt: skip
        axes.errorbar(
            x, y, errors, color=colour, marker=marker, label=name, markersize=6, linewidth=1.6,
            elinewidth=0.7, linestyle="--" if name.endswith("_tokens") else "-",
        )  # fmt: skip
    axes.axhline(100 * constant, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xscale("log")
    least = min(row["kept"] for row in rows)
    ticks = [tick for tick in TICKS if tick >= 80 * least]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("image tokens seen, mean over the decoder's layers (%)")
    axes.set_ylabel("exact-match accuracy (%)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
