"""The console script: subcommands, exit codes and messages."""

import json
import subprocess
import sys

import pytest
import torch
from eval_models import picture, tiny_classifier

import vistoken
from vistoken.cli import bench, view
from vistoken.cli.errors import guarded
from vistoken.cli.main import COMMANDS, main
from vistoken.errors import ConfigError, TapError
from vistoken.methods import METHODS


def test_methods_lists_every_method_with_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name, cls in METHODS.items():
        assert name in out
        assert cls.paper in out
    for text in ("keep_rate=0.7", "at=[3,6,9]", "r=13", "stride=2", "round_to=1", "nothing"):
        assert text in out


def test_help_names_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from vistoken.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'timm', 'lightning', 'rich', 'matplotlib', 'jsonargparse'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("args", [[], ["nope"], ["bench"], ["view"], ["bench", "x", "--mode", "y"]])
def test_wrong_usage_exits_with_2(args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"vistoken {vistoken.__version__}"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["bench", "no_such_vit"], "timm has no model of this name"),
        (["bench", "resnet18"], "looked for one vision transformer"),
        (["bench", "test_vit", "--method", "tome:r=-1"], "must be an integer >= 0"),
        (["bench", "test_vit", "--device", "nowhere"], "--device nowhere"),
        (["bench", "test_vit", "--mode", "graph", "--device", "cpu"], "CUDA graphs"),
        (["bench", "test_vit", "--budget", "2"], "--budget 2.0: must be a share in (0, 1)"),
        (["bench", "test_vit", "--batch_size", "0"], "--batch_size 0"),
        (["view", "absent.png"], "IMAGE absent.png: there is no such file"),
        (["view", "reference:1000"], "the scenes are reference:0 to reference:999"),
        (["view", "reference:0", "--out", "x.jpg"], "must end in .png"),
    ],
)
def test_wrong_requests_exit_with_2_without_a_traceback(args, text, capsys):
    assert main(args) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert text in message
    assert "Traceback" not in message


def test_exit_codes(capsys):
    def fail(error):
        raise error

    assert guarded(lambda: None) == 0
    assert guarded(lambda: fail(ConfigError("wrong"))) == 2
    assert guarded(lambda: fail(TapError("failed"))) == 1
    assert guarded(lambda: fail(KeyboardInterrupt())) == 1
    assert capsys.readouterr().err == "error: wrong\nerror: failed\nstopped\n"
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vistoken.cli.train", None)
    assert main(["train"]) == 2
    assert "vistoken[train]" in capsys.readouterr().err


def test_bench_prints_and_writes_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = ["reference", "--method", "tome:r=2", "--method", "evit", "--budget", "0.8"]
    words += ["--batch_size", "2", "--repeats", "2", "--json", str(tmp_path / "b.json")]
    options = bench.make_parser().parse_args([*words, "--device", "cpu"])
    bench.run_bench(options, "vistoken bench", reference=tiny_classifier)
    record = json.loads((tmp_path / "b.json").read_text())
    assert list(record) == ["device", "versions", "command", "date", "notes", "rows"]
    dense, tome, evit = record["rows"]
    model = tiny_classifier().model
    assert dense["gflops"] == pytest.approx(vistoken.flops(model))
    assert tome["gflops"] == pytest.approx(vistoken.flops(model, "tome:r=2"))
    assert (dense["tokens"], tome["tokens"], dense["speedup"]) == (17, 9, 1.0)
    assert evit["gflops"] <= 0.8 * dense["gflops"]
    assert tome["bound_ms"] == pytest.approx(tome["dense_ms"] * tome["gflops"] / dense["gflops"])
    assert tome["per_second"] == pytest.approx(2000 / tome["ms"])
    assert (dense["dtype"], dense["batch"], dense["peak_mib"]) == ("float32", 2, None)
    out = capsys.readouterr().out
    assert f"{tome['per_second']:.1f}" in out


def test_view_draws_an_image_file(tmp_path, capsys):
    picture(5).save(tmp_path / "in.png")
    words = [str(tmp_path / "in.png"), "--method", "tome:r=2", "--blocks", "1"]
    options = view.make_parser().parse_args([*words, "--out", str(tmp_path / "out.png")])
    path = view.run_view(options, reference=tiny_classifier)
    assert path.is_file()
    assert capsys.readouterr().out.strip() == f"wrote {path}"
    (tmp_path / "bad.png").write_text("no image")
    options.image = str(tmp_path / "bad.png")
    with pytest.raises(ConfigError, match="Pillow cannot read it"):
        view.run_view(options, reference=tiny_classifier)


def test_scene_is_the_embedded_one():
    import numpy as np

    from vistoken.eval.reference import ReferenceScenes
    from vistoken.eval.scenes import MEAN, STD

    shown = torch.from_numpy(np.array(view.scene("17"))).permute(2, 0, 1) / 255
    image = ReferenceScenes()[17][0] * torch.tensor(STD).view(3, 1, 1)
    expected = (image + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
    torch.testing.assert_close(shown, expected, atol=0.5 / 255 + 1e-6, rtol=0)
