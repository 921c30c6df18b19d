"""What learning reads: WebDataset shards, Hugging Face data sets, published checkpoints."""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

pytest.importorskip("lightning")

from vistoken.errors import ConfigError, VistokenError
from vistoken.train.backbone import make_backbone
from vistoken.train.images import ImagesData

CONFIGS = Path(__file__).parents[2] / "configs" / "rates"
COLOURS = 12


def picture(number: int) -> Image.Image:
    """A plain colour that tells which picture it is."""
    return Image.new("RGB", (40, 40), (20 * number, 255 - 20 * number, 7))


def numbers(batches) -> list[int]:
    """Which pictures are in batches normalised by mean 0 and deviation 1."""
    reds = torch.cat([images[:, 0, 5, 5] for images, _ in batches])
    return (reds * 255 / 20).round().int().tolist()


def options(**more):
    plain = {"image_size": 32, "mean": (0, 0, 0), "std": (1, 1, 1), "hflip": 0.0, "batch_size": 3}
    return {**plain, "num_workers": 0, "num_classes": 2, **more}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four pictures in WebDataset's layout."""
    for shard in range(3):
        with tarfile.open(tmp_path / f"part-{shard:04d}.tar", "w") as tar:
            for number in range(4 * shard, 4 * shard + 4):
                data = io.BytesIO()
                picture(number).save(data, "JPEG", quality=95)
                for suffix, content in (("jpg", data.getvalue()), ("cls", b"%d" % (number % 2))):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path


def test_webdataset_shards_are_read_whole_in_both_parts(shards: Path) -> None:
    pytest.importorskip("webdataset")
    split = "part-{0000..0002}.tar|12"
    data = ImagesData(str(shards), "wds/garments", train_split=split, val_split=split, **options())
    loader = data.train_dataloader()
    assert len(loader) == 4, "learning rates need the length of an epoch"
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [3] * 4
    assert numbers(batches) != sorted(numbers(batches)), "not shuffled"
    val = list(data.val_dataloader())
    assert numbers(val) == list(range(COLOURS))
    assert torch.cat([labels for _, labels in val]).tolist() == [n % 2 for n in range(COLOURS)]


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A folder that Hugging Face's data sets read as pictures with classes."""
    for number in range(COLOURS):
        for part in ("train", "validation"):
            folder = tmp_path / "set" / part / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            picture(number).save(folder / f"{number:02d}.png")
    return tmp_path


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_hugging_face_folders_are_read_stored_and_streamed(
    hub_folder: Path, kind: str, monkeypatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = f"{kind}/{hub_folder / 'set'}"
    known = {} if kind == "hfds" else {"num_samples": COLOURS, "val_num_samples": COLOURS}
    data = ImagesData(str(hub_folder / "cache"), name, **options(**known))
    loader = data.train_dataloader()
    assert len(loader) == 4
    assert sorted(numbers(loader)) == list(range(COLOURS))
    val = list(data.val_dataloader())
    assert sorted(numbers(val)) == list(range(COLOURS))
    labels = torch.cat([labels for _, labels in val]).tolist()
    assert labels == [n % 2 for n in numbers(val)]


def test_a_stream_of_unknown_length_asks_for_it(hub_folder: Path) -> None:
    pytest.importorskip("datasets")
    data = ImagesData(str(hub_folder / "cache"), f"hfids/{hub_folder / 'set'}", **options())
    with pytest.raises(VistokenError, match="num_samples"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match="num_samples"):
        ImagesData(str(hub_folder), **options(num_samples=0))


# Published checkpoints ----------------------------------------------------------------------------

TINY = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}


def published_mae(path: Path, patch: int, width: int = 32, classes: int = 1000) -> dict:
    """A file as MAE's fine-tuning writes it, with random weights."""
    tokens = (TINY["img_size"] // patch) ** 2 + 1
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
    }  # fmt: skip
    for block in range(TINY["depth"]):
        for name, shape in {
            "norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
            "norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width),
        }.items():  # fmt: skip
            shapes[f"blocks.{block}.{name}.weight"] = shape
            shapes[f"blocks.{block}.{name}.bias"] = shape[:1]
    shapes |= {"fc_norm.weight": (width,), "fc_norm.bias": (width,)}
    shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    args = argparse.Namespace(model="vit", global_pool=True)
    torch.save({"model": weights, "optimizer": {}, "epoch": 99, "scaler": {}, "args": args}, path)
    return weights


def mae_logits(w: dict, images: torch.Tensor, patch: int, heads: int = 2) -> torch.Tensor:
    """MAE's classifier from its weights: the mean of the patches, normed, through the head."""
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for block in range(TINY["depth"]):
        at = f"blocks.{block}"
        q, k, v = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").chunk(3, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{at}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"))
        x = x + linear(hidden, f"{at}.mlp.fc2")
    return linear(norm(x[:, 1:].mean(1), "fc_norm"), "head")


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_mae_configurations_load_published_files(tmp_path: Path, size: str) -> None:
    given = yaml.safe_load((CONFIGS / f"diffrate_mae_{size}.yaml").read_text())["model"]
    given = given["init_args"]
    patch = 14 if size == "h" else 16
    path = tmp_path / "mae.pth"
    weights = published_mae(path, patch)
    model = make_backbone(
        given["model_name"],
        checkpoint=str(path),
        num_classes=given["num_classes"],
        **{**given["model_args"], **TINY},
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = model(images)
    wanted = mae_logits(weights, images[..., : 32 // patch * patch, : 32 // patch * patch], patch)
    assert (got - wanted).abs().max() < 1e-5
    assert model.head.out_features == 1000


def test_a_checkpoint_with_other_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mae.pth"
    weights = published_mae(path, 16)
    weights["norm.weight"] = weights.pop("fc_norm.weight")
    torch.save({"model": weights}, path)
    with pytest.raises(VistokenError, match="fc_norm"):
        make_backbone(
            "vit_base_patch16_224", checkpoint=str(path), num_classes=1000, global_pool="avg",
            **TINY,
        )  # fmt: skip
