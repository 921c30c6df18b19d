"""Result files and tables of pages, for tests that compare the two."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def table_after(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table behind a heading, without its head."""
    text = (ROOT / page).read_text().partition(heading)[2]
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def prose(page: str) -> str:
    """A page with its lines joined."""
    return " ".join((ROOT / page).read_text().split())


def learned_counts(operator: str = "diffrate") -> dict[tuple[float, str], dict]:
    """Rows on the reference scenes where an operator's counts were learned, by share and name."""
    case = "reference scenes" + ("" if operator == "diffrate" else f", {operator}")
    return {(r["share"], r["method"]): r for r in rows("rates-h100") if r["case"] == case}


def lead_of_rivals(rates: dict[tuple, dict]) -> tuple[float, float]:
    """Least and most speed of ToMe and EViT over counts learned by FLOPs, at equal GFLOPs."""
    found = [
        rates[share, "learned by FLOPs"]["ms"] / rates[share, name]["ms"]
        for share in (0.4, 0.55, 0.7) for name in ("constant r, ToMe", "keep rate, EViT")
    ]  # fmt: skip
    return min(found), max(found)
