"""`vistoken bench-vlm` on a tiny random model: rows, their arithmetic, and rows that fail."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from vistoken.cli.main import main
from vistoken.vlm import timing

QUICK = ["--random", "tiny", "--seconds", "0.05", "--new-tokens", "6", "--device", "cpu"]


def run(tmp_path, *words):
    path = tmp_path / "rows.json"
    assert main(["bench-vlm", *QUICK, *words, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_rows_say_what_was_timed(tmp_path, capsys):
    record = run(tmp_path, "--batch", "1", "--batch", "2", "--text", "30")
    rows = record["rows"]
    assert [(r["batch"], r["mode"], r["image_tokens"] > 0) for r in rows] == [
        (batch, mode, image)
        for batch in (1, 2)
        for image in (True, False)
        for mode in ("eager", "graph")
    ]
    for eager, graph in zip(rows[::2], rows[1::2], strict=True):
        assert eager["first_ids"] == graph["first_ids"]
        assert graph["execution"] == "fused chain" and eager["execution"] is None
        assert graph["dense_ms"] == eager["ms"]
        assert graph["speedup"] == pytest.approx(eager["ms"] / graph["ms"])
    for row in rows:
        assert row["per_second"] == pytest.approx(1000 * row["batch"] * 6 / row["ms"])
        assert row["decode_ms"] * 5 + row["first_ms"] == pytest.approx(row["ms"])
        assert row["prompt"] == (50 + row["image_tokens"] if row["image_tokens"] else 30)
    # Four crops of 4 x 4, a newline per row of the mosaic, and the thumbnail.
    assert rows[0]["image_tokens"] == 8 * 8 + 8 + 16
    assert capsys.readouterr().out.count("tokens/s") == 8


def test_a_row_that_fails_is_written_down(tmp_path, monkeypatch, capsys):
    original = timing._measure

    def measure(model, inputs, images, case):
        if case.mode == "eager":
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return original(model, inputs, images, case)

    monkeypatch.setattr(timing, "_measure", measure)
    rows = run(tmp_path)["rows"]
    assert rows[0]["error"] == "OutOfMemoryError: CUDA out of memory."
    assert "ms" not in rows[0] and "ms" in rows[1] and "speedup" not in rows[1]
    assert "FAILED" in capsys.readouterr().out


def test_unknown_methods_are_rows_that_fail(tmp_path):
    rows = run(tmp_path, "--skip-dense", "--method", "no_such_method", "--mode", "graph")["rows"]
    assert len(rows) == 1
    assert "no_such_method" in rows[0]["error"]


def test_llava_15_has_one_crop(tmp_path):
    row = run(tmp_path, "--shape", "llava-1.5", "--mode", "graph")["rows"][0]
    assert row["image_tokens"] == 16 and row["case"] == "llava-1.5-tiny-random"


@pytest.mark.parametrize(
    "words",
    [
        ["--seconds", "0"], ["--batch", "0"], ["--budget", "0"], ["--new-tokens", "1"],
        ["some/model"],
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused(words, capsys):
    assert main(["bench-vlm", *QUICK, *words]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_model_or_a_size_is_needed(capsys):
    assert main(["bench-vlm"]) == 2
    assert "--random" in capsys.readouterr().err


def test_methods_inside_the_language_model_are_timed(tmp_path):
    words = ["--skip-dense", "--method", "fastv:budget=0.5,layer=1", "--mode", "eager"]
    row = run(tmp_path, *words, "--mode", "graph")["rows"]
    assert (row[0]["prompt"], row[0]["image_tokens"], row[0]["tokens"]) == (138, 88, 44)
    assert "drops tokens inside" in row[1]["error"]
