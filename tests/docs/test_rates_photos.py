"""Figures of ToMe's learned counts and of learned counts on photos are those of their files."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
from figures import ROOT, learned_counts, prose, rows, table_after

PAGE = "docs/rates.md"
SHARES = (0.4, 0.55, 0.7)
BUDGETS = ("1.2f", "1.4f", "1.6f", "1.8f", "2.2f", "2.7f")
CASES = {"CIFAR-10": "cifar10", "clothing": "clothing"}
GAIN, HALF = "top1_flops_learned_minus_this", "top1_half_interval95"
LABELS = {
    "closed form, DiffRate": "diffrate, closed form",
    "keep rate, EViT": "evit",
    "constant r, ToMe": "tome",
    "DiffRate, by GFLOPs": "diffrate, learned by GFLOPs",
    "ToMe, by GFLOPs": "tome, learned by GFLOPs",
    "DiffRate, by ms": "diffrate, learned by ms",
    "ToMe, by ms": "tome, learned by ms",
    "random": "random",
}
Difference = Callable[[str, str, str, object], tuple[float, float]]


def photos() -> dict[tuple[str, str, str], dict]:
    """Measured rows by data set, label and budget."""
    return {(r["case"], r["label"], r["budget"]): r for r in rows("pareto-h100") if "top1" in r}


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> Difference:
    """Points of the first minus the second, and half the interval: pictures, names, budget."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    compare = importlib.import_module("pareto_report").compare
    found = photos()

    def difference(case: str, one: str, two: str, budget: object) -> tuple[float, float]:
        gain, half = compare(*(found[case, LABELS[name], str(budget)] for name in (one, two)))
        return 100 * gain, 100 * half

    return difference


def shown(gain: float, half: float, digits: int) -> str:
    """A cell: bold where the interval leaves out zero."""
    text = f"{gain:+.{digits}f} +- {half:.{digits}f}"
    return f"**{text}**" if abs(gain) > half else text


def ratios(pairs: list[tuple[str, str]], key: str, budgets: tuple = SHARES) -> list[float]:
    """Least and most of a field of the first over that of the second, over both data sets."""
    found = photos()
    values = [
        found[case, LABELS[one], str(budget)][key] / found[case, LABELS[two], str(budget)][key]
        for one, two in pairs for case in CASES.values() for budget in budgets
    ]  # fmt: skip
    return [min(values), max(values)]


def test_table_of_tome() -> None:
    learned = learned_counts("tome")
    table = table_after(PAGE, "**Counts of ToMe**")
    names = ("learned by FLOPs", "learned by milliseconds", "constant r, ToMe", "keep rate, EViT")
    assert [tuple(r[:2]) for r in table] == [(str(s), name) for s in SHARES for name in names]
    for share, name, gflops, ms, top1, gain in table:
        row = learned[float(share), name]
        assert (row["n"], row["garments"], row["batch"]) == (20_000, 10_000, 256)
        assert gflops == f"{row['gflops']:.3f}"
        assert ms == (f"{row['ms']:.2f}" if row["ms"] else "")
        assert float(top1) == pytest.approx(100 * row["top1"], abs=0.0501)
        exact = f"{100 * row[GAIN]:+.1f} +- {100 * row[HALF]:.1f}"
        assert gain == ("" if name == "learned by FLOPs" else exact)


def test_prose_under_the_table_of_tome() -> None:
    text, found, others = prose(PAGE), learned_counts("tome"), learned_counts()
    flops, timed, constant, evit, closed = (
        [found[share, name] for share in SHARES]
        for name in ("learned by FLOPs", "learned by milliseconds", "constant r, ToMe",
                     "keep rate, EViT", "closed form, same operator")
    )  # fmt: skip
    assert {r["steps"] for r in (*flops, *timed)} == {500}
    dense = 100 * flops[0]["dense_top1"], flops[0]["dense_ms"]
    assert "rates-h100.json`); dense {:.1f} in {:.2f} ms.".format(*dense) in text
    assert all(r[GAIN] > r[HALF] for r in (*constant, *evit[:2]))
    assert abs(evit[2][GAIN]) < evit[2][HALF]
    over = [100 * r[GAIN] for r in constant]
    assert "beat constant r** by {:.1f}, {:.1f} and {:.1f} points".format(*over) in text
    counts = [[r["schedule"]["tokens"], *r["schedule"]["merged"]] for r in flops]
    assert "together merge {}, {} and {} tokens".format(*(c[0] - c[2] for c in counts)) in text
    assert "third block {}, {} and {}.".format(*(c[2] - c[3] for c in counts)) in text
    assert all(-r[GAIN] > r[HALF] for r in timed)
    better = [f"{-100 * r[GAIN]:.1f} +- {100 * r[HALF]:.1f}" for r in timed]
    assert "bring {}, {} and {} points over FLOPs".format(*better) in text
    more = [100 * b["gflops"] / a["gflops"] - 100 for a, b in zip(flops, timed, strict=True)]
    assert "{:.0f}, {:.0f} and {:.0f} % more GFLOPs; what".format(*more) in text
    for a, b in zip(flops, timed, strict=True):
        assert b["predicted_ms"] == pytest.approx(a["predicted_ms"], rel=0.002)
        assert a["ms"] is None or b["ms"] == pytest.approx(a["ms"], rel=0.01)
    ahead = [
        100 * (others[share, "learned by FLOPs"]["top1"] - row["top1"])
        for share, row in zip(SHARES, flops, strict=True)
    ]
    assert "at equal GFLOPs**, by {:.1f}, {:.1f} and {:.1f} points".format(*ahead) in text
    first, alike, below = ((100 * r[GAIN], 100 * r[HALF]) for r in closed)
    assert "are {:.1f} +- {:.1f} points above closed-form ones of DiffRate".format(*first) in text
    assert abs(alike[0]) < alike[1]
    assert f"{-below[0]:.2f} +- {below[1]:.2f} below at 0.7" in text
    slower = [
        others[share, "learned by FLOPs"]["ms"] / row["ms"]
        for share, row in zip(SHARES[:2], flops, strict=False)
    ]
    assert "take {:.2f} and {:.2f} times as long as ToMe's".format(*slower) in text
    around = (timed[1], others[0.4, "learned by milliseconds"], others[0.55, "learned by FLOPs"])
    places = [value for r in around for value in (100 * r["top1"], r["ms"])]
    sentence = "hit {:.1f} in {:.2f} ms, between DiffRate's {:.1f} in {:.2f} and {:.1f} in {:.2f}."
    assert sentence.format(*places) in text


def test_tables_of_photos(points: Difference) -> None:
    table = table_after(PAGE, "over pictures, bold")
    assert len(table) == 7
    for one, two, *cells in table:
        wanted = [(name, share) for name in CASES.values() for share in SHARES]
        for (case, share), cell in zip(wanted, cells, strict=True):
            digits = 2 if case == "cifar10" else 1
            assert cell == shown(*points(case, one, two, share), digits), (one, two, share)
    table = table_after(PAGE, "At equal time: counts learned by ms")
    assert len(table) == 6
    for name, one, two, *cells in table:
        for budget, cell in zip(BUDGETS, cells, strict=True):
            digits = 2 if name == "CIFAR-10" else 1
            exact = points(CASES[name], one, two, budget)
            assert cell == shown(*exact, digits), (name, one, two, budget)


def test_where_learned_counts_beat_others(points: Difference) -> None:
    table = table_after(PAGE, "**Where learned counts beat others")
    assert len(table) == 5
    for operator, other, *cells in table:
        key = {"closed form, DiffRate": "closed form, same operator"}.get(other, other)
        counts = learned_counts(operator.lower())
        scenes = [(counts[share, key][GAIN], counts[share, key][HALF]) for share in SHARES]
        found = [scenes] + [
            [points(case, f"{operator}, by GFLOPs", other, share) for share in SHARES]
            for case in CASES.values()
        ]
        for exact, cell in zip(found, cells, strict=True):
            assert all(gain >= -half for gain, half in exact)
            won = [f"{s:.2f}" for s, (gain, half) in zip(SHARES, exact, strict=True) if gain > half]
            assert cell == (", ".join(won) or "none"), (operator, other)


def test_prose_on_photos(points: Difference) -> None:
    text, found = prose(PAGE), photos()
    dense = [found[case, "dense", None] for case in CASES.values()]
    assert [row["n"] for row in dense] == [10_000, 713]
    sizes = "n = {:,}, dense {:.2f}", "n = {:,}, dense {:.2f}"
    for words, row in zip(sizes, dense, strict=True):
        assert words.format(row["n"], 100 * row["top1"]) in text
    assert f"a photo of a garment is {100 / dense[1]['n']:.2f} points" in text
    steps = [r["steps"] for r in found.values() if r.get("schedule") and sum(r["removed"])]
    assert f"({min(steps)} to {max(steps)} steps of 128)" in text
    pairs = [tuple(row[:2]) for row in table_after(PAGE, "over pictures, bold")]
    low, high = ratios(pairs, "gflops")
    assert low > 0.96 and high < 1.04
    by, constant = ("DiffRate, by GFLOPs", "ToMe, by GFLOPs"), "constant r, ToMe"
    extra = [100 * ratio - 100 for ratio in ratios([(by[0], constant)], "gflops")]
    assert "DiffRate has {:.1f} to {:.1f} % more".format(*extra) in text
    low, high = ratios(pairs[-2:], "per_second")
    assert low > 0.98 and high < 1.02
    speeds = [
        ratios([(one, two)], "per_second") for one in by for two in (constant, "keep rate, EViT")
    ]
    sentence = ("{:.2f} to {:.2f} of the speed of constant-r ToMe and at {:.2f} to {:.2f} of "
                "EViT's, ToMe's learned counts at {:.2f} to {:.2f} and "
                "{:.2f} to {:.2f}")  # fmt: skip
    assert sentence.format(*(value for pair in speeds for value in pair)) in text
    blind = ["{:.1f} +- {:.1f}".format(*points("cifar10", "keep rate, EViT", "random", share))
             for share in SHARES]  # fmt: skip
    assert "dropping at random ({}, {} and {} points)".format(*blind) in text
    late = points("cifar10", "ToMe, by ms", constant, 0.4)
    assert "(by ms: {:+.2f} +- {:.2f})".format(*late) in text
    luck = [points("clothing", one, "random", 0.4) for one in by]
    assert all(gain > half for gain, half in luck)
    words = "{:+.1f} +- {:.1f} for DiffRate's counts, {:+.1f} +- {:.1f} for ToMe's"
    assert words.format(*(value for pair in luck for value in pair)) in text
    for share in SHARES[1:]:
        others = [points("clothing", one, "random", share) for one in by]
        assert all(abs(gain) <= half for gain, half in others)


def test_prose_at_equal_time(points: Difference) -> None:
    text = prose(PAGE)
    constant, timed = "constant r, ToMe", ("DiffRate, by ms", "ToMe, by ms")
    pairs = [(one, two) for _, one, two, *_ in table_after(PAGE, "At equal time: counts learned")]
    speeds = ratios(pairs, "per_second", BUDGETS)
    assert "speeds of a pair are {:.2f} to {:.2f} of one another".format(*speeds) in text
    closed = [points("cifar10", timed[0], "closed form, DiffRate", b) for b in BUDGETS]
    assert sum(gain > half for gain, half in closed) == 5
    assert f"five of six budgets, by up to {max(closed)[0]:.1f} points" in text
    lost = [points("cifar10", timed[0], constant, budget) for budget in BUDGETS]
    assert all(-gain > half for gain, half in lost)
    for two, sign in (("closed form, DiffRate", 1), (constant, -1)):
        clothing = [points("clothing", timed[0], two, budget) for budget in BUDGETS]
        assert [sign * gain > half for gain, half in clothing] == [False] * 4 + [True] * 2
        assert all(abs(gain) <= half for gain, half in clothing[:4])
    merged = {
        case: [points(case, timed[1], constant, budget) for budget in BUDGETS]
        for case in CASES.values()
    }
    odd = [[abs(gain) > half for gain, half in found] for found in merged.values()]
    assert odd == [[False] * 3 + [True, False, True], [False] * 5 + [True]]
    assert "1.8x on CIFAR-10 aside ({:+.2f} +- {:.2f})".format(*merged["cifar10"][3]) in text
    worse = [-found[-1][0] for found in merged.values()]
    assert "worse**, by {:.1f} and {:.1f} points".format(*worse) in text
