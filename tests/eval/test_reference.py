from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from vistoken.eval.reference import ReferenceScenes, load_reference_model

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "reference-h100.json"


def test_scenes_are_balanced_and_stable() -> None:
    scenes = ReferenceScenes()
    assert len(scenes) == 1000
    assert torch.bincount(scenes.labels).tolist() == [100] * 10
    image, label = scenes[17]
    batch, labels = scenes.batch(torch.tensor([3, 17]))
    assert torch.allclose(image, batch[1], atol=1e-4)
    assert label == labels[1] == scenes.labels[17]
    assert batch.mean().abs() < 0.5 and 0.5 < batch.std() < 1.5
    with pytest.raises(IndexError, match="there are 1000"):
        scenes[1000]


def test_model_names_held_out_scenes() -> None:
    model, scenes = load_reference_model(), ReferenceScenes()
    hits = 0
    for index in torch.arange(200).split(50):
        images, labels = scenes.batch(index)
        with torch.inference_mode():
            hits += int((model(images).argmax(1) == labels).sum())
    assert hits >= 0.88 * 200
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_card_quotes_the_record() -> None:
    record = json.loads(RECORD.read_text())
    card = (files("vistoken.assets") / "MODEL_CARD.md").read_text()
    for part in ("test", "embedded"):
        score = record[part]
        low, high = score["interval95"]
        row = f"{score['n']:,} | {score['top1']:.2%} | {low * 100:.2f} - {high:.2%} |"
        assert row.replace("%", " %") in card
    assert f"{record['steps']:,} steps" in card and f"{record['images_seen']:,} scenes" in card
    assert f"seed {record['seed']}" in card and record["device"] in card
