from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vistoken.api import unwrap, wrap
from vistoken.cli.eval import main, parse_options
from vistoken.errors import ConfigError, ScheduleError
from vistoken.eval.options import EvalOptions
from vistoken.eval.report import make_console
from vistoken.eval.tiny_llava import (
    load_tiny_llava,
    make_processor,
    make_tiny_llava,
    save_tiny_llava,
    tiny_config,
)
from vistoken.eval.vqa import answer_all, best_constant, make_rows, read, run_vqa, same
from vistoken.eval.vqa_cases import VqaCase, at_budget, kept_share, mean_share, plan_vqa_cases
from vistoken.eval.vqa_sources import FashionQuestions, FileQuestions, Item, open_questions
from vistoken.vlm import METHODS, FastV, HiRED, MustDrop, PyramidDrop, RandomTokens

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CONFIGS = Path(__file__).parents[2] / "configs" / "vlm"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TEXT = {**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 4}


def small():
    torch.manual_seed(0)
    model = make_tiny_llava(tiny_config(SMALL, TEXT)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_llava(small(), tmp_path_factory.mktemp("tiny"))


def questions(path: Path, answers: list[str]) -> Path:
    lines = []
    for number, answer in enumerate(answers):
        Image.new("RGB", (224, 200), (40 * number, 90, 200)).save(path / f"{number}.png")
        entry = {"image": f"{number}.png", "question": "how many bags are there?", "kind": "count"}
        lines.append(json.dumps({**entry, "answer": answer}))
    file = path / "questions.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_folder_and_weights_file_give_the_same_model(folder: Path, tmp_path: Path) -> None:
    model = make_tiny_llava()
    state = {name: value.half() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    loaded = load_tiny_llava(tmp_path / "weights.safetensors")
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())
    assert sum(p.numel() for p in loaded.parameters()) < 8e6
    again = load_tiny_llava(folder)
    for name, value in small().state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    with pytest.raises(ConfigError, match="no such file"):
        load_tiny_llava(tmp_path / "other.safetensors")
    save_file(small().state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(ConfigError, match=r"small\.safetensors: not of the shipped model's sizes"):
        load_tiny_llava(tmp_path / "small.safetensors")


def test_processor_survives_saving_and_generation_decodes_to_words(folder: Path) -> None:
    from transformers import AutoProcessor

    processor, image = AutoProcessor.from_pretrained(folder), Image.new("RGB", (224, 224))
    prompts = ["USER: <image>\nHow many bags are there? ASSISTANT:", "<image> what is at the top?"]
    texts = {"text": prompts, "images": [image] * 2, "padding": True, "return_tensors": "pt"}
    inputs, fresh = processor(**texts), make_processor()(**texts)
    for name, value in fresh.items():
        assert torch.equal(inputs[name], value)
    assert (inputs["attention_mask"][1, :2] == 0).all()
    ids = load_tiny_llava(folder).generate(**inputs, max_new_tokens=2, do_sample=False)
    text = processor.batch_decode(ids[:, :], skip_special_tokens=True)[0]
    assert text.startswith("user: how many bags are there ? assistant:")


def test_rows_hold_what_was_answered(folder: Path, tmp_path: Path) -> None:
    model, processor = load_tiny_llava(folder), make_processor()
    found = []
    for number in range(3):
        image = Image.new("RGB", (224, 200), (40 * number, 90, 200))
        inputs = processor(
            images=image, text="USER: <image> how many bags are there? ASSISTANT:",
            return_tensors="pt",
        )  # fmt: skip
        ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        found.append(processor.decode(ids[0, -1:]))
    file = questions(tmp_path, [found[0].upper(), "seven", found[2]])
    options = EvalOptions(
        model=f"vlm:{folder}", data=str(file), method=["hired", "fastv:budget=0.5,layer=1"],
        budgets=[0.2, 0.5], batch_size=2, max_new_tokens=1, out=str(tmp_path / "out"),
    )  # fmt: skip
    record = run_vqa(options, "eval.py")
    rows = record["rows"]
    assert [row["method"].split(",")[0] for row in rows] == [
        "dense", "hired:budget=0.2", "hired:budget=0.5", "fastv:budget=0.5"
    ]  # fmt: skip
    assert rows[0]["accuracy"] == 2 / 3 and rows[0]["n"] == 3 and rows[0]["agreement"] == 1
    assert rows[0]["kinds"] == {"count": 2 / 3} and record["constant"] >= 1 / 3
    assert rows[0]["low"] < 2 / 3 < rows[0]["high"]
    assert rows[1]["tokens"] < rows[2]["tokens"] < rows[2]["image_tokens"]
    assert rows[3]["share"] == (1 + 3 * 0.5) / 4
    assert rows[3]["kept"] == pytest.approx((1 + 3 * 0.5) / 4, abs=1 / rows[1]["image_tokens"])
    assert rows[0]["kept"] == 1
    for row in rows[1:3]:
        assert row["kept"] == row["tokens"] / row["image_tokens"]
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["rows"][1] == rows[1]
    assert "| hired |" in (tmp_path / "out" / "eval.md").read_text()
    assert (tmp_path / "out" / "eval.png").stat().st_size > 5000


def test_command_line_with_the_recipe(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["--config", str(CONFIGS / "fashion_scenes.yaml"), "--model", f"vlm:{folder}"]
    words += ["--method", "random_tokens", "--method", "max_min", "--limit", "4", "--out"]
    assert main([*words, str(tmp_path), "--budgets", "0.3", "--precision", "32-true"]) == 0
    record = json.loads((tmp_path / "eval.json").read_text())
    assert [row["n"] for row in record["rows"]] == [4, 4, 4]
    assert main([*words, str(tmp_path), "--precision", "bf16-mixed"]) == 2
    assert "use 32-true" in capsys.readouterr().err
    assert parse_options(["--config", str(CONFIGS / "easy_vqa_eval.yaml")]).limit == 2000


def test_budgets_are_mean_shares_over_the_layers() -> None:
    for name, cls in METHODS.items():
        if name in ("fastv", "pyramiddrop", "psigmoid"):
            method = at_budget(cls, 0.5, 6)
            stages, seen, now = method.stages(6), [], 1.0
            for layer in range(6):
                now = stages.get(layer, now)
                seen.append(now)
            assert sum(seen) / 6 == pytest.approx(0.5, abs=2e-3)
            with pytest.raises(ScheduleError, match="out of reach"):
                at_budget(cls, 0.1, 6)
    assert at_budget(HiRED, 0.1, 6) == HiRED(budget=0.1)
    assert mean_share(at_budget(FastV, 0.2, 6), 6) == pytest.approx(0.2, abs=1e-5)
    assert mean_share(PyramidDrop(budgets=(0.5, 0.25, 0.125)), 4) == 1.875 / 4


def test_must_drop_counts_what_merging_took(folder: Path) -> None:
    model, processor = load_tiny_llava(folder), make_processor()
    inputs = processor(
        images=Image.new("RGB", (224, 224)), text="<image> what is at the top?", return_tensors="pt"
    )
    for budget in (0.3, 0.6):
        method = MustDrop(budget=budget, after=(0, 1))
        assert mean_share(method, 4) == budget
        wrap(model, method)
        # Windows are whole and counts are rounded down: the budget is met to a few tokens.
        assert kept_share(model, dict(inputs)) == pytest.approx(budget, abs=0.02)
        unwrap(model)
    # Without the merging the stages alone would make it more.
    assert mean_share(FastV(budget=0.3), 4) > 0.5
    assert kept_share(model, dict(inputs)) == 1


def test_every_method_is_planned_and_what_cannot_work_is_noted() -> None:
    model = small()
    before = dict(model.__dict__)
    cases, notes = plan_vqa_cases(model, [], [0.1, 0.6])
    names = {case.label.partition(":")[0] for case in cases}
    assert names == {"dense", *METHODS} - {"layer_rates"}
    assert any("fastv at 0.1 was left out" in note for note in notes)
    assert model.__dict__.keys() == before.keys()


def test_sources_are_balanced_and_refuse_what_is_wrong(tmp_path: Path) -> None:
    source = FashionQuestions(count=40)
    items = source.items(range(40))
    again = source.items([9])[0]
    assert (again.question, again.answer) == (items[9].question, items[9].answer)
    assert {item.kind for item in items} >= {"what", "count", "where", "exist", "total"}
    assert items[0].image.size == (224, 224)
    with pytest.raises(ConfigError, match="no such file"):
        open_questions(str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png", "question": "what?"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        FileQuestions(tmp_path / "bad.jsonl")
    with pytest.raises(ConfigError, match="easy-vqa"):
        open_questions(f"easy_vqa:{tmp_path}")


def test_matches_and_constant_answers() -> None:
    assert same(" Two ", "two") and not same("two.", "two")
    kinds = [("a", "x"), ("a", "x"), ("a", "y"), ("b", "z")]
    assert best_constant([Item(None, "", answer, kind) for kind, answer in kinds]) == 0.75


@pytest.fixture(scope="module")
def trained():
    return load_tiny_llava(), make_processor()


def test_packaged_weights_answer_as_the_card_says(trained) -> None:
    model, processor = trained
    source = FashionQuestions(count=40)
    options = EvalOptions(model="vlm:tiny", limit=40)
    cases = [VqaCase(None), VqaCase(FastV(budget=0.1, layer=1)), VqaCase(RandomTokens(budget=0.1))]
    found = answer_all(model, processor, source, cases, options, make_console())
    dense, looked, drawn = (row["accuracy"] for row in make_rows(cases, *found, options))
    assert dense >= 0.85
    assert dense > looked > drawn + 0.1


def test_a_budget_of_one_answers_as_the_dense_model(trained) -> None:
    model, processor = trained
    inputs = read(model, processor, FashionQuestions(count=8).items(range(8)))
    dense = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    wrap(model, "hired:budget=1.0")
    assert torch.equal(model.generate(**inputs, max_new_tokens=2, do_sample=False), dense)
    unwrap(model)


def test_card_quotes_the_records() -> None:
    card = (files("vistoken.assets") / "LLAVA_MODEL_CARD.md").read_text()
    for name in ("scenes", "easy"):
        record = json.loads((RESULTS / f"vlm-tiny-{name}-h100.json").read_text())
        row = record["rows"][0]
        assert row["method"] == "dense"
        cells = f"{row['n']:,} | {row['accuracy']:.2%} | {row['low'] * 100:.2f} - {row['high']:.2%}"
        assert f"{cells} | {record['constant']:.1%} |".replace("%", " %") in card
        if name == "scenes":
            training = record["training"]
            kinds = [f"{kind} {share * 100:.1f}" for kind, share in row["kinds"].items()]
            assert ", ".join(kinds) in card and record["device"] in card
            assert training["command"] in card
            assert f"{training['steps']:,} steps of 192 scenes" in card
            assert f"{training['pictures']:,} scenes" in card
