"""Figures in README and docs are those of the files they name."""

from __future__ import annotations

import re

import pytest
from figures import ROOT, lead_of_rivals, learned_counts, rows, table_after

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
    assert (
        "{:.2f} to {:.2f} times on DeiT and ViT from batch 8 on".format(*gains("tome", 8)) in text
    )
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
    rates = learned_counts()
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
    small = shares.pop(SMALL_MAP)
    least, most = min(shares.values()), max(shares.values())
    assert len(shares) == 5 and most <= 10 < small
    assert f"takes {least:.1f} to {most:.1f} % of the layer on five of the six maps" in text
    assert f"at most 10 % is missed on 14 x 14 cells ({small:.1f} %)" in text

    def full_over_ours(case: str) -> list[float]:
        return [
            measured[case, "sdpa full", way]["ms"] / measured[case, "vistoken", way]["ms"]
            for way in ("fwd", "fwd+bwd")
        ]

    assert [case for case in cases if min(full_over_ours(case)) < 1] == [SMALL_MAP]
    times = [1 / ratio for ratio in full_over_ours(SMALL_MAP)]
    assert "{:.1f} times forward, {:.1f} times with the backward pass".format(*times) in text
    times = full_over_ours("bra B64 28x28 H6 D32 S7 k4")
    assert "On 28 x 28 routing is {:.1f} and {:.1f} times as fast as full".format(*times) in text
    flex = [r for r in rows("bra-h100") if r["method"] == "flex"]
    assert {r["case"] for r in flex} == {cases[0]} and all(r["agrees"] for r in flex)
    shown = "{:.2f} / {:.2f} ms, {:.0f} and {:.0f} times ours of that run and slower"
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
