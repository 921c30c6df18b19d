"""Figures of learned counts in docs are those of the files they name."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path

import pytest
from figures import ROOT, lead_of_rivals, learned_counts, prose, rows, table_after


def test_rates_tables() -> None:
    steps = {r["method"]: r for r in rows("rates-h100") if r["case"].endswith("step")}
    table = table_after("docs/rates.md", "**A step of DeiT-S**")
    assert len(table) == len(steps)
    for method, ms, times, memory, hours in table:
        name = "dense forward+backward" if method.startswith("dense") else method
        row = steps[name]
        wanted = f"{row['ms']:.1f}", f"{row['times_dense']:.2f}", f"{row['times_memory']:.2f}"
        assert (ms, times, memory, hours) == (*wanted, f"{row['gpu_hours_3_epochs']:.2f}")
    learned = learned_counts()
    table = table_after("docs/rates.md", "**Learning**")
    assert len(table) == len(learned)
    for share, name, gflops, ms, top1, gain in table:
        row = learned[float(share), name]
        assert gflops == f"{row['gflops']:.3f}"
        assert ms == (f"{row['ms']:.2f}" if row["ms"] else "")
        assert float(top1) == pytest.approx(100 * row["top1"], abs=0.051)
        if gain:
            exact = row["top1_flops_learned_minus_this"], row["top1_half_interval95"]
            for text, value in zip(gain.split(" +- "), exact, strict=True):
                close = 0.51 * 10 ** -len(text.partition(".")[2])
                assert float(text) == pytest.approx(100 * value, abs=close), (share, name)


def test_prose_under_the_rates_tables() -> None:
    text = prose("docs/rates.md")
    rates = learned_counts()
    shares = (0.4, 0.55, 0.7)
    flops, timed = (
        [rates[share, f"learned by {unit}"] for share in shares]
        for unit in ("FLOPs", "milliseconds")
    )
    assert {(r["n"], r["garments"]) for r in rates.values()} == {(20_000, 10_000)}
    assert {r["steps"] for r in (*flops, *timed)} == {500}
    assert f"trained on, dense {100 * flops[0]['dense_top1']:.1f}; `ms` is a batch of 256" in text
    assert f"in bf16, dense {flops[0]['dense_ms']:.2f};" in text
    gain, half = "top1_flops_learned_minus_this", "top1_half_interval95"
    assert all(r[gain] > r[half] for (_, name), r in rates.items() if "learned" not in name)
    over = [100 * rates[share, "closed form, same operator"][gain] for share in shares]
    assert "{:.1f}, {:.1f} and {:.1f} points over closed-form counts".format(*over) in text
    readme = prose("README.md")
    halves = [100 * rates[share, "closed form, same operator"][half] for share in shares]
    shown = [f"{a:.1f} +- {b:.1f}" for a, b in zip(over, halves, strict=True)]
    assert "{}, {} and {} points above closed-form ones".format(*shown) in readme
    alike = {r["top1"] for r in rows("rates-cpu") if r["method"] == "learned by FLOPs"
             or r["method"].endswith("same operator")}  # fmt: skip
    assert len(alike) == 1
    parts = []
    for row in flops:
        counts = row["schedule"]
        before = [counts["tokens"], *counts["merged"][:-1]]
        pruned = [n - p for n, p in zip(before, counts["pruned"], strict=True)]
        assert not any(pruned[:-3])
        parts.append(100 - 100 * sum(pruned) / (counts["tokens"] - counts["merged"][-1]))
    assert "{:.0f}, {:.0f} and {:.0f} % are merged".format(*parts) in text
    better = -100 * timed[0][gain], 100 * timed[0][half]
    assert "{:.1f} +- {:.1f} points more than by FLOPs".format(*better) in text
    assert sum(n == m for n, m in pairwise(timed[0]["schedule"]["merged"])) == 1
    assert f"{100 * timed[0]['gflops'] / flops[0]['gflops'] - 100:.0f} % more GFLOPs" in text
    assert all(abs(row[gain]) < row[half] for row in timed[1:])
    assert f"run {100 * timed[1]['ms'] / flops[1]['ms'] - 100:.1f} % slower" in text
    assert "run {:.2f} to {:.2f} times as fast".format(*lead_of_rivals(rates)) in text
    behind = []
    for share, learned in zip(shares[1:], timed, strict=False):
        for name in ("constant r, ToMe", "keep rate, EViT"):
            assert rates[share, name]["ms"] > learned["ms"]
            behind.append(100 * (learned["top1"] - rates[share, name]["top1"]))
    assert f"hit {min(behind):.1f} to {max(behind):.1f} points less" in text


def test_picture_of_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn from three timed budgets and from one without times; what the page shows is small."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    draw = importlib.import_module("rates_figure").draw
    for name in ("rates-h100", "rates-cpu"):
        draw(rows(name), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert (ROOT / "docs/images/rates.png").stat().st_size < 150_000
