"""Timing by a scripted clock, the results file, tables and the plot."""

import json

import pytest
import torch
from eval_models import SIDE, tiny_vit
from PIL import Image

from vistoken.errors import ConfigError
from vistoken.eval import speed
from vistoken.eval.record import make_record, write_json
from vistoken.eval.report import BENCH_COLUMNS, EVAL_COLUMNS, plot, split_method, to_markdown
from vistoken.eval.speed import measure
from vistoken.methods import ToMe

ROW = {
    "case": "tiny", "batch": 2, "dtype": "32-true", "method": "tome:r=4", "mode": "eager",
    "ms": 8.0, "per_second": 250.0, "dense_ms": 12.0, "speedup": 1.5, "bound_ms": 9.0,
    "gflops": 0.75, "peak_mib": None, "top1": 0.915, "agreement": 0.98, "kl": 0.01234,
    "n": 1000, "seed": 0, "tokens": 17,
}  # fmt: skip


def test_rounds_are_interleaved_and_medians_paired(monkeypatch):
    # Two rounds on a clock that slows down threefold: the ratio within each round must survive.
    times = iter([12.0, 8.0, 36.0, 24.0, 12.0, 6.0])
    order = []

    def clock(call):
        order.append(call)
        return next(times)

    monkeypatch.setattr(speed, "_wall_ms", clock)
    images = torch.randn(2, 3, SIDE, SIDE)
    ticks = []
    dense, reduced = measure(
        tiny_vit(), [None, ToMe(r=2)], images, repeats=3, warmup=1, on_pass=lambda: ticks.append(1)
    )
    assert order == order[:2] * 3
    assert (dense.ms, dense.speedup) == (12.0, 1.0)
    assert (reduced.ms, reduced.per_second, reduced.speedup) == (8.0, 250.0, 1.5)
    assert reduced.peak_mib is None
    assert len(ticks) == 2 + 6


def test_model_keeps_its_weights_and_carries_nothing():
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(1, 3, SIDE, SIDE)
    dense, reduced = measure(model, [None, ToMe(r=2)], images, repeats=1, warmup=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert min(dense.ms, reduced.ms) > 0
    variant = speed._variant(model, ToMe(r=2))
    assert variant is not model
    assert all(a is b for a, b in zip(variant.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("methods", "mode", "text"),
    [([None], "fast", "mode='fast'"), ([None], "graph", "CUDA"), ([ToMe()], "eager", "dense")],
)
def test_wrong_requests(methods, mode, text):
    with pytest.raises(ConfigError, match=text):
        measure(tiny_vit(), methods, torch.randn(1, 3, SIDE, SIDE), mode=mode)


def test_results_file_has_the_agreed_shape(tmp_path):
    record = make_record(torch.device("cpu"), [ROW], "python eval.py", seed=0)
    loaded = json.loads(write_json(record, tmp_path / "a" / "eval.json").read_text())
    assert list(loaded) == ["device", "versions", "command", "date", "seed", "rows"]
    assert loaded["versions"]["torch"] == torch.__version__.split("+")[0]
    assert loaded["device"].startswith("CPU")
    assert loaded["rows"] == [ROW]


def test_markdown_prints_rounded_values():
    record = make_record(torch.device("cpu"), [ROW], "python eval.py", notes=["pool left out"])
    text = to_markdown("Title", record, EVAL_COLUMNS)
    assert "| tome | r=4 | 0.750 | 91.5 | 98.0 | 0.0123 | 250.0 | 1.50 | 17 |" in text
    assert "- pool left out" in text
    bench = to_markdown("Title", {**record, "rows": [{**ROW, "peak_mib": 512.4}]}, BENCH_COLUMNS)
    assert "| tome | r=4 | 250.0 | - | 1.50 | 8.00 | 0.750 | 512 | 17 |" in bench


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("dense", ("dense", "")),
        ("diffrate:gflops=0.87754840319", ("diffrate", "gflops=0.8775")),
        ("evit:keep_rate=0.75,at=[1,2,3]", ("evit", "keep_rate=0.75 at=[1,2,3]")),
        ("evit:at=[1,2],keep_rate=0.5", ("evit", "at=[1,2] keep_rate=0.5")),
    ],
)
def test_settings_are_shortened(method, expected):
    assert split_method({"method": method}) == expected


def test_plot_shows_each_method_in_its_colour(tmp_path):
    rows = [
        {"method": "dense", "gflops": 1.25, "top1": 0.95},
        {"method": "tome:r=5", "gflops": 1.0, "top1": 0.94},
        {"method": "tome:r=9", "gflops": 0.8, "top1": 0.9},
        {"method": "random", "gflops": 0.8, "top1": 0.7},
    ]
    image = Image.open(plot("Title", rows, tmp_path / "eval.png")).convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0x66, 0x66, 0x66), (0, 0, 0)} <= colours
    assert (0xD5, 0x5E, 0x00) not in colours
