"""Every code block of the documentation runs, on small local models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import vlm_models
from pages import ROOT, code_blocks, commands, run, run_page, stand_ins, tiny_processor
from PIL import Image

import vistoken
from vistoken.cli.main import COMMANDS
from vistoken.methods import ATTENTIONS, METHODS, hosted_methods
from vistoken.vlm.inside import LayerMethod


class ByGflops:
    """A clock for which time is cost: pages that plan by time need no timing in a test."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.shape = vistoken.api.shape_of(model)
        self.dense_ms = vistoken.flops(model)

    def predict(self, schedule: vistoken.Schedule) -> float:
        return schedule.gflops(self.shape)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    monkeypatch.chdir(tmp_path)
    for maker in ("measure", "cached"):
        clock = staticmethod(lambda model, *images, **settings: ByGflops(model))
        monkeypatch.setattr(vistoken.LatencyTable, maker, clock)
    return {"vistoken": vistoken, "torch": torch, **stand_ins(monkeypatch)}


def test_quick_start_of_a_vit(names: dict, capsys: pytest.CaptureFixture) -> None:
    run_page("docs/start/vit.md", names)
    assert "tome:r=13 on" in capsys.readouterr().out
    assert names["features"].shape == (4, 197, 384)
    assert [m.shape[1:] for m in names["maps"]] == [(384, 14, 14)] * 2
    assert names["t"].counts[-1] == 197 - 12 * 13
    cost = names["method"].cost(vistoken.api.shape_of(names["model"]))
    assert cost <= vistoken.flops(timm.create_model("deit_small_patch16_224")) / 1.2


def test_quick_start_of_llava(names: dict, capsys: pytest.CaptureFixture) -> None:
    run_page("docs/start/llava.md", names)
    out = capsys.readouterr().out
    prompt = names["inputs"]["input_ids"].shape[1]
    for ids in (names["ids"], names["answer"]):
        assert torch.equal(ids[:, :prompt], names["inputs"]["input_ids"])
        assert ids.shape[1] == prompt + 8
    ((before, after),) = names["short"].images
    assert after < before and f"{before}" in out and "hired" in out


def test_the_processor_of_these_tests_fits_its_model() -> None:
    """Its image tokens are those the plain model makes; else the page would show nothing."""
    llava = vlm_models.llava_next()
    inputs = tiny_processor(llava)(
        images=Image.new("RGB", (56, 40)), text="w1 <image> w2", return_tensors="pt"
    )
    found = int((inputs["input_ids"] == vlm_models.IMAGE).sum())
    assert found == vlm_models.packed_length(llava, (40, 56))
    assert llava(**inputs).logits.shape[1] == found + 2


def test_quick_start_of_learned_counts(names: dict, tmp_path: Path) -> None:
    start = vistoken.DiffRate(gflops=2.9).plan(vistoken.shape.ModelShape.plain(384, 12))
    start.save(tmp_path / "schedule.json")
    run_page("docs/start/rates.md", names)
    assert names["logits"].shape == (2, 1000)
    saved = json.loads((tmp_path / "schedule.json").read_text())
    assert saved["merged"][-1] == 197 - 12 * 13 == names["schedule"].kept[-1]


def test_page_of_neighborhood_attention(names: dict) -> None:
    names["q"] = names["k"] = names["v"] = torch.randn(1, 16, 15, 2, 8)
    names["x"] = torch.randn(1, 16, 15, 64)
    assert run_page("docs/neighborhood.md", names) == 4
    assert names["out"].shape == (1, 16, 15, 2, 8) and names["y"].shape == names["x"].shape
    assert [m.shape[-1] for m in names["maps"]] == [56, 28, 14, 7]


def test_page_of_routing(names: dict) -> None:
    names["q"] = names["k"] = names["v"] = torch.randn(1, 24, 24, 2, 8)
    names["qs"] = names["ks"] = names["vs"] = torch.randn(1, 256, 2, 8)
    names["blocks"] = torch.tensor([[[[0, 1], [2, 3]]]])
    names["counts"] = torch.tensor([[[1, 2]]])
    names["x"], names["images"] = torch.randn(1, 28, 28, 96), torch.randn(1, 3, 64, 64)
    names["model"] = timm.create_model("vit_tiny_patch16_224", img_size=224)
    assert run_page("docs/routing.md", names) == 4
    assert names["out"].shape == (1, 256, 2, 8) and names["y"].shape == names["x"].shape
    assert [m.shape[-1] for m in names["maps"]] == [16, 8, 4, 2]


def test_page_of_vision_language_models(names: dict) -> None:
    assert run_page("docs/vlm.md", names, skip="load_tiny_llava") >= 3
    assert names["ids"].shape[1] == names["inputs"]["input_ids"].shape[1] + 64


def test_home(names: dict) -> None:
    assert run_page("docs/index.md", names) == 1
    assert names["logits"].shape == (2, 1000)


METHOD_PAGES = sorted(path.stem for path in (ROOT / "docs/methods").glob("*.md"))


@pytest.mark.parametrize("page", [name for name in METHOD_PAGES if name != "index"])
def test_calls_on_method_pages(page: str, names: dict) -> None:
    for code in code_blocks(f"docs/methods/{page}.md"):
        model = timm.create_model("deit_tiny_patch16_224", depth=12, embed_dim=48, num_heads=3)
        llava = vlm_models.llava_next()
        run(code, {**names, "model": model, "llava": llava})
        used = llava if "llava" in code else model
        assert vistoken.info(used).method.partition(":")[0] in {*METHODS, *hosted_methods()}
        vistoken.unwrap(used)


def test_every_method_has_a_page_in_the_table_and_the_navigation() -> None:
    table = (ROOT / "docs/methods/index.md").read_text()
    navigation = (ROOT / "mkdocs.yml").read_text()
    for name in (*METHODS, *hosted_methods()):
        assert f"`{name}`" in table, name
    for page in ROOT.glob("docs/**/*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation, page
    for name in (*METHODS, *ATTENTIONS, *hosted_methods()):
        cls = {**METHODS, **ATTENTIONS, **hosted_methods()}[name]
        documented = (ROOT / "docs/api").glob("*.md")
        assert any(f".{cls.__name__}\n" in page.read_text() for page in documented), name


def test_public_names_are_in_the_reference() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    for name in vistoken.__all__:
        found = getattr(vistoken, name)
        if callable(found) and not (isinstance(found, type) and issubclass(found, Exception)):
            assert f".{name}\n" in pages, name


def test_table_of_image_methods_says_which_see_the_question() -> None:
    table = (ROOT / "docs/methods/index.md").read_text()
    for name, cls in hosted_methods().items():
        rows = [line for line in table.splitlines() if line.startswith("|")]
        (row,) = [line for line in rows if f"`{name}`" in line.split("|")[1]]
        assert row.endswith("| yes |" if issubclass(cls, LayerMethod) else "| no |"), row


@pytest.mark.parametrize(
    "page", ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
)
def test_shell_lines_name_commands_and_files_that_exist(page: str) -> None:
    for line in commands(page):
        words = line.partition("#")[0].split()
        if words[:1] == ["vistoken"]:
            assert words[1] in COMMANDS, line
        for word in words:
            own = word.startswith(("configs/", "benchmarks/", "tests/")) or word in (
                "train.py", "eval.py",
            )  # fmt: skip
            assert not own or (ROOT / word).exists(), line


def test_readme(names: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    make = open_clip.create_model_and_transforms
    monkeypatch.setattr(
        open_clip, "create_model_and_transforms", lambda name, pretrained=None: make(name)
    )
    names["open_clip"] = open_clip
    assert run_page("README.md", names) == len(code_blocks("README.md"))
    assert names["features"].shape == (2, 196, 768) and names["embedding"].shape == (1, 512)
    assert names["ids"].shape[1] == names["inputs"]["input_ids"].shape[1] + 64
    assert vistoken.info(names["llava"]).method == "hired:budget=0.2"
