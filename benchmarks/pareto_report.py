"""A sweep as a table and as pictures: accuracy against images per second and against GFLOPs.

    python benchmarks/pareto_report.py runs/*/pareto-h100.json --out benchmarks/results

joins the rows of several runs, for example of one per data set, and writes the report anew.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
STYLES: dict[str, tuple[str, str]] = {
    "tome": ("#0072B2", "o"),
    "tome, learned by GFLOPs": ("#0072B2", "<"),
    "tome, learned by ms": ("#0072B2", "*"),
    "diffrate, closed form": ("#E8A33D", "s"),
    "diffrate, learned by GFLOPs": ("#D55E00", "<"),
    "diffrate, learned by ms": ("#B2182B", "*"),
    "diffrate, published counts": ("#8C510A", "d"),
    "zero_tprune": ("#009E73", "^"),
    "evit": ("#CC79A7", "D"),
    "tofu": ("#56B4E9", "v"),
    "mctf": ("#7A5195", "P"),
    "random": ("#666666", "X"),
    "pool": ("#000000", "h"),
    "na": ("#4DAC26", "p"),
    "bra": ("#80CDC1", "H"),
}
"""Colour and marker of each method; sparse attention keeps its own, tuned rows are hollow."""
SINGLE = {"dense": ("*", "black"), "dense, compiled": ("*", "white"), "chain only": ("o", "white")}
"""Marker and filling of single points."""


def front(points: Sequence[tuple[float, float]], falling: bool = False) -> list[int]:
    """Indices of the points that no other one beats in accuracy at the same or a better cost.

    Args:
        points: (cost or speed, accuracy).
        falling: less is better on the first axis, as for GFLOPs.
    """
    sign = -1.0 if falling else 1.0
    order = sorted(range(len(points)), key=lambda i: (-sign * points[i][0], -points[i][1]))
    best, found = -float("inf"), []
    for index in order:
        if points[index][1] > best:
            best = points[index][1]
            found.append(index)
    return sorted(found, key=lambda i: points[i][0])


def measured(rows: Sequence[Row], case: str) -> list[Row]:
    """The rows of a data set that were measured, fastest last."""
    return sorted(
        (r for r in rows if r["case"] == case and "top1" in r), key=lambda r: float(r["per_second"])
    )


def best(rows: Sequence[Row], axis: str) -> list[Row]:
    """The rows without further training that no other one of them beats."""
    own = [row for row in rows if not row["tuned"]]
    return [own[i] for i in front([(r[axis], r["top1"]) for r in own], axis == "gflops")]


def compare(row: Row, other: Row) -> tuple[float, float]:
    """Top-1 of a row minus that of another on the same pictures, and half its 95 % interval."""
    gain = unpack(row).astype(float) - unpack(other).astype(float)
    return float(gain.mean()), 1.96 * float(gain.std()) / math.sqrt(len(gain))


def unpack(row: Row) -> np.ndarray:
    """Which pictures were hit, `[n]` bool."""
    bits = np.frombuffer(base64.b64decode(row["hits"]), np.uint8)
    return np.unpackbits(bits, count=row["n"]).astype(bool)


RIVALS = ("tome", "diffrate, closed form", "evit", "tofu")
"""What learned counts are compared with, besides those of the same operator learned otherwise."""


def contests(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Learned counts of a data set, each beside its rivals of the same budget."""
    learned = [row for row in rows if "schedule" in row and sum(row["removed"]) > 0]
    return [(row, other) for row in learned for other in rows
            if other["budget"] == row["budget"] and _is_rival(row, other)]  # fmt: skip


def _is_rival(row: Row, other: Row) -> bool:
    if "schedule" in other:
        operator, _, unit = row["wanted"].partition("/")
        return unit == "ms" and other["wanted"] == f"{operator}/gflops"
    return other["label"] in RIVALS


def _contest_lines(rows: Sequence[Row]) -> list[str]:
    """Learned counts against the others, as a Markdown table."""
    found = contests(rows)
    if not found:
        return []
    lines = ["", "| learned | budget | against | top-1 points, paired (95 %) | GFLOPs | images/s |",
             "|---|--:|---|--:|--:|--:|"]  # fmt: skip
    for row, other in sorted(found, key=lambda p: (p[0]["label"], str(p[0]["budget"]))):
        gain, half = compare(row, other)
        lines.append(f"| {row['label']} | {row['budget']} | {other['label']} "
                     f"| {100 * gain:+.2f} ± {100 * half:.2f} "
                     f"| {row['gflops'] / other['gflops']:.3f}x "
                     f"| {row['per_second'] / other['per_second']:.3f}x |")  # fmt: skip
    return lines


def to_markdown(record: dict[str, Any]) -> str:
    """All rows as Markdown tables, one per data set; stars mark the two fronts."""
    lines = ["# Accuracy against measured time", ""]
    for case in dict.fromkeys(row["case"] for row in record["rows"]):
        rows = measured(record["rows"], case)
        if not rows:
            continue
        fast, lean = ({id(r) for r in best(rows, axis)} for axis in ("per_second", "gflops"))
        lines += [f"## {case}, n = {rows[0]['n']}, dense {100 * rows[0]['dense_top1']:.2f}", "",
                  "| method | budget | top-1 % (95 %) | minus dense | agree % | GFLOPs | images/s "
                  "| speed-up | peak MiB | settings |",
                  "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"]  # fmt: skip
        lines += [_line(row, id(row) in fast, id(row) in lean) for row in rows]
        lines += _contest_lines(rows)
        left = [r for r in record["rows"] if r["case"] == case and "left_out" in r]
        lines += ["", *(f"- {r['label']} at {r['budget']}: {r['left_out']}" for r in left), ""]
    made = ", ".join(f"{name} {text}" for name, text in record["versions"].items())
    lines += [f"`*` on the front of images/s, `+` on that of GFLOPs. {record['device']}. {made}. "
              f"{record['date']}.", "", f"Command: `{record['command']}`", ""]  # fmt: skip
    return "\n".join(lines)


def _line(row: Row, fast: bool, lean: bool) -> str:
    """A row of the table."""
    gap = f"{100 * row['minus_dense']:+.2f} ± {100 * row['minus_dense_half95']:.2f}"
    top = f"{100 * row['top1']:.2f} ({100 * row['top1_low95']:.1f}-{100 * row['top1_high95']:.1f})"
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    settings = "kept " + str(row["schedule"]["merged"]) if "schedule" in row else row["method"]
    return (f"| {row['label']} | {row['budget'] or ''} | {top} | {gap} "
            f"| {100 * row['agreement']:.2f} | {row['gflops']:.3f}{'+' if lean else ''} "
            f"| {row['per_second']:.0f}{'*' if fast else ''} | {row['speedup']:.2f} | {peak} "
            f"| `{settings.replace('|', '/')}` |")  # fmt: skip


def draw(rows: Sequence[Row], axis: str, title: str, path: Path) -> Path:
    """Accuracy against `per_second` or `gflops`: a line per method, the front as a grey band.

    Args:
        rows: measured rows of one data set.
        axis: the field on the first axis.
        title: above the picture.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(float(r[axis]), 100 * r["top1"]) for r in rows]
    edge = [(float(r[axis]), 100 * r["top1"]) for r in best(rows, axis)]
    where = "post" if axis == "gflops" else "pre"
    axes.step(*zip(*edge, strict=True), where=where, color="#dddddd", linewidth=7, zorder=0,
              label="Pareto front", solid_capstyle="round")  # fmt: skip
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [r for r in rows if r["label"] == label]
        _series(axes, label, sorted((float(r[axis]), 100 * r["top1"]) for r in own))
    dense = next(r for r in rows if r["label"] == "dense")
    low, high = 100 * dense["top1_low95"], 100 * dense["top1_high95"]
    axes.axhspan(low, high, color="#f4f4f4", zorder=-1)
    axes.set_ylim(*_limits([p[1] for p in points], low, high))
    axes.set_xlabel({"per_second": "images per second (CUDA graph, one GPU)",
                     "gflops": "GFLOPs per image (multiply-accumulates)"}[axis])  # fmt: skip
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _limits(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """The accuracies that matter: what lost more than 12 points leaves the picture."""
    floor = max(min(values), low - 12)
    room = 0.04 * (max(*values, high) - floor) + 0.1
    return floor - room, max(*values, high) + room


def _series(axes: Any, label: str, points: list[tuple[float, float]]) -> None:
    """One method; the dense model and the fused chain are single marks."""
    x, y = zip(*points, strict=True)
    if label in SINGLE:
        marker, fill = SINGLE[label]
        axes.plot(x, y, marker, color="black", markersize=14, zorder=6, markerfacecolor=fill,
                  label=label)  # fmt: skip
        return
    name, _, tuned = label.partition(" + ")
    colour, marker = STYLES.get(name, ("#444444", "."))
    dashes = "--" if name in ("random", "pool") else "-"
    sparse = name in ("na", "bra", "dense")
    style: Callable[..., Any] = axes.plot
    style(x, y, linestyle="none" if sparse else dashes, marker=marker, color=colour, label=label,
          markerfacecolor="white" if tuned else colour, markersize=7, linewidth=1.6)  # fmt: skip


def write_report(record: dict[str, Any], path: Path) -> list[Path]:
    """Table and pictures beside the results file."""
    table = path.with_suffix(".md")
    table.write_text(to_markdown(record))
    written = [table]
    for case in dict.fromkeys(row["case"] for row in record["rows"]):
        rows = measured(record["rows"], case)
        if not any(row["label"] == "dense" for row in rows):
            continue
        for axis, short in (("per_second", "speed"), ("gflops", "gflops")):
            picture = path.with_name(f"{path.stem}-{case}-{short}.png")
            title = f"{rows[0]['model']} on {case}, n = {rows[0]['n']}, {record['device']}"
            written.append(draw(rows, axis, title, picture))
    return written


SPLIT = ("--data", "--parts", "--out", "--seconds")
"""Options with one value by which a sweep is divided."""


def join(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of several runs; of rows that answer the same, the first stays.

    `command` is the one that makes all rows on one GPU, `runs` are those that made them.

    Raises:
        ValueError: the runs differ in device or versions.
    """
    first = records[0]
    for key in ("device", "versions"):
        values = [record[key] for record in records]
        if any(value != values[0] for value in values):
            raise ValueError(f"runs differ in {key}: {values}")
    rows: dict[tuple[Any, ...], Row] = {}
    for row in (row for record in records for row in record["rows"]):
        rows.setdefault((row["case"], row["label"], row["wanted"], row["budget"]), row)
    runs = list(dict.fromkeys(record["command"] for record in records))
    words = iter(runs[0].split())
    command = [word for word in words if not (word in SPLIT and next(words))]
    return {**first, "command": " ".join(command), "runs": runs, "rows": list(rows.values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    record = join([json.loads(path.read_text()) for path in given.runs])
    path = given.out / given.runs[0].name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    for written in [path, *write_report(record, path)]:
        print(written)


if __name__ == "__main__":
    main()
