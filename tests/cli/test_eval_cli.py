"""eval.py on data sets on disk, against loops over the files."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from eval_models import picture
from PIL import Image

import vistoken
from vistoken.cli.eval import main, parse_options
from vistoken.eval.options import BUDGETS, EvalOptions
from vistoken.eval.run import shorten
from vistoken.models.load import load_classifier

ROOT = Path(__file__).parents[2]
NAMES = ("apple", "bird", "coat")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """7 pictures in 3 folders, the same in a tar, and weights of a small timm model."""
    folder = tmp_path_factory.mktemp("data")
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number in range(7):
            name = f"{NAMES[number % 3]}/{number}.png"
            path = folder / "images" / "val" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number, 180).save(path)
            data = path.read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    torch.save(model.state_dict(), folder / "w.pth")
    return folder


def options_for(files, out, data="images"):
    return [
        "--model=test_vit", "--num_classes=3", f"--checkpoint={files / 'w.pth'}",
        f"--data={files / data}", "--accelerator=cpu", "--batch_size=3", f"--out={out}",
        "--speed_repeats=1", "--speed_batch=2", "--method=tome:r=7", "--method=evit",
        "--budgets", "0.8",
    ]  # fmt: skip


def by_hand(files, method):
    """Top-1, agreement and KL from the files themselves."""
    loaded = load_classifier("test_vit", checkpoint=files / "w.pth", num_classes=3)
    hits = agree = 0
    kl = 0.0
    paths = sorted((files / "images" / "val").rglob("*.png"))
    for path in paths:
        image = loaded.transform(Image.open(path).convert("RGB"))[None]
        dense = loaded.logits(image)[0]
        vistoken.wrap(loaded.model, method)
        logits = loaded.logits(image)[0]
        vistoken.unwrap(loaded.model)
        hits += int(logits.argmax()) == NAMES.index(path.parent.name)
        agree += int(logits.argmax()) == int(dense.argmax())
        p = dense.double().softmax(0)
        kl += float((p * (p / logits.double().softmax(0)).log()).sum())
    n = len(paths)
    return {"top1": hits / n, "agreement": agree / n, "kl": kl / n, "n": 7}


@pytest.mark.parametrize("data", ["images", "images.tar"])
def test_folder_and_tar_equal_a_hand_loop(files, tmp_path, data, capsys):
    assert main(options_for(files, tmp_path, data)) == 0
    record = json.loads((tmp_path / "eval.json").read_text())
    labels = [row["method"] for row in record["rows"]]
    assert labels[:2] == ["dense", "tome:r=7"]
    assert labels[2].startswith("evit:keep_rate=")
    for row in record["rows"][1:]:
        expected = by_hand(files, row["method"])
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert row["dense_ms"] == record["rows"][0]["ms"] > 0
        assert row["bound_ms"] == pytest.approx(
            row["dense_ms"] * row["gflops"] / row["dense_gflops"]
        )
    assert record["rows"][2]["gflops"] <= 0.8 * record["rows"][0]["gflops"]
    assert Image.open(tmp_path / "eval.png").size == (1260, 780)
    assert "| tome | r=7 |" in (tmp_path / "eval.md").read_text()
    assert "evaluate" in capsys.readouterr().out


def test_results_file_has_the_agreed_fields(files, tmp_path):
    main(options_for(files, tmp_path))
    record = json.loads((tmp_path / "eval.json").read_text())
    assert {"device", "versions", "command", "date", "rows", "seed", "notes"} <= set(record)
    assert {
        "case", "batch", "dtype", "method", "mode", "ms", "per_second", "dense_ms", "speedup",
        "bound_ms", "gflops", "peak_mib", "top1", "top5", "agreement", "kl", "n", "seed",
    } <= set(record["rows"][0])  # fmt: skip
    assert record["versions"]["timm"] == timm.__version__
    assert record["rows"][0]["top5"] == 1.0


@pytest.mark.slow
def test_two_processes_count_every_image_once(files, tmp_path):
    args = [*options_for(files, tmp_path), "--speed_repeats=0", "--devices=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "eval.py", *args], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for row in json.loads((tmp_path / "eval.json").read_text())["rows"][1:]:
        expected = by_hand(files, row["method"])
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_config_file_and_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("method: [tome, pool]\nbudgets: [0.5]\npretrained: true\nseed: 4\n")
    options = parse_options(["--config", str(path), "--seed", "5", "--device", "cpu"])
    assert (options.method, options.budgets) == (["tome", "pool"], [0.5])
    assert (options.pretrained, options.seed, options.accelerator) == (True, 5, "cpu")
    replaced = parse_options(["--config", str(path), "--method=evit", "--method", "tome:r=[1,2]"])
    assert replaced.method == ["evit", "tome:r=[1,2]"]
    assert parse_options(["--pretrained"]).pretrained
    assert parse_options([]).budgets == list(BUDGETS)


@pytest.mark.parametrize("name", ["reference", "imagefolder"])
def test_shipped_configs_are_valid(name):
    options = parse_options(["--config", str(ROOT / "configs" / "eval" / f"{name}.yaml")])
    if name == "reference":
        plain = parse_options([])
        plain.method = list(vistoken.methods.METHODS)
        assert options == plain
    else:
        assert options.pretrained and options.devices == "1"


def test_a_cpu_gets_fewer_scenes_and_says_so():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    shorter, (note,) = shorten(EvalOptions(), cpu)
    assert shorter.limit == 250
    assert "--limit 1000" in note
    for options, device in [
        (EvalOptions(limit=1000), cpu),
        (EvalOptions(), cuda),
        (EvalOptions(model="test_vit", data="folder"), cpu),
    ]:
        assert shorten(options, device) == (options, [])


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--budgets", "1.5"], "--budgets [1.5]: must be shares in (0, 1)"),
        (["--method", "nope"], "unknown method 'nope'; there are tome"),
        (["--method", "tome:k=3"], "allowed: proportional"),
        (["--precision", "fp8"], "must be one of ('32-true'"),
        (["--data", "absent"], "there is no such folder or file"),
        (["--model", "deit_tiny_patch16_224"], "needs --data"),
        (["--batch_size", "0"], "--batch_size 0: must be a whole number >= 1"),
        (["--data", "images", "--model", "test_vit", "--class_map", "absent.txt"], "--data"),
    ],
)
def test_wrong_options_exit_with_2_and_say_why(args, text, capsys):
    code = main([*args, "--accelerator=cpu", "--limit=1"])
    message = capsys.readouterr().err
    assert code == 2
    assert text in message
    assert "Traceback" not in message


def test_unreadable_data_exits_with_1(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code = main(["--model=test_vit", f"--data={tmp_path / 'empty'}", "--accelerator=cpu"])
    assert code == 1
    assert "Found 0 images" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--unknown", "1"], ["--seed", "x"], ["--config", "absent.yaml"]])
def test_unknown_options_exit_with_2(args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
