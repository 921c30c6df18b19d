"""Fine-tuning: pictures in memory, starting weights, layer-wise rates, what a run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

import timm
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from safetensors.torch import load_file, save_file

from vistoken.errors import ConfigError, VistokenError
from vistoken.train.classifier import Classifier
from vistoken.train.memory import MemoryImages, jittered, normalised, random_crops, read_images
from vistoken.train.start import load_start

NAME = "vit_small_patch14_dinov2"
TINY = {"img_size": 28, "embed_dim": 24, "depth": 3, "num_heads": 2}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of wide photos whose middle square is red or green, the rest blue."""
    for split, count in (("train", 8), ("validation", 3), ("test", 2)):
        for place, name in enumerate(("a", "b")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = Image.new("RGB", (60, 20), (0, 0, 255))
                image.paste(((200, 40)[place], (40, 200)[place], 10 * index), (18, 0, 42, 20))
                image.save(folder / f"{index}.png")
    return tmp_path


def test_pictures_are_read_once_as_middle_squares(photos: Path) -> None:
    images, labels = read_images(str(photos), "validation", 14)
    assert images.shape == (6, 3, 14, 14) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (images[:3, 0] == 200).all() and (images[3:, 1] == 200).all()
    assert images[:, 2].amax((1, 2)).tolist() == [0, 10, 20, 0, 10, 20]
    data = MemoryImages(str(photos), val_splits=["validation", "test"], stored=14, num_workers=0)
    assert len(data.table("val")[0]) == 10
    assert data.table("val")[0] is data.table("val")[0]
    with pytest.raises(VistokenError, match="nowhere"):
        read_images("nowhere", "train", 8)


def test_crops_lie_inside_the_picture_and_mirror() -> None:
    side, size = 32, 24
    ramp = (torch.arange(side) + 0.5) / side
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    x = torch.stack([rows, columns, torch.full_like(rows, 0.5)]).repeat(64, 1, 1, 1)
    torch.manual_seed(0)
    for chance in (0.0, 1.0):
        out = random_crops(x, size, (0.2, 0.6), chance)[:, :, 4:-4, 4:-4]
        down, across = out[:, 0].diff(dim=1) * size, out[:, 1].diff(dim=2) * size
        across = -across if chance else across
        # A ramp stays nearly one under cubics: its slope is the height and width of the crop.
        for slope in (down, across):
            assert slope.flatten(1).std(1).max() < 8e-2
        height, width = down.mean((1, 2)), across.mean((1, 2))
        area, aspect = height * width, width / height
        assert 0.18 < area.min() < area.max() < 0.62
        assert 0.72 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.36
        assert out[:, 0].min() > 0 and out[:, 0].max() < 1
        assert out[:, 0].mean((1, 2)).std() > 0.03, "all crops lie in one place"


def test_jitter_keeps_the_range_and_changes_pictures() -> None:
    x = torch.rand(16, 3, 8, 8)
    out = jittered(x, 0.3)
    assert out.min() >= 0 and out.max() <= 1
    assert ((out - x).abs().mean((1, 2, 3)) > 1e-3).all()
    torch.testing.assert_close(jittered(x, 0.0), x)


def test_upscaled_pictures_are_normalised() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    same = normalised(images, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    want = (images[1, 2] / 255.0 - 0.3) / 0.4
    torch.testing.assert_close(same[1, 2], want)
    assert normalised(images, 28).shape == (2, 3, 28, 28)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"stored": 225}, "stored=225"),
        ({"scale": (0.5, 0.1)}, "scale"),
        ({"limit": 0}, "limit=0"),
        ({"batch_size": 7, "cutmix": 1.0}, "batch_size=7"),
    ],
)
def test_wrong_settings_are_named(photos: Path, given: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MemoryImages(str(photos), **given)


def fit(photos: Path, tmp: Path, steps: int = 2, **given: object) -> Classifier:
    seed_everything(0, verbose=False)
    options = {"ema_decay": 0.5, "lr": 1e-3, "weights": str(tmp / "out" / "w.safetensors")}
    model = Classifier(NAME, 2, TINY, **{**options, **given.pop("model", {})})
    data = MemoryImages(
        str(photos), num_classes=2, stored=14, image_size=28, batch_size=4, num_workers=0,
        val_splits=["validation"], **given,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=tmp,
    )  # fmt: skip
    trainer.fit(model, data)
    return model


def test_a_run_leaves_the_weights_that_validation_uses(photos: Path, tmp_path: Path) -> None:
    model = fit(photos, tmp_path, jitter=0.2, mixup=0.8, cutmix=1.0)
    assert torch.isfinite(model.trainer.callback_metrics["train/loss"])
    left = load_file(tmp_path / "out" / "w.safetensors")
    assert left.keys() == model.net.state_dict().keys()
    for name, value in model.ema.module.state_dict().items():
        assert torch.equal(left[name], value), name
    assert not torch.equal(left["head.weight"], model.net.state_dict()["head.weight"])
    again = timm.create_model(
        NAME, num_classes=2, checkpoint_path=str(tmp_path / "out" / "w.safetensors"), **TINY
    )
    assert torch.equal(again.head.weight, left["head.weight"])


def test_layers_below_the_head_learn_slower(photos: Path, tmp_path: Path) -> None:
    model = fit(photos, tmp_path, model={"layer_decay": 0.5, "lr": 1e-2, "warmup": 0.0})
    rate = {id(p): g["initial_lr"] for g in model.optimizers().param_groups for p in g["params"]}
    rates = {name: rate[id(p)] for name, p in model.net.named_parameters()}
    assert rates["head.weight"] == pytest.approx(1e-2)
    blocks = [rates[f"blocks.{block}.attn.qkv.weight"] for block in range(3)]
    assert blocks == pytest.approx([blocks[2] / 4, blocks[2] / 2, blocks[2]])
    assert rates["patch_embed.proj.weight"] == pytest.approx(blocks[0] / 2)
    now = {id(p): g["lr"] for g in model.optimizers().param_groups for p in g["params"]}
    assert now[id(model.net.head.weight)] > now[id(model.net.patch_embed.proj.weight)]


def test_start_takes_all_but_a_foreign_classifier(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    torch.manual_seed(1)
    source = timm.create_model(NAME, num_classes=5, **TINY)
    save_file({name: x.contiguous() for name, x in source.state_dict().items()}, path)
    same, other = (timm.create_model(NAME, num_classes=n, **TINY) for n in (5, 3))
    head = other.head.weight.clone()
    assert load_start(same, path) and torch.equal(same.head.weight, source.head.weight)
    assert not load_start(other, path) and torch.equal(other.head.weight, head)
    key = "blocks.1.mlp.fc1.weight"
    assert torch.equal(other.state_dict()[key], source.state_dict()[key])
    bare = {n: x.contiguous() for n, x in source.state_dict().items() if not n.startswith("head")}
    save_file(bare, path)
    assert not load_start(other, path)
    del bare[key]
    save_file(bare, path)
    with pytest.raises(VistokenError, match=r"blocks\.1\.mlp"):
        load_start(other, path)
    with pytest.raises(ConfigError, match="no such file"):
        load_start(other, tmp_path / "none.safetensors")
