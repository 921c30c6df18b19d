"""The closed form against every published number, to the last printed digit."""

import json
from importlib import resources

import pytest
import timm

import vistoken
from vistoken.flops import agent_attention, count_macs
from vistoken.methods import DiffRate, EViT, ToMe
from vistoken.methods.diffrate import published
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape

TINY, SMALL, BASE = (ModelShape.plain(width, 12) for width in (192, 384, 768))
LARGE = ModelShape.plain(1024, 24)
HUGE = ModelShape.plain(1280, 32, (16, 16), patch=14)


@pytest.mark.parametrize(
    ("shape", "tokens", "gflops"),
    [
        (TINY, 197, "1.254"),
        (SMALL, 197, "4.599"),
        (BASE, 197, "17.564"),
        (LARGE, 197, "61.555"),
        (HUGE, 257, "167.296"),
    ],
)
def test_dense(shape, tokens, gflops):
    assert shape.tokens == tokens
    assert f"{count_macs(shape) / 1e9:.3f}" == gflops


@pytest.mark.parametrize(
    ("shape", "method", "last", "gflops"),
    [
        (SMALL, ToMe(r=8), 101, "3.42"),
        (SMALL, ToMe(r=13), 41, "2.70"),
        (SMALL, ToMe(r=16), 11, "2.29"),
        (BASE, ToMe(r=8), 101, "13.10"),
        (BASE, ToMe(r=16), 11, "8.77"),
        (BASE, ToMe(r=20), 4, "7.13"),
        (LARGE, ToMe(r=8), 7, "30.96"),
        (LARGE, ToMe(r=8, schedule="decreasing"), 16, "22.33"),
        (HUGE, ToMe(r=7), 33, "92.84"),
        (HUGE, ToMe(r=7, schedule="decreasing"), 48, "72.55"),
        (SMALL, EViT(keep_rate=0.9), 148, "4.02"),
        (SMALL, EViT(keep_rate=0.8), 105, "3.48"),
        (SMALL, EViT(keep_rate=0.7), 72, "3.03"),
        (SMALL, EViT(keep_rate=0.6), 46, "2.64"),
        (SMALL, EViT(keep_rate=0.5), 28, "2.31"),
    ],
)
def test_reduced(shape, method, last, gflops):
    assert method.plan(shape).kept[-1] == last
    assert f"{method.cost(shape):.2f}" == gflops


@pytest.mark.parametrize(
    ("shape", "agents", "gflops"), [(TINY, 49, "1.17"), (SMALL, 49, "4.43"), (BASE, 81, "17.45")]
)
def test_agent_attention(shape, agents, gflops):
    macs = count_macs(shape, attention=agent_attention(agents))
    assert f"{macs / 1e9:.2f}" == gflops


def _lists():
    for model, entry in published().items():
        if "width" in entry:
            for label, lists in entry["lists"].items():
                yield pytest.param(model, entry, label, lists, id=f"{model}-{label}")


def test_there_are_31_lists():
    assert sum(len(entry["lists"]) for entry in published().values()) == 31
    assert len(list(_lists())) == 28


MISLABELLED = {
    ("vit_tiny_deit", "0.6"): 0.092,
    ("vit_tiny_deit", "0.7"): 0.039,
    ("vit_tiny_deit", "0.8"): 0.011,
    ("vit_small_deit", "2.3"): 0.011,
    ("vit_huge_mae", "93.2"): -0.012,
}


@pytest.mark.parametrize(("model", "entry", "label", "lists"), list(_lists()))
def test_published_list(model, entry, label, lists):
    shape = ModelShape.plain(
        entry["width"],
        entry["depth"],
        tuple(entry["grid"]),
        patch=entry["patch"],
        pool=entry["pool"],
    )
    method = DiffRate(gflops=float(label), model=model)
    schedule = method.plan(shape)
    cost = method.cost(shape)
    assert f"{cost:.3f}" == f"{lists['computed']:.3f}"
    assert list(schedule.removed) == lists["removed"]
    assert DiffRate(gflops=float(label)).plan(shape) == schedule, "found by the model's shape alone"
    error = cost / float(label) - 1
    assert error == pytest.approx(MISLABELLED.get((model, label), 0.0), abs=0.005)


def test_running_minimum():
    lists = published()["vit_huge_mae"]["lists"]["83.7"]
    assert any(a < b for a, b in zip(lists["pruned"], lists["pruned"][1:], strict=False))
    schedule = Schedule.from_lists(257, 1, lists["pruned"], lists["merged"])
    lowest, expected = 257, []
    for pruned, merged in zip(lists["pruned"], lists["merged"], strict=True):
        lowest = min(lowest, pruned, merged)
        expected.append(lowest)
    assert schedule.kept == tuple(expected)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_small_patch16_224"])
def test_flops_of_a_real_model(name):
    model = timm.create_model(name)
    shape = TINY if "tiny" in name else SMALL
    assert vistoken.flops(model) == count_macs(shape) / 1e9
    assert vistoken.flops(model, "tome:r=13") == ToMe(r=13).cost(shape)
    large = shape.at((24, 24))
    assert vistoken.flops(model, image_size=384) == count_macs(large) / 1e9
    vistoken.wrap(model, "tome:r=8")
    assert vistoken.flops(model) == ToMe(r=8).cost(shape) == vistoken.info(model).gflops


def test_gated_mlp_counts_its_own_weights():
    model = timm.create_model("eva02_tiny_patch14_224")
    macs = 0
    for block in model.blocks:
        linears = [p for p in block.parameters() if p.dim() == 2]
        macs += 257 * sum(p.numel() for p in linears) + 2 * 257 * 257 * 192
    macs += 257 * 192 * 3 * 14 * 14
    assert vistoken.flops(model) == pytest.approx(macs / 1e9, rel=1e-12)


def test_table_ships_with_the_package():
    text = resources.files("vistoken.configs").joinpath("schedules/diffrate.json").read_text()
    assert json.loads(text) == published()
