"""Draws a results file of `rates.py`: counts of every block, and hits against cost and speed.

python benchmarks/rates_figure.py benchmarks/results/rates-h100.json rates.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COUNTS = ("learned by FLOPs", "learned by milliseconds", "closed form, same operator")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    rows = [row for row in rows if row["case"] == "reference scenes"]
    if not rows:
        return
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for colour, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((row for row in rows if row["method"] == name), key=lambda row: row["gflops"])
        line: dict[str, Any] = {"color": f"C{colour}", "marker": "o", "label": name}
        middle.plot([row["gflops"] for row in own], [100 * row["top1"] for row in own], **line)
        timed = [row for row in own if row["per_second"]]
        right.plot([r["per_second"] for r in timed], [100 * r["top1"] for r in timed], **line)
        for row in own if name in COUNTS else []:
            left.plot(row["schedule"]["merged"], color=f"C{colour}", alpha=0.3 + 0.7 * row["share"])
    left.set(xlabel="block", ylabel="tokens left", title="learned and closed-form counts")
    middle.set(xlabel="GFLOPs", ylabel="top-1, %", title="cost")
    right.set(xlabel="images/s", ylabel="top-1, %", title="speed")
    middle.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())["rows"], Path(sys.argv[2]))
