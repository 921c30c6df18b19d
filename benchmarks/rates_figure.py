"""Draws a results file of `rates.py`: what every block removes, and hits against cost and speed.

python benchmarks/rates_figure.py benchmarks/results/rates-h100.json docs/images/rates.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = dict[str, Any]
LOOKS: dict[str, dict[str, Any]] = {
    "learned by FLOPs": {"color": "C0", "marker": "o"},
    "learned by milliseconds": {"color": "C3", "marker": "s"},
    "closed form, same operator": {"color": "0.45", "marker": "^"},
    "constant r, same operator": {"color": "C2", "marker": "v"},
    "constant r, ToMe": {"color": "C1", "marker": "D"},
    "keep rate, EViT": {"color": "C4", "marker": "P"},
}
COUNTS = tuple(LOOKS)[:3]
DEEPEST = 12
"""Points of top-1 below the dense model that are shown to scale."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw all budgets; nothing where no rows are of learned counts."""
    rows = [row for row in rows if row["case"] == "reference scenes"]
    if not rows:
        return
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.2))
    shares = sorted({row["share"] for row in rows})
    panels = above.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for share, axes in zip(shares, panels, strict=True):
        draw_removed(axes, [row for row in rows if row["share"] == share])
        axes.set_title(f"{share:.2f} of the GFLOPs", fontsize=11)
    panels[0].set_ylabel("tokens pruned | merged")
    panels[0].legend(fontsize=8, loc="upper right")
    timed = any(row["per_second"] for row in rows)
    cost, *speed = below.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    draw_hits(cost, rows, "GFLOPs of one image", lambda row: row["gflops"])
    for axes in speed:
        draw_hits(axes, rows, "thousand images/s", lambda row: (row["per_second"] or 0) / 1e3)
    cost.set_ylabel("top-1, %")
    cost.legend(fontsize=9, loc="lower right")
    figure.savefig(path, dpi=90)


def draw_removed(axes: Axes, rows: Sequence[Row]) -> None:
    """What every block merges, as bars up, and prunes, as bars down, at one budget."""
    found = {row["method"]: row["schedule"] for row in rows}
    for place, name in enumerate(COUNTS):
        if name not in found:
            continue
        pruned, merged = found[name]["pruned"], found[name]["merged"]
        before = [found[name]["tokens"], *merged[:-1]]
        at = [block + 0.28 * (place - 1) for block in range(1, len(merged) + 1)]
        bars: dict[str, Any] = {"width": 0.28, "color": LOOKS[name]["color"]}
        axes.bar(at, [p - m for p, m in zip(pruned, merged, strict=True)], **bars, label=name)
        axes.bar(at, [p - n for p, n in zip(pruned, before, strict=True)], **bars)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    axes.set(xlabel="block", xticks=range(1, len(rows[0]["schedule"]["merged"]) + 1))
    axes.grid(alpha=0.3, axis="y")


def draw_hits(axes: Axes, rows: Sequence[Row], label: str, place: Callable[[Row], float]) -> None:
    """Top-1 against what `place` gives; what lies far below is an arrow with its figure."""
    dense = 100 * rows[0]["dense_top1"]
    floor = dense - DEEPEST
    axes.axhline(dense, color="0.3", linestyle=":", label=f"dense, {dense:.1f}")
    for name, look in LOOKS.items():
        own = sorted((row for row in rows if row["method"] == name and place(row)), key=place)
        if own:
            axes.plot([place(r) for r in own], [100 * r["top1"] for r in own], **look, label=name)
        for row in own:
            if 100 * row["top1"] < floor:
                at = place(row), floor + 0.2
                axes.annotate(f"{100 * row['top1']:.1f}", at, (0, 22), textcoords="offset points",
                              ha="center", color=look["color"],
                              arrowprops={"arrowstyle": "->", "color": look["color"]})  # fmt: skip
    axes.set(xlabel=label, ylim=(floor, dense + 0.6))
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())["rows"], Path(sys.argv[2]))
