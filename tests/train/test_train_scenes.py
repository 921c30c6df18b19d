from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

import vistoken
from vistoken.cli.train import main
from vistoken.eval.reference import ReferenceScenes
from vistoken.eval.scenes import TRAIN_SEED, normalise, render_scenes
from vistoken.train.classifier import Classifier
from vistoken.train.export import balanced_garments, evaluation_weights
from vistoken.train.scenes_data import ScenesData
from vistoken.train.schedules import cosine_factor

CONFIG = Path(__file__).parents[2] / "configs" / "reference" / "deit_tiny_scenes.yaml"
TINY = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    scenes = ReferenceScenes()
    images, labels = scenes.garments[:48].numpy(), scenes.labels[:48].to(torch.uint8).numpy()
    for prefix in ("train", "t10k"):
        for name, head, data in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            target = tmp_path / f"{prefix}-{name}-ubyte.gz"
            target.write_bytes(gzip.compress(bytes(head) + data.tobytes()))
    return tmp_path


def fit(root: Path, *extra: str) -> object:
    command = ["fit", "--config", str(CONFIG), "--data.root", str(root), "--data.size", "32"]
    command += ["--data.val_garments", "16", "--data.batch_size", "8", "--data.compile", "false"]
    command += ["--model.compile", "false", "--model.model_args", str(TINY)]
    command += ["--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"]
    command += ["--trainer.logger", "false", "--trainer.precision", "32", *extra]
    command += ["--trainer.enable_progress_bar", "false"]
    return main(command)


def test_fit_changes_weights_and_leaves_a_checkpoint(root: Path) -> None:
    cli = fit(root, "--trainer.max_steps", "2")
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    checkpoint = torch.load(root / "last.ckpt", weights_only=True)
    shipped = evaluation_weights(checkpoint)
    assert shipped.keys() == cli.model.net.state_dict().keys()
    for name, value in cli.model.ema.module.state_dict().items():
        assert torch.equal(shipped[name], value.half())
    moved = checkpoint["state_dict"]["net.head.weight"]
    assert not torch.equal(moved, checkpoint["state_dict"]["ema.module.head.weight"])


def test_training_lowers_the_loss_on_few_scenes(root: Path) -> None:
    before = fit(root, "--trainer.max_steps", "4", "--model.lr", "1e-9")
    after = fit(root, "--trainer.max_steps", "60", "--model.lr", "5e-3")
    name = "train/loss"
    assert after.trainer.callback_metrics[name] < before.trainer.callback_metrics[name]


def test_training_batches_are_the_epochs_scenes(root: Path) -> None:
    data = ScenesData(str(root), size=32, val_garments=16)
    data.setup("fit")
    garments, labels = data.tables["train"]
    index = torch.tensor([4, 0])
    for epoch in (0, 3):
        data.trainer = type("T", (), {"testing": False, "training": True, "current_epoch": epoch})
        images, targets = data.on_after_batch_transfer(index, 0)
        expected, _ = render_scenes(
            garments, labels, index + 32 * epoch, TRAIN_SEED, 32, augment=True
        )
        assert torch.equal(images, normalise(expected))
        assert torch.equal(targets, labels[index])


def test_validation_garments_are_held_out(root: Path) -> None:
    data = ScenesData(str(root), val_garments=16)
    data.setup("fit")
    scenes = ReferenceScenes()
    assert torch.equal(data.tables["train"][0], scenes.garments[:32])
    assert torch.equal(data.tables["val"][0], scenes.garments[32:48])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_vectors_and_embeddings_do_not_decay(name: str) -> None:
    model = Classifier(model_args=TINY, optimizer=name)
    model._trainer = type("T", (), {"estimated_stepping_batches": 10, "callbacks": []})()
    groups = model.configure_optimizers()["optimizer"].param_groups
    free = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    names = {n for n, p in model.net.named_parameters() if id(p) in free}
    assert names >= {"pos_embed", "cls_token", "norm.weight", "blocks.0.attn.qkv.bias"}
    assert not names & {"blocks.0.attn.qkv.weight", "head.weight"}


def test_cosine_rises_then_falls_to_the_floor() -> None:
    assert cosine_factor(0.05, 0.1) == pytest.approx(0.5)
    assert cosine_factor(0.1, 0.1) == pytest.approx(1.0)
    assert cosine_factor(0.55, 0.1) == pytest.approx(0.505)
    assert cosine_factor(1.2, 0.1) == pytest.approx(0.01)


def test_balanced_garments_takes_the_first_of_each_class() -> None:
    images = torch.arange(6).view(6, 1, 1)
    chosen, classes = balanced_garments(images, torch.tensor([1, 0, 1, 1, 0, 0]), per_class=2)
    assert chosen.flatten().tolist() == [0, 1, 2, 4] and classes.tolist() == [1, 0, 1, 0]


def test_fine_tuning_under_a_method_trains_and_validates_reduced(root: Path) -> None:
    options = ["--trainer.max_steps", "2", "--model.method", "tome:r=1"]
    options += ["--model.layer_decay", "0.8", "--trainer.limit_val_batches", "1"]
    # In a single block the class token would never meet what was merged.
    options += ["--model.model_args", str(TINY | {"depth": 2})]
    model = fit(root, *options, "--trainer.check_val_every_n_epoch", "1").model
    for net in (model.net, model.ema.module):
        assert vistoken.info(net).method == "tome:r=1"
    images = torch.randn(2, 3, 32, 32)
    reduced = model(images)
    vistoken.unwrap(model.ema.module)
    assert not torch.equal(reduced, model(images))
