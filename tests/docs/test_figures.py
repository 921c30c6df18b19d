"""Figures in README and docs are those of the files they name."""

from __future__ import annotations

import importlib
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
NAMES = {
    "DeiT-S/224": "deit_small_patch16_224",
    "ViT-B/224": "vit_base_patch16_224",
    "ViT-L/224": "vit_large_patch16_224",
    "ViT-B/384": "vit_base_patch16_384",
    "EVA-02 B/16": "eva02_base_patch16_clip_224",
    "transformers DINOv2-B": "transformers/dinov2_base",
    "transformers CLIP-L/14": "transformers/clip_vit_large_patch14",
    "LLaVA-NeXT-7B": "llava-next-7b-random",
}
SMALL_MAP = "bra B64 14x14 H12 D32 S7 k16"


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def table_after(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table behind a heading, without its head."""
    text = (ROOT / page).read_text().partition(heading)[2]
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_speed_table_of_the_readme() -> None:
    measured = {
        (row["case"], row["batch"], row["method"]): row["per_second"]
        for row in [*rows("vit-h100"), *rows("vlm-h100")]
        if row["mode"] == "graph"
    }
    table = table_after("README.md", "## Measured speed")
    assert len(table) >= 10
    case, batch = "", 0
    for model, method, dense, wrapped, faster in table:
        if model:
            name, _, number = model.rpartition(", ")
            case, batch = NAMES[name], int(number)
        before = measured[case, batch, "dense"]
        after = measured[case, batch, method.strip("`")]
        assert [f"{before:,.0f}", f"{after:,.0f}"] == [dense, wrapped], (model, method)
        assert float(faster.rstrip("x")) == pytest.approx(after / before, abs=0.0051)


def test_prose_under_the_speed_table() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    vit = {(r["case"], r["batch"], r["method"], r["mode"]): r for r in rows("vit-h100")}
    vlm = {(r["case"], r["batch"], r["method"], r["mode"]): r for r in rows("vlm-h100")}
    small, base, large, wide = (
        ("deit_small_patch16_224", 256), ("vit_base_patch16_224", 256),
        ("vit_large_patch16_224", 128), ("vit_base_patch16_384", 64),
    )  # fmt: skip

    def gain(case: tuple, method: str, over: str = "graph") -> str:
        found = vit[*case, method, "graph"]["per_second"]
        return f"{found / vit[*case, 'dense', over]['per_second']:.2f}x"

    fused = [gain(case, "tome:r=0") for case in (small, base, large)]
    assert "run DeiT-S at {}, ViT-B at {}, ViT-L at {}".format(*fused) in text
    merged = zip((small, base, large, wide), (13, 13, 8, 23), strict=True)
    compiled = [gain(case, f"tome:r={r}", "compiled") for case, r in merged]
    assert "{}, {}, {} and {} for the four large ToMe rows".format(*compiled) in text
    one = [vit["deit_small_patch16_224", 1, m, "eager"] for m in ("tome:r=13", "dense")]
    assert "{:.0f} against {:.0f} images/s".format(*(r["per_second"] for r in one)) in text

    def llava(batch: int, method: str, mode: str) -> dict:
        return vlm["llava-next-7b-random", batch, method, mode]

    for batch in (1, 8):
        first = [llava(batch, m, "graph")["first_ms"] for m in ("hired:budget=0.2", "dense")]
        assert "{:.0f} instead of {:.0f} ms (batch {})".format(*first, batch) in text
    plain, static = (
        [f"{llava(b, 'dense', mode)['per_second']:.0f}" for b in (1, 8)]
        for mode in ("eager", "static")
    )
    assert f"makes {plain[0]} and {plain[1]} tokens/s" in text
    assert f"with compilation {static[0]} and {static[1]}" in text


def test_generation_table() -> None:
    measured = {(r["case"], r["batch"], r["method"], r["mode"]): r for r in rows("vlm-h100")}
    model, batch = "", 0
    table = table_after("docs/vlm.md", "### Measured")
    assert len(table) >= 14
    for label, what, first, each, whole, peak in table:
        if label:
            model, _, number = label.rpartition(", ")
            batch = int(number)
        method, _, mode = what.replace("`", "").rpartition(", ")
        row = measured[f"{model.lower()}-7b-random", batch, method, mode]
        assert [f"{row['first_ms']:.1f}", f"{row['decode_ms']:.2f}"] == [first, each]
        assert [f"{row['ms']:.0f}", f"{row['peak_mib']:.0f}"] == [whole, peak]


def test_what_pays() -> None:
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    vit = {
        (r["case"], r["batch"], r["method"]): r for r in rows("vit-h100") if r["mode"] == "graph"
    }

    def gains(name: str, least: int) -> list[float]:
        found = [
            r["per_second"] / vit[case, batch, "dense"]["per_second"]
            for (case, batch, method), r in vit.items()
            if method.startswith(name) and "patch16" in case and "eva" not in case
            and batch >= least and not method.endswith("r=0")
        ]  # fmt: skip
        return [min(found), max(found)]

    assert "{:.2f} to {:.2f} times the dense graph's speed |".format(*gains("diffrate", 8)) in text
    assert "{:.2f} to {:.2f} times the dense graph's speed from".format(*gains("tome", 8)) in text
    attention = {
        (r["case"], r["method"], r["direction"]): r["ms"]
        for r in rows("na-h100") if r["mode"] == "graph" and "14x14" not in r["case"]
    }  # fmt: skip
    ratios = [
        attention[case, "sdpa full", way] / ms
        for (case, method, way), ms in attention.items() if method == "vistoken"
    ]  # fmt: skip
    assert f"{min(ratios):.1f} to {max(ratios):.0f} times the speed of full attention" in text
    models = {(r["case"], r["method"]): r["ms"] for r in rows("bra-models-h100")}
    paths = [
        models[f"biformer_base {side}", "gather"] / models[f"biformer_base {side}", "vistoken"]
        for side in (224, 512)
    ]
    assert "{:.2f} and {:.2f} times the gather path".format(*paths) in text
    rates = {(r["share"], r["method"]): r for r in rows("rates-h100") if "share" in r}
    gain = rates[0.4, "learned by milliseconds"]["top1"]
    gain -= rates[0.4, "closed form, same operator"]["top1"]
    assert f"{100 * gain:.1f} points above closed-form counts" in text
    assert "ToMe and EViT run {:.2f} to {:.2f} times".format(*lead_of_rivals(rates)) in text
    routed = {(r["case"], r["method"], r.get("direction")): r["ms"] for r in rows("bra-h100")}
    full, ours, choice, layer = (
        routed[SMALL_MAP, method, "fwd"]
        for method in ("sdpa full", "vistoken", "vistoken routing", "vistoken layer")
    )
    assert f"full attention is {ours / full:.1f} times as fast as [routing]" in text
    assert f"choosing regions takes {100 * choice / layer:.1f} % of the layer" in text
    llava = {(r["batch"], r["method"], r["mode"]): r for r in rows("vlm-h100")}
    alone = llava[1, "dense", "eager"]["ms"] / llava[1, "dense", "graph"]["ms"]
    assert f"{alone:.1f} times plain `generate` from graphs alone" in text
    most = [next(r for r in rows("vlm-h100") if r.get("largest") and r["method"].startswith(name))
            for name in ("dense", "hired")]  # fmt: skip
    batches, speeds = ([row[key] for row in most] for key in ("batch", "per_second"))
    assert f"{batches[1] / batches[0]:.1f} times as many sequences" in text
    assert f"{speeds[1] / speeds[0]:.1f} times the tokens/s" in text


def lead_of_rivals(rates: dict[tuple, dict]) -> tuple[float, float]:
    """Least and most speed of ToMe and EViT over counts learned by FLOPs, at equal GFLOPs."""
    found = [
        rates[share, "learned by FLOPs"]["ms"] / rates[share, name]["ms"]
        for share in (0.4, 0.55, 0.7) for name in ("constant r, ToMe", "keep rate, EViT")
    ]  # fmt: skip
    return min(found), max(found)


def test_maps_table() -> None:
    found = {(r["label"], r["share"]): r for r in rows("dense-cpu") if r["method"] != "dense"}
    table = table_after("docs/results.md", "## A task that reads every patch")
    assert sum(cell != "-" for row in table for cell in row[1:]) == len(found)
    for name, *cells in table:
        for share, cell in zip((0.7, 0.55, 0.4), cells, strict=True):
            if cell != "-":
                row = found[name.strip("`"), share]
                assert cell == f"{row['iou']:.3f} ({row['mae']:.3f})"


def test_routing_table() -> None:
    measured = {(r["case"], r["method"], r.get("direction")): r for r in rows("bra-h100")}
    cases = list(dict.fromkeys(case for case, *_ in measured))
    table = table_after("docs/routing.md", "### Measured")
    assert len(table) == len(cases) == 6
    for case, (_, ours, gather, full, gain, memory, choice) in zip(cases, table, strict=True):
        found = {}
        for method, text in (("vistoken", ours), ("gather", gather), ("sdpa full", full)):
            for direction, shown in zip(("fwd", "fwd+bwd"), text.split(" / "), strict=True):
                row = found[method, direction] = measured[case, method, direction]
                close = 0.51 * 10 ** -len(shown.partition(".")[2])
                assert float(shown) == pytest.approx(row["ms"], abs=close)
        for direction, shown in zip(("fwd", "fwd+bwd"), gain.split(" / "), strict=True):
            ratio = found["gather", direction]["ms"] / found["vistoken", direction]["ms"]
            assert shown == f"{ratio:.1f}x"
        peaks = [found[method, "fwd+bwd"]["peak_mib"] for method in ("vistoken", "gather")]
        assert memory == "{:.0f} / {:.0f}".format(*peaks)
        assert choice == f"{choosing(measured, case):.1f} %"


def choosing(measured: dict[tuple, dict], case: str) -> float:
    """Percent of the layer's time that the choice of regions takes."""
    part, whole = (measured[case, f"vistoken {name}", "fwd"]["ms"] for name in ("routing", "layer"))
    return 100 * part / whole


def test_prose_under_the_routing_table() -> None:
    text = " ".join((ROOT / "docs/routing.md").read_text().split())
    measured = {(r["case"], r["method"], r["direction"]): r for r in rows("bra-h100")}
    cases = list(dict.fromkeys(case for case, *_ in measured))
    shares = {case: choosing(measured, case) for case in cases}
    good = [share for share in shares.values() if share <= 10]
    assert len(good) == 4
    assert f"takes {min(good):.1f} to {max(good):.1f} % of the layer on four of the six" in text
    middle, small = (shares[case] for case in cases[1:3])
    assert cases[2] == SMALL_MAP and middle > 10 and small > 10
    assert f"on 28 x 28 cells ({middle:.1f} %) and on 14 x 14 ({small:.1f} %)" in text

    def full_over_ours(case: str) -> list[float]:
        return [
            measured[case, "sdpa full", way]["ms"] / measured[case, "vistoken", way]["ms"]
            for way in ("fwd", "fwd+bwd")
        ]

    assert [case for case in cases if min(full_over_ours(case)) < 1] == [SMALL_MAP]
    times = [1 / ratio for ratio in full_over_ours(SMALL_MAP)]
    assert "{:.1f} times forward, {:.1f} times with the backward pass".format(*times) in text
    (wide,) = {f"{ratio:.1f}" for ratio in full_over_ours("bra B64 32x32 H12 D32 S8 k16")}
    assert f"On 32 x 32 it is {wide} times slower" in text
    flex = [r for r in rows("bra-h100") if r["method"] == "flex"]
    assert {r["case"] for r in flex} == {cases[0]} and all(r["agrees"] for r in flex)
    shown = "{:.2f} / {:.2f} ms, {:.0f} and {:.0f} times ours and slower than full attention"
    assert shown.format(*(r["ms"] for r in flex), *(r["times_ours"] for r in flex)) in text
    assert all(r["ms"] > measured[cases[0], "sdpa full", r["direction"]]["ms"] for r in flex)
    models = {(r["case"], r["method"]): r["ms"] for r in rows("bra-models-h100")}
    pairs = [
        [models[f"biformer_base {side}", path] for path in ("vistoken", "gather")]
        for side in (224, 512)
    ]
    assert "{:.1f} ms against {:.1f} on the gather path".format(*pairs[0]) in text
    assert "{:.1f} against {:.1f} at 512, ".format(*pairs[1]) in text
    ratios = [gather / ours for ours, gather in pairs]
    assert "{:.2f} and {:.2f} times its speed".format(*ratios) in text


def test_rates_tables() -> None:
    steps = {r["method"]: r for r in rows("rates-h100") if r["case"].endswith("step")}
    table = table_after("docs/rates.md", "**A step of DeiT-S**")
    assert len(table) == len(steps)
    for method, ms, times, memory, hours in table:
        name = "dense forward+backward" if method.startswith("dense") else method
        row = steps[name]
        wanted = f"{row['ms']:.1f}", f"{row['times_dense']:.2f}", f"{row['times_memory']:.2f}"
        assert (ms, times, memory, hours) == (*wanted, f"{row['gpu_hours_3_epochs']:.2f}")
    learned = {(str(r["share"]), r["method"]): r for r in rows("rates-h100") if "share" in r}
    table = table_after("docs/rates.md", "**Learning**")
    assert len(table) == len(learned)
    for share, name, gflops, ms, top1, gain in table:
        row = learned[share, name]
        assert gflops == f"{row['gflops']:.3f}"
        assert ms == (f"{row['ms']:.2f}" if row["ms"] else "")
        assert float(top1) == pytest.approx(100 * row["top1"], abs=0.051)
        if gain:
            exact = row["top1_flops_learned_minus_this"], row["top1_half_interval95"]
            for text, value in zip(gain.split(" +- "), exact, strict=True):
                close = 0.51 * 10 ** -len(text.partition(".")[2])
                assert float(text) == pytest.approx(100 * value, abs=close), (share, name)


def test_prose_under_the_rates_tables() -> None:
    text = " ".join((ROOT / "docs/rates.md").read_text().split())
    rates = {(r["share"], r["method"]): r for r in rows("rates-h100") if "share" in r}
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
    readme = " ".join((ROOT / "README.md").read_text().split())
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


def test_accuracy_table_of_the_readme() -> None:
    record = rows("eval-reference-cpu")
    cells = table_after("README.md", "## Accuracy on the embedded task")
    for first, *_, high, middle, low in cells:
        name = re.search(r"`(\w+)`", first)[1]
        found = [row for row in record if row["method"].partition(":")[0] == name]
        assert len(found) == 3
        shown = [tuple(map(float, re.findall(r"[\d.]+", cell))) for cell in (high, middle, low)]
        found.sort(key=lambda row: -row["gflops"])
        for row, (top1, agreement) in zip(found, shown, strict=True):
            assert top1 == pytest.approx(100 * row["top1"], abs=0.051)
            assert agreement == pytest.approx(100 * row["agreement"], abs=0.051)


def test_neighborhood_table() -> None:
    measured = {
        (row["case"], row["method"], row["direction"]): row["ms"]
        for row in rows("na-h100")
        if row["mode"] == "graph"
    }
    for shape, forward, both, full, flex in table_after("docs/neighborhood.md", "## Measured"):
        batch, grid, heads, width, window = shape.split(", ")
        side = grid.replace(" x ", "x")
        case = f"na2d B{batch} {side} H{heads} D{width} k{window}x{window}"
        shown = {"vistoken": (forward, both), "sdpa full": full.split(" / ")}
        if (case, "flex", "fwd") in measured:
            shown["flex"] = flex.split(" / ")
        for method, pair in shown.items():
            for text, direction in zip(pair, ("fwd", "fwd+bwd"), strict=True):
                close = 0.51 * 10 ** -len(text.partition(".")[2])
                found = measured[case, method, direction]
                assert float(text) == pytest.approx(found, abs=close), (case, method)


def answers(name: str) -> dict[tuple[str, float], float]:
    """Percent right by method and budget."""
    return {
        (row["method"].partition(":")[0], row["budget"]): 100 * row["accuracy"]
        for row in rows(name)[1:]
    }


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("vlm-tiny-scenes-h100", "### Accuracy against budget"),
        ("vlm-tiny-places-cpu", "**Places kept.**"),
        ("vlm-tiny-easy-h100", "On **easy-vqa**"),
    ],
)
def test_answers_of_the_tiny_llava(name: str, heading: str) -> None:
    found = answers(name)
    shown = {
        (cells[0].strip("`"), budget): float(cell)
        for cells in table_after("docs/vlm.md", heading)
        for budget, cell in zip((0.05, 0.1, 0.2, 0.4, 0.6), cells[1:], strict=True)
        if cell != "-"
    }
    assert shown.keys() == found.keys()
    for key, value in shown.items():
        assert value == pytest.approx(found[key], abs=0.051), key
    dense = rows(name)[0]
    interval = "{:.1f} ({:.1f} to {:.1f})".format(
        *(100 * dense[key] for key in ("accuracy", "low", "high"))
    )
    text = (ROOT / "docs/vlm.md").read_text().partition(heading)[2].partition("![")[0]
    assert interval in " ".join(text.partition("|")[0].split())


def test_answers_in_the_readme() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    found, dense = answers("vlm-tiny-scenes-h100"), rows("vlm-tiny-scenes-h100")[0]
    places = answers("vlm-tiny-places-cpu")
    assert f"answers {100 * dense['accuracy']:.1f} % of {dense['n']:,} questions" in text
    for words, table, name in (
        ("PyramidDrop {}", found, "pyramiddrop"),
        ("HiRED {}", found, "hired"),
        ("random tokens {}", found, "random_tokens"),
        ("HiRED has {}", places, "hired"),
        ("random tokens have {}", places, "random_tokens"),
    ):
        shown = [f"{table[name, budget]:.1f}" for budget in (0.6, 0.4, 0.2)]
        assert words.format(" / ".join(shown)) in text, words
