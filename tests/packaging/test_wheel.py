"""What is released: the files in sdist and wheel, and the wheel at work without a checkout."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import vistoken

ROOT = Path(__file__).parents[2]
LIMIT = 45 * 2**20
ASSETS = (
    "deit_tiny_scenes.safetensors", "MODEL_CARD.md", "llava_tiny_scenes.safetensors",
    "LLAVA_MODEL_CARD.md", "fashion_test_1000.npz", "LICENSE-fashion-mnist.txt",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel built from it, not from the tree."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel, beside this one's libraries."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home / "venv", with_pip=False)
    (packages,) = (home / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    # Folders named here are searched, but their own .pth files, an editable install's, are not.
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return home / "venv/bin/python"


def run(python: Path, *words: str, folder: Path) -> subprocess.CompletedProcess:
    hidden = ("PYTHONPATH", "PYTHONHOME", "MYPYPATH")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [str(python), *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def released() -> set[str]:
    """Names in the wheel of every file that belongs there."""
    folders = ("vistoken", "models", "kernels", "configs")
    command = ["git", "ls-files", "-co", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [line for line in listed.stdout.split("\n") if line and (ROOT / line).is_file()]
    return {line if line.startswith("vistoken/") else f"vistoken/{line}" for line in files}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == released()
    assert {"vistoken/py.typed", "vistoken/models/nat.py", "vistoken/kernels/match.py"} <= names
    assert {f"vistoken/assets/{name}" for name in ASSETS} <= names
    assert wheel.stat().st_size < LIMIT


def test_sdist_holds_what_the_wheel_is_built_from(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"} <= inside
    assert not any(name.startswith(("tests", "benchmarks", "docs")) for name in inside)


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith("dist-info/METADATA")]
    data = Parser().parsestr(archive.read(name).decode())
    assert data["Version"] == vistoken.__version__ == "0.1.0"
    assert data["License-Expression"] == "Apache-2.0"
    needed = [line for line in data.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.split(">")[0] for line in needed] == ["torch"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert changes.splitlines()[2] == f"## {vistoken.__version__}"


MAIN_JOB = """
import pathlib, timm, torch, vistoken
assert "site-packages" in vistoken.__file__, vistoken.__file__
model = timm.create_model("deit_tiny_patch16_224", depth=3, img_size=64).eval()
x = torch.randn(2, 3, 64, 64)
before = model(x)
vistoken.wrap(model, vistoken.DiffRate(gflops=0.05))
print(vistoken.info(model))
assert model(x).shape == before.shape
assert torch.equal(vistoken.unwrap(model)(x), before)
import vistoken.models.dinat, vistoken.models.biformer
from vistoken.cli.main import main
assert main(["methods"]) == 0
assert main(["view", "reference:17", "--method", "tome:r=13"]) == 0
words = "eval --limit 8 --method tome --budgets 0.7 --speed_repeats 0"
assert main(words.split()) == 0
"""


def test_wheel_runs_the_main_jobs(python: Path, tmp_path: Path) -> None:
    out = run(python, "-c", MAIN_JOB, folder=tmp_path).stdout
    assert "diffrate:gflops=0.05 on timm ViT" in out and "hired" in out
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results/eval.json").read_text())["rows"]


def test_wheel_learns_a_schedule(python: Path, tmp_path: Path) -> None:
    (config,) = python.parents[1].glob("lib/*/site-packages/vistoken/configs/rates/smoke.yaml")
    short = ("--data.limit", "8", "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1")
    words = ("train", "fit", "--config", str(config), *short)
    run(python, "-m", "vistoken.cli.main", *words, folder=tmp_path)
    (schedule,) = tmp_path.glob("runs/**/schedule.json")
    assert vistoken.Schedule.load(schedule).depth == 12


SNIPPET = """
import torch
import vistoken

model = vistoken.wrap(torch.nn.Linear(1, 1), vistoken.ToMe(r=13))
reveal_type(model)
reveal_type(vistoken.ToMe(r=13).at_gflops)
vistoken.ToMe(r="13")
"""
CONFIG = (
    "[mypy]\nstrict = true\n[mypy-torch.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
)


def test_types_are_visible_from_the_wheel(python: Path, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    words = ("-m", "mypy", "--config-file", "mypy.ini", "--python-executable", str(python))
    done = subprocess.run(
        [sys.executable, *words, "snippet.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "missing library stubs or py.typed" not in done.stdout
    assert "vistoken.methods.tome.ToMe" in done.stdout
    assert 'Argument "r" to "ToMe" has incompatible type "str"' in done.stdout
    assert done.stdout.count("error:") == 1, done.stdout
