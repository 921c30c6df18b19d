from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from vistoken.cli.train import main
from vistoken.errors import ConfigError
from vistoken.eval.tiny_llava import WEIGHTS_FILE, load_tiny_llava, make_tiny_llava, tiny_config
from vistoken.eval.vqa_scenes import cut_tiles
from vistoken.eval.vqa_words import BOS, EOS, ID, IMAGE, NAMES, PAD, USER, WORDS
from vistoken.train.vqa import VqaTraining, answers_right
from vistoken.train.vqa_data import EasyVqaData, FashionVqaData
from vistoken.train.vqa_forward import PackedTurns

CONFIGS = Path(__file__).parents[2] / "configs" / "vlm"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {**SMALL, "num_key_value_heads": 2}


def small_model():
    torch.manual_seed(0)
    model = make_tiny_llava(tiny_config(SMALL, TEXT)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or "newline" in str(parameter.shape):
                parameter.normal_(std=0.2)
    return model


def test_each_packed_turn_is_a_first_turn() -> None:
    data = FashionVqaData("embedded", turns=3)
    data.setup("fit")
    batch = data.make(torch.arange(2), "train")
    model = small_model()
    with torch.no_grad():
        packed = PackedTurns(model)(batch.tiles, batch.ids)
        for turn in range(3):
            head = torch.tensor([[ID[BOS], ID[USER], *[ID[IMAGE]] * 336]] * 2)
            ids = torch.cat([head, batch.ids[:, turn]], 1)
            plain = model(
                input_ids=ids, pixel_values=batch.tiles, attention_mask=torch.ones_like(ids),
                image_sizes=torch.full((2, 2), 224),
            ).logits[:, head.shape[1] :]  # fmt: skip
            assert torch.allclose(plain, packed.logits[:, turn], atol=1e-4)


def test_batches_are_new_scenes_in_every_epoch_and_hold_out_garments() -> None:
    data = FashionVqaData("embedded", turns=2, scenes=8)
    data.setup("fit")
    trainer = {"training": True, "current_epoch": 0, "world_size": 1, "global_rank": 0}
    data.trainer = type("T", (), trainer)
    first = data.on_after_batch_transfer(torch.arange(2), 0)
    data.trainer.current_epoch = 1
    second = data.on_after_batch_transfer(torch.arange(2), 0)
    assert not torch.equal(first.tiles, second.tiles)
    assert torch.equal(second.tiles, data.make(torch.arange(8, 10), "train").tiles)
    seen = {bytes(image.numpy()) for image in data.tables["train"].images}
    assert not seen & {bytes(image.numpy()) for image in data.tables["val"].images}
    assert first.shown is not None and first.patches is not None
    counts = (first.patches == 3).sum(-1)
    assert torch.equal(first.shown[..., 3] == 1, counts >= 2)
    assert first.shown.shape[-1] == len(NAMES)


def test_right_answers_need_word_and_end() -> None:
    ids = torch.tensor([[[9, 8, 6, 20, ID[EOS], ID[PAD]]]])
    labels = torch.tensor([[[-100, -100, -100, 20, ID[EOS], -100]]])
    logits = torch.nn.functional.one_hot(ids.roll(-1, -1), len(WORDS)).float()
    assert answers_right(logits, labels).all()
    for place in (2, 3):
        wrong = logits.clone()
        wrong[..., place, 21] = 5
        assert not answers_right(wrong, labels).any()
    wrong = logits.clone()
    wrong[..., 0, 21] = wrong[..., 4, 21] = 5
    assert answers_right(wrong, labels).all()


@pytest.fixture
def easy(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        folder = tmp_path / "easy" / split / "images"
        folder.mkdir(parents=True)
        rows = []
        for number in range(4):
            pixels = generator.integers(90, 160, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            rows += [["what shape is in the image?", "circle", number]]
            rows += [["what color is the circle?", "blue", number]] * (number > 0)
            rows += [["is there a red shape?", "no", number]]
        (folder.parent / "questions.json").write_text(json.dumps(rows))
    return tmp_path / "easy"


def test_easy_batches_ask_about_their_own_picture(easy: Path) -> None:
    data = EasyVqaData(str(easy), turns=4, held=1)
    data.setup("fit")
    assert data.pictures == 3
    batch = data.make(torch.arange(1), "val")
    whole = np.asarray(Image.open(easy / "train" / "images" / "3.png").resize((224, 224), 3))
    expected = cut_tiles(torch.from_numpy(whole.copy()).permute(2, 0, 1)[None] / 255)
    assert (batch.tiles[:, 1:] - expected[:, 1:]).abs().max() < 0.06
    assert batch.shown is not None
    assert batch.shown[0, 0].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert (batch.shown[0, 1:] == -1).all()
    for ids, labels in zip(batch.ids[0], batch.labels[0], strict=True):
        words = [WORDS[i] for i in ids if i != ID[PAD]]
        assert words[-1] == EOS and words[-3] == "assistant:"
        assert labels[labels >= 0].tolist() == [ID[words[-2]], ID[EOS]]
    # A picture that no question names by shape and colour teaches the tower nothing.
    data.held = 4
    data.pictures = 0
    assert (data.make(torch.arange(1), "val").shown == -1).all()


def command(config: str, folder: Path, *extra: str) -> list[str]:
    words = ["fit", "--config", str(CONFIGS / config), "--model.compile", "false"]
    words += ["--model.vision", json.dumps(SMALL), "--model.text", json.dumps(TEXT)]
    words += ["--data.batch_size", "2", "--trainer.default_root_dir", str(folder)]
    words += ["--trainer.accelerator", "cpu", "--trainer.precision", "32"]
    words += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    return [*words, "--trainer.enable_model_summary", "false", *extra]


@pytest.mark.parametrize("config", ["fashion_scenes_vqa.yaml", "easy_vqa.yaml"])
def test_recipes_learn_and_leave_weights(config: str, easy: Path, tmp_path: Path) -> None:
    fashion = config.startswith("fashion")
    extra = ["--data.root", "embedded" if fashion else str(easy), "--trainer.max_steps", "8"]
    extra += ["--trainer.limit_val_batches", "1", "--trainer.check_val_every_n_epoch", "1"]
    extra += ["--model.lr", "5e-3", "--model.optimizer", "adamw", "--data.turns", "2"]
    extra += ["--data.scenes", "16", "--data.val_scenes", "2"] if fashion else ["--data.held", "1"]
    cli = main(command(config, tmp_path, *extra))
    module = cli.model
    assert isinstance(module, VqaTraining)
    assert cli.trainer.callback_metrics["train/answer"] < np.log(len(WORDS)) - 0.5
    assert 0 <= cli.trainer.callback_metrics["val/accuracy"] <= 1
    with pytest.raises(ConfigError, match="sizes"):
        load_tiny_llava(tmp_path / WEIGHTS_FILE)
    from safetensors.torch import load_file

    state = load_file(tmp_path / WEIGHTS_FILE)
    assert module.ema is not None
    for name, value in module.ema.module.state_dict().items():
        assert torch.equal(state[name], value.half())
