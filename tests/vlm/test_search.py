"""G-Search against what it must find, on metrics whose optimum is known."""

import json

import pytest
import torch
from PIL import Image

import vistoken
from tests.support import vlm_models as m
from tests.support.vlm_prompts import inputs_of, run
from vistoken.cli.main import main
from vistoken.cli.search_vlm import Agreement, read_prompts
from vistoken.errors import ConfigError
from vistoken.vlm.search import save_rates, search_rates


def rates_of(model):
    attachment = model.__dict__.get("_vistoken")
    return [1.0] * 4 if attachment is None else list(attachment.method.rates)


def test_a_constant_metric_gives_the_least_everywhere():
    assert search_rates(m.llava(4), lambda model: 1.0, steps=8) == (1.0, 0.125, 0.125, 0.125)


def test_any_drop_failing_gives_ones():
    found = search_rates(m.llava(4), lambda model: float(min(rates_of(model)) == 1), steps=8)
    assert found == (1.0, 1.0, 1.0, 1.0)


def test_finds_the_known_floor_of_every_layer():
    floors = [1.0, 0.75, 0.75, 0.25]
    calls = []

    def quality(model):
        calls.append(rates_of(model))
        return float(all(r >= f for r, f in zip(rates_of(model), floors, strict=True)))

    model = m.llava(4)
    assert search_rates(model, quality, steps=16, tolerance=0.0) == tuple(floors)
    assert len(calls) <= 1 + 3 * 4
    assert "_vistoken" not in model.__dict__


@torch.no_grad()
def test_agreement_and_the_written_file(tmp_path):
    model = m.llava_next(4)
    inputs = [inputs_of(model, [[(40, 56)]], seed=seed) for seed in range(2)]
    agreement = Agreement(inputs, 3)
    assert agreement(model) == 1.0
    plain = run(model, inputs[0], max_new_tokens=3)
    short = vistoken.wrap(model, "layer_rates:rates=[1,0.05,0.05,0.05]")
    expected = torch.equal(run(short, inputs[0], max_new_tokens=3), plain)
    assert agreement(model) < 1.0 or expected
    vistoken.unwrap(model)
    path = tmp_path / "rates.json"
    save_rates(path, (1.0, 0.5, 0.5, 0.25), "note")
    assert json.loads(path.read_text())["mean"] == 0.5625
    method = vistoken.parse(f"layer_rates:file={path}")
    assert method.stages(4) == {1: 0.5, 3: 0.25}


def test_bad_prompts_are_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(ConfigError, match="no such file"):
        read_prompts(path)
    path.write_text('{"image": "a.png"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        read_prompts(path)
    path.write_text('\n{"image": "a.png", "prompt": "what?"}\n')
    with pytest.raises(ConfigError, match=r"line 2: cannot read image 'a\.png'"):
        read_prompts(path)
    with pytest.raises(ConfigError, match="tolerance"):
        search_rates(m.llava(4), lambda model: 1.0, tolerance=-1)


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"image": "a.png", "prompt": "what?"}\n\n')
    for command in (["search-vlm", "--prompts", str(path), "--model"], ["bench-vlm"]):
        assert main([*command, "no/such/folder"]) == 2
        assert "model no/such/folder: transformers cannot load it" in capsys.readouterr().err
