"""The folder tree is the architecture: names, imports, lengths and what a wheel carries."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vistoken

ROOT = Path(__file__).parents[2]
MAPPED = ("models", "kernels", "configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Who may import whom: a module may import modules of its own or a lower number.
LAYERS = {
    "_version": 0, "errors": 0, "shape": 0, "flops": 1, "schedule": 2, "kernels": 3, "configs": 3,
    "state": 4, "attention": 4, "methods": 5, "spec": 5, "tap": 6, "tracing": 6, "sparse": 7,
    "attach": 7, "hooks": 8, "dense": 8, "fast": 8, "patches": 8, "parts": 6, "graphs": 1,
    "models": 8, "api": 9, "probe": 9, "latency": 9, "": 10, "clock": 1,
    "vlm": 10, "assets": 10, "view": 11, "eval": 11, "train": 12, "cli": 13,
}  # fmt: skip
HOSTS = {"timm", "open_clip", "transformers", "lightning", "torchmetrics", "matplotlib", "rich"}
HOSTS_FROM = 8


def sources():
    for folder in ("vistoken", *MAPPED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(part.is_symlink() for part in [path, *path.parents][: len(path.parts) - 1]):
                yield path


def layer(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = parts[0] if parts[0] in MAPPED else parts[1]
    return "" if name == "__init__" else name


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def test_mapped_folders_are_no_regular_packages():
    for folder in MAPPED:
        assert not (ROOT / folder / "__init__.py").exists()
        assert (ROOT / "vistoken" / folder).is_symlink()
        assert os.readlink(ROOT / "vistoken" / folder) == f"../{folder}"


def test_package_list_is_complete():
    folders = {path.parent for path in sources()}
    names = set()
    for folder in folders:
        parts = folder.relative_to(ROOT).parts
        names.add(".".join(parts if parts[0] == "vistoken" else ("vistoken", *parts)))
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert names <= listed
    assert listed - names <= {"vistoken.configs"}, "configs holds data only"


@pytest.mark.parametrize("name", MAPPED)
def test_top_level_folders_do_not_shadow_packages(name):
    code = f"import importlib.util as u; s = u.find_spec('{name}'); print(s.origin if s else None)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert str(ROOT) not in out.stdout, out.stdout + out.stderr


def test_nothing_was_imported_under_two_names():
    doubles = [name for name in sys.modules if name.split(".")[0] in MAPPED]
    inside = [n for n in doubles if str(ROOT) in str(getattr(sys.modules[n], "__file__", "") or "")]
    assert not inside


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = LAYERS[layer(path)]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "vistoken":
            target = parts[1] if len(parts) > 1 and parts[1] in LAYERS else ""
            assert LAYERS[target] <= own, f"{path.name} imports {name}"
        elif parts[0] in HOSTS:
            assert own >= HOSTS_FROM, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            limit = 120 if layer(path) == "kernels" else 75
            assert length <= limit, f"{node.name} has {length} lines"


def test_import_needs_torch_only():
    code = (
        "import sys, torch; before = set(sys.modules); import vistoken; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    optional = HOSTS | {"triton", "PIL", "jsonargparse", "yaml", "torchvision", "safetensors"}
    assert not loaded & optional


def test_import_takes_little_beside_torchs_own():
    code = (
        "import time, torch; start = time.perf_counter(); import vistoken; "
        "print(time.perf_counter() - start)"
    )
    times = []
    for _ in range(5):  # other processes may slow any one of them
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(float(out.stdout))
        if times[-1] < 0.3:
            break
    assert min(times) < 0.3


def test_public_names_exist_and_are_listed_in_order():
    missing = [name for name in vistoken.__all__ if not hasattr(vistoken, name)]
    assert not missing
    assert vistoken.__version__ == PROJECT_VERSION


PROJECT_VERSION = (ROOT / "vistoken" / "_version.py").read_text().split('"')[-2]


def test_no_path_of_one_machine_is_tracked():
    pattern = "(/wo" + "rk/|/ro" + "ot/|/ho" + "me/[a-z]+/|/op" + "t/)"
    out = subprocess.run(
        ["git", "grep", "-nIE", pattern, "--", ":!LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.stdout == ""


def test_readme_names_only_files_that_exist():
    import re

    text = (ROOT / "README.md").read_text()
    named = re.findall(
        r"\b(?:configs|benchmarks|docs|tests|vistoken)/[\w./-]+\.\w+|\b(?:eval|train)\.py\b", text
    )
    assert named
    for name in set(named):
        assert (ROOT / name).exists(), name
