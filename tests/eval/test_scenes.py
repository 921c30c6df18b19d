from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vistoken.eval.hashing import hash_integers, hash_uniform
from vistoken.eval.intervals import wilson_interval
from vistoken.eval.reference import ReferenceScenes
from vistoken.eval.scenes import load_fashion_mnist, plan_scenes, render_scenes

WORD = 1 << 64


@pytest.fixture(scope="module")
def table() -> tuple[Tensor, Tensor]:
    scenes = ReferenceScenes()
    return scenes.garments[:50], scenes.labels[:50]


def mix_in_python(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
    return x ^ (x >> 31)


def test_hash_equals_plain_python_integers() -> None:
    index = [0, 1, 77, 2**40, -5]
    got = hash_integers(9, torch.tensor(index), 3, 4)
    origin = 9 * 0xD1342543DE82EF95 + 3 * 0xAF251AF3B0F025B5
    for row, i in enumerate(index):
        key = mix_in_python((mix_in_python(i % WORD) + origin) % WORD)
        for k in range(4):
            step = (key + (k + 1) * 0x9E3779B97F4A7C15) % WORD
            assert got[row, k].item() == mix_in_python(step) >> 2


def test_uniform_draws_are_even_and_unrelated() -> None:
    a = hash_uniform(1, torch.arange(20000), 0, 2)
    b = hash_uniform(2, torch.arange(20000), 0, 2)
    assert a.min() >= 0 and a.max() < 1
    assert torch.histc(a[:, 0], 10, 0, 1).sub(2000).abs().max() < 200
    for other in (a[:, 1], b[:, 0], a[:, 0].roll(1)):
        assert torch.corrcoef(torch.stack([a[:, 0], other]))[0, 1].abs() < 0.03


def test_scene_does_not_depend_on_its_batch(table: tuple[Tensor, Tensor]) -> None:
    whole, labels = render_scenes(*table, torch.arange(6), seed=5)
    again, _ = render_scenes(*table, torch.arange(6), seed=5)
    turned, turned_labels = render_scenes(*table, torch.tensor([5, 2, 2]), seed=5)
    assert torch.equal(whole, again)
    assert torch.allclose(turned, whole[[5, 2, 2]], atol=1e-5)
    assert torch.equal(turned_labels, labels[[5, 2, 2]])


def test_seeds_epochs_and_augmentation_change_the_scene(table: tuple[Tensor, Tensor]) -> None:
    index = torch.arange(4)
    base, labels = render_scenes(*table, index, seed=5)
    others = [
        render_scenes(*table, index, seed=6),
        render_scenes(*table, index + len(table[0]), seed=5),
        render_scenes(*table, index, seed=5, augment=True),
    ]
    for images, same_labels in others:
        assert ((images - base).abs().amax(dim=(1, 2, 3)) > 0.1).all()
        assert torch.equal(same_labels, labels)


def test_labels_are_those_of_the_numbered_garment(table: tuple[Tensor, Tensor]) -> None:
    index = torch.tensor([3, 49, 50, 103])
    images, labels = render_scenes(*table, index, seed=1, size=64)
    assert torch.equal(labels, table[1][[3, 49, 0, 3]])
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1


def test_fragments_are_cut_and_never_of_the_same_garment() -> None:
    plan = plan_scenes(torch.arange(500), seed=1, num_garments=50)
    assert (plan.source[:, :-1] != plan.source[:, -1:]).all()
    width = (plan.window[..., 2:] - plan.window[..., :2])[:, :-1]
    assert width.amin(dim=-1).max() <= 16 and width.amin() >= 11
    drawn = plan.present[:, :-1].sum(dim=1)
    assert set(drawn.tolist()) == {3, 4, 5, 6} and plan.present[:, -1].all()


@pytest.mark.parametrize("augment", [False, True])
def test_garment_stays_inside_the_canvas(augment: bool) -> None:
    plan = plan_scenes(torch.arange(2000), seed=4, num_garments=50, augment=augment)
    extent, angle = plan.extent[:, -1], plan.angle[:, -1]
    half = extent / 2 * (angle.cos() + angle.sin().abs())
    assert extent.min() >= 96 and extent.max() <= 160
    assert (plan.centre[:, -1] - half[:, None]).min() >= -1e-3
    assert (plan.centre[:, -1] + half[:, None]).max() <= 224 + 1e-3
    assert plan.flip[:, -1].any().item() is augment


@pytest.mark.parametrize("augment", [False, True])
def test_garment_lands_where_the_plan_says(augment: bool) -> None:
    size, index = 96, torch.tensor([0, 1, 2])
    solid = torch.full((3, 28, 28), 255, dtype=torch.uint8)
    solid[:, :14, :14] = 128
    labels = torch.arange(3)
    images, _ = render_scenes(solid, labels, index, 7, size, augment)
    plan = plan_scenes(index, 7, 3, size, augment)
    for b in range(3):
        seen = 0
        cx, cy = plan.centre[b, -1].tolist()
        extent, angle = plan.extent[b, -1].item(), plan.angle[b, -1].item()
        for row in range(0, size, 3):
            for column in range(0, size, 3):
                dx, dy = column + 0.5 - cx, row + 0.5 - cy
                x = (math.cos(angle) * dx - math.sin(angle) * dy) / extent + 0.5
                y = (math.sin(angle) * dx + math.cos(angle) * dy) / extent + 0.5
                x = 1 - x if plan.flip[b, -1] else x
                inside = all(0.05 < v < 0.95 and abs(v - 0.5) > 0.05 for v in (x, y))
                if not inside:
                    continue
                value = 128 / 255 if x < 0.5 and y < 0.5 else 1.0
                shade = 0.12 + 0.88 * value ** plan.gamma[b, -1].item()
                expected = shade * plan.tint[b, -1]
                assert torch.allclose(images[b, :, row, column], expected, atol=1e-3)
                seen += 1
        assert seen > 100


def test_missing_files_name_both_sources(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset-fashion-mnist.*torchvision"):
        load_fashion_mnist(tmp_path, "test")
    with pytest.raises(ValueError, match="'train' or 'test'"):
        load_fashion_mnist(tmp_path, "valid")


def test_reads_plain_idx_files(tmp_path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = bytes(range(256)) * 7
    (folder / "t10k-images-idx3-ubyte").write_bytes(bytes(16) + pixels[: 2 * 784])
    (folder / "t10k-labels-idx1-ubyte").write_bytes(bytes(8) + bytes([4, 9]))
    images, labels = load_fashion_mnist(tmp_path, "test")
    assert images.flatten().tolist() == list(pixels[: 2 * 784]) and labels.tolist() == [4, 9]


def test_wilson_interval_matches_known_values() -> None:
    assert wilson_interval(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(3, 2)
