"""Figures of docs/results.md about photographs and maps are those of the files that it names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from figures import ROOT, rows, table_after

BUDGETS = ("1.2f", "1.4f", "1.6f", "1.8f", "2.2f", "2.7f")
SHARES = (0.85, 0.7, 0.55, 0.45, 0.35)
LEARNED = ("tome, learned by ms", "diffrate, learned by ms")
CASES = {"cifar10": "CIFAR-10, n = 10,000:", "clothing": "Clothing photos, n = 713"}


@pytest.fixture(scope="module")
def text() -> str:
    return " ".join((ROOT / "docs/results.md").read_text().split())


def sweep(case: str) -> dict[tuple, dict]:
    return {(r["label"], r["budget"]): r for r in rows("pareto-h100")
            if r["case"] == case and "top1" in r}  # fmt: skip


def compare(row: dict, other: dict) -> tuple[float, float]:
    """Paired difference in points, and half its interval."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        gain, half = importlib.import_module("pareto_report").compare(row, other)
    return 100 * gain, 100 * half


@pytest.mark.parametrize("case", CASES)
def test_tables_of_photographs(case: str) -> None:
    found = sweep(case)
    page = (ROOT / "docs/results.md").read_text().partition(CASES[case])[2]
    head = re.search(r"^\| method \|.*$", page, re.M)[0]
    reached = [f"{found['tome', budget]['speedup']:.1f}x" for budget in BUDGETS]
    assert [cell.strip() for cell in head.strip("|").split("|")[1:]] == reached
    table = table_after("docs/results.md", CASES[case])
    assert len(table) == 9
    apart = []
    for name, *cells in table:
        label = name.replace("`", "")
        for budget, cell in zip(BUDGETS, cells, strict=True):
            row = found.get((label, budget))
            if row is None:
                assert cell == "-"
                continue
            gap, half = 100 * row["minus_dense"], 100 * row["minus_dense_half95"]
            assert cell == f"{gap:+.1f} ± {half:.1f}"
            apart.append(abs(row["speedup"] / found["tome", budget]["speedup"] - 1))
    page = " ".join(page.split())
    words = {"cifar10": "{:.0%} of it (CIFAR-10)", "clothing": "{:.0%} (clothing)"}[case]
    most = -(-max(apart) * 100 // 1) / 100
    whole = " ".join((ROOT / "docs/results.md").read_text().split())
    assert words.format(most).replace("%", " %") in whole


def test_models_and_budgets_of_photographs(text: str) -> None:
    for case, words in (("clothing", "{:.2f} % of 713"), ("cifar10", "{:.2f} % of 10,000")):
        row = sweep(case)["dense", None]
        assert words.format(100 * row["top1"]) in text
        assert (
            "{:.1f} to {:.1f}".format(*(100 * row[f"top1_{s}95"] for s in ("low", "high"))) in text
        )
    tuned = {(r["case"], r["run"]): r for r in rows("finetune-h100")}
    assert (
        f"second run of the clothing recipe reached {100 * tuned['clothing', 1]['top1']:.2f} %"
        in text
    )
    for case in CASES:  # weights were rounded to bf16 in between
        assert tuned[case, 2]["top1"] == pytest.approx(sweep(case)["dense", None]["top1"], abs=5e-4)
    found = sweep("cifar10")
    dense, compiled, chain = (
        found[label, None] for label in ("dense", "dense, compiled", "chain only")
    )
    assert f"makes {dense['per_second']:,.0f} images/s" in text
    assert f"the dense model compiled {compiled['speedup']:.2f} times as many" in text
    assert f"without any reduction {chain['speedup']:.2f} times" in text


def test_reading_of_photographs(text: str) -> None:
    found, photos = sweep("cifar10"), sweep("clothing")
    assert min(found["chain only", None]["speedup"], photos["chain only", None]["speedup"]) > 1.4
    mild = [100 * found[label, b]["minus_dense"] for label in ("tome", "tofu") for b in BUDGETS[:3]]
    assert "lose at most 0.4 points" in text and -0.45 < min(mild) <= -0.35
    assert all(abs(photos["tofu", b]["minus_dense"]) < photos["tofu", b]["minus_dense_half95"]
               for b in BUDGETS[:5])  # fmt: skip
    for label in ("evit", "diffrate, closed form"):
        for budget in BUDGETS[:3]:
            gain, half = compare(found[label, budget], found["random", budget])
            assert gain < half, "no better than random"
    gains = [compare(found["diffrate, learned by ms", b], found["diffrate, closed form", b])
             for b in BUDGETS[:5]]  # fmt: skip
    assert all(gain > half for gain, half in gains)
    values = [gain for gain, _ in gains]
    assert f"by {min(values):.1f} to {max(values):.1f} points" in text
    assert all(
        compare(found["diffrate, learned by ms", b], found["tome", b])[0] < 0 for b in BUDGETS
    )
    learned = {b: compare(found[LEARNED[0], b], found["tome", b]) for b in BUDGETS}
    assert "{:.2f} +- {:.2f} points above constant r at 3.0".format(*learned["1.8f"]) in text
    assert all(abs(learned[b][0]) < learned[b][1] for b in ("1.2f", "1.4f", "1.6f", "2.2f"))
    assert f"at 4.5 times {-learned['2.7f'][0]:.1f} points worse" in text
    attention = [r for (label, _), r in found.items() if label in ("na", "bra")]
    attention = [
        r for r in rows("pareto-h100") if r["case"] == "cifar10" and r["label"] in ("na", "bra")
    ]
    speeds, losses = ([f(r) for r in attention] for f in
                      (lambda r: r["speedup"], lambda r: -100 * r["minus_dense"]))  # fmt: skip
    assert f"({min(speeds):.2f} to {max(speeds):.2f} times the dense graph)" in text
    assert f"lose {min(losses):.1f} to {max(losses):.0f} points" in text
    by_text = {(r["label"], r["method"]): r for r in rows("pareto-h100") if r["case"] == "cifar10"}
    steps = [100 * by_text[label, "na:window=7"]["minus_dense"] for label in ("na", "na + 1 epoch")]
    assert "from {:.1f} to {:.1f}".format(*steps) in text


def test_learned_counts_on_the_front() -> None:
    """What the page says is on the front is on it, of the rows at speed budgets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        report = importlib.import_module("pareto_report")
    best = report.best(report.measured(rows("pareto-h100"), "cifar10"), "per_second")
    front = {(row["label"], row["budget"]) for row in best}
    on = [b for b in BUDGETS if (LEARNED[0], b) in front]
    assert on == ["1.4f", "1.6f", "1.8f"] and {("tofu", "2.2f"), ("tofu", "2.7f")} <= front


def test_what_to_use(text: str) -> None:
    found, photos = sweep("cifar10"), sweep("clothing")
    row = found["tome", "1.6f"]
    gap, half = 100 * row["minus_dense"], 100 * row["minus_dense_half95"]
    assert f"CIFAR-10: {gap:.1f} +- {half:.1f} points at {row['speedup']:.1f} times" in text
    points = [
        100 * f[label, "2.2f"]["minus_dense"] for f in (found, photos) for label in ("tofu", "tome")
    ]
    words = ("at {:.1f} times {:.1f} points where `tome` loses {:.1f} (CIFAR-10), "
             "at {:.1f} times {:.1f} where it loses {:.1f} (clothing)")  # fmt: skip
    speeds = [f["tofu", "2.2f"]["speedup"] for f in (found, photos)]
    assert words.format(speeds[0], points[0], -points[1], speeds[1], points[2], -points[3]) in text


def test_maps_table(text: str) -> None:
    known = rows("dense-h100")
    found = {(r["label"], r["share"]): r for r in known}
    table = table_after("docs/results.md", "## A task that reads every patch")
    assert len(table) == 8
    for name, *cells in table:
        for share, cell in zip(SHARES, cells, strict=True):
            row = found[name.strip("`"), share]
            assert cell == f"{row['iou']:.3f} ({row['mae']:.3f}), {row['speedup']:.2f}x"
    assert f"at most {max(r['iou_half95'] for r in known):.3f} of IoU" in text
    assert all(r["n"] == 713 for r in known)
    chain = next(r for r in known if r["method"] == "tome:r=0")
    assert f"The fused chain alone is {chain['speedup']:.2f} times as fast" in text
    best = {share: max((r for r in known if r["share"] == share), key=lambda r: r["iou"])["label"]
            for share in SHARES}  # fmt: skip
    assert list(best.values()) == ["tome"] * 4 + ["pool"]
    assert all(found["evit", s]["iou"] < found["random", s]["iou"] for s in SHARES)


def test_pictures_are_there() -> None:
    for name in re.findall(r"images/([\w-]+\.png)", (ROOT / "docs/results.md").read_text()):
        assert Path(ROOT / "docs/images" / name).stat().st_size < 400_000


def test_table_of_the_readme() -> None:
    rows_of = {
        "dense": ("dense", None), "dense, `torch.compile`": ("dense, compiled", None),
        "fused chain alone, `tome:r=0`": ("chain only", None),
    }  # fmt: skip
    budgets = {"`tome`": ["1.4f", "1.6f"], "`tome`, learned counts": ["1.8f"],
               "`tofu`": ["1.8f", "2.2f"]}  # fmt: skip
    names = {"`tome`": "tome", "`tome`, learned counts": LEARNED[0], "`tofu`": "tofu"}
    found, photos = sweep("cifar10"), sweep("clothing")
    for name, speed, times, *cells in table_after("README.md", "## Accuracy against measured time"):
        key = rows_of[name] if name in rows_of else (names[name], budgets[name].pop(0))
        assert speed == f"{found[key]['per_second']:,.0f}"
        assert times == f"{found[key]['speedup']:.2f}x"
        for cell, row in zip(cells, (found[key], photos[key]), strict=True):
            gap, half = 100 * row["minus_dense"], 100 * row["minus_dense_half95"]
            top1, loss = f"{100 * row['top1']:.2f} %", f"{gap:+.1f} ± {half:.1f}"
            assert cell == (top1 if name == "dense" else loss)
    assert not any(budgets.values())
