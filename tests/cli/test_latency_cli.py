"""`vistoken latency`: what it prints, caches and writes, and the exit codes of wrong requests."""

import pytest
from eval_models import tiny_classifier

from vistoken import LatencyTable
from vistoken.cli import latency
from vistoken.cli.main import main


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "cache" / "vistoken"


def run(*words):
    options = latency.make_parser().parse_args(["reference", "--device", "cpu", *words])
    return latency.run_latency(options, reference=tiny_classifier)


def test_it_measures_caches_and_prints(cache, tmp_path, capsys):
    words = ("--batch", "2", "--method", "tome", "--repeats", "1", "--steps", "5")
    table = run(*words, "--json", str(tmp_path / "copy.json"))
    (path,) = cache.iterdir()
    assert LatencyTable.load(path) == table == LatencyTable.load(tmp_path / "copy.json")
    assert table.tokens == (5, 10, 15, 17)
    out = capsys.readouterr().out
    assert "tiny, batch 2, float32, eager, CPU" in out and str(path) in out
    for tokens, ms in zip(table.tokens, table.block_ms, strict=True):
        assert any({str(tokens), f"{ms:.4f}"} <= set(line.split()) for line in out.splitlines())
    assert run(*words) == table, "read from the cache"
    assert run(*words, "--refresh") != table


def test_it_prints_settings_for_a_speedup(cache, capsys):
    words = ("--batch", "2", "--method", "tome", "--repeats", "1", "--steps", "5")
    table = run(*words)
    (path,) = cache.iterdir()
    path.write_text(path.read_text().replace(f'"dense_ms": {table.dense_ms}', '"dense_ms": 1e6'))
    run(*words, "--speedup", "100")
    assert "100x: tome:r=0 (predicted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--batch", "0"], "--batch=0: must be a whole number >= 1"),
        (["--mode", "graph"], "CUDA graphs need CUDA"),
        (["--steps", "900"], "step=900: must be below the model's"),
        (["--method", "pool"], "its counts cannot be chosen freely"),
        (["--speedup", "1e9", "--steps", "50", "--repeats", "1"], "is out of reach"),
        (["--speedup", "0.5", "--steps", "50", "--repeats", "1"], "must be 1 or larger"),
    ],
)
def test_wrong_requests_exit_with_2(words, text, cache, capsys):
    assert main(["latency", "test_vit", "--device", "cpu", *words]) == 2
    assert text in capsys.readouterr().err


def test_short_names_of_types(cache):
    options = latency.make_parser().parse_args(["x", "--dtype", "bf16", "--image-size", "64"])
    assert (options.dtype, options.image_size, options.batch) == ("bf16", 64, 1)
    assert run("--dtype", "bf16", "--repeats", "1", "--steps", "8").case.dtype == "bfloat16"
