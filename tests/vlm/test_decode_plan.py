"""Choosing a plan: the fastest that agrees with the model, torch's products where kernels fail."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from decode_models import make_llava

from vistoken.kernels.decode_linear import Tile, tiles
from vistoken.vlm import decode_plan
from vistoken.vlm.decode_layers import Plan, find_parts
from vistoken.vlm.decode_plan import choose_plan, describe, tune

START = Plan(*(Tile(4, 64, 1) for _ in range(4)), early=True)


@pytest.fixture(scope="module")
def parts():
    return find_parts(make_llava())


def clock_of(cost, seen):
    """A stopwatch whose times are made up."""

    class Clock:
        def __init__(self, parts, batch):
            pass

        def __call__(self, plan):
            seen.append(plan)
            return cost(plan)

    return Clock


def test_the_fastest_of_each_product_is_kept(parts, monkeypatch):
    seen = []
    best = {"gate": tiles(1, "gate")[2], "qkv": None, "back": START.back,
            "head": tiles(1, "head")[1]}  # fmt: skip

    def cost(plan):
        return sum(getattr(plan, name) != tile for name, tile in best.items()) + plan.early

    monkeypatch.setattr(decode_plan, "Stopwatch", clock_of(cost, seen))
    assert tune(parts, 1, START, 60) == Plan(**best, early=False)
    monkeypatch.setattr(decode_plan, "Stopwatch", clock_of(lambda plan: 1.0, seen))
    assert tune(parts, 1, START, 60) == START


def test_tuning_ends_when_its_time_is_over(parts, monkeypatch):
    seen = []
    monkeypatch.setattr(decode_plan, "Stopwatch", clock_of(lambda plan: -len(seen), seen))
    assert tune(parts, 1, START, -1.0) == START
    assert seen == [START]


def test_kernels_that_fail_leave_torch(parts, monkeypatch):
    monkeypatch.setattr(decode_plan, "first_plans", lambda *_: [START, Plan()])
    original = decode_plan.layer_error

    def error(parts, layer, plan, *rest):
        if plan.qkv is not None:
            raise RuntimeError("no such kernel\nmore")
        return original(parts, layer, plan, *rest)

    monkeypatch.setattr(decode_plan, "layer_error", error)
    plan, words = choose_plan(parts, 2)
    assert plan == Plan() and words == "fused chain; not RuntimeError: no such kernel"


def test_a_tuned_plan_that_is_wrong_is_not_taken(parts, monkeypatch):
    wrong = replace(START, qkv=None)
    monkeypatch.setattr(decode_plan, "first_plans", lambda *_: [START, Plan()])
    monkeypatch.setattr(decode_plan, "tune", lambda *_: wrong)
    monkeypatch.setattr(decode_plan, "layer_error", lambda p, layer, plan, *_: float(plan == wrong))
    assert choose_plan(parts, 2)[0] == START


def test_kernels_in_the_chain_agree_with_the_models_layer(parts):
    """In Triton's interpreter: the same chain that runs on a GPU, early launch aside."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    layer = parts.decoder.layers[0]
    for batch in (1, 2):
        plan = Plan(*(tiles(batch, name)[1] for name in decode_plan.PRODUCTS))
        assert decode_plan.layer_error(parts, layer, plan, batch) < 1e-5


def test_words_name_every_product():
    assert describe(Plan()) == ""
    plan = replace(START, gate=None)
    assert describe(plan) == " (qkv 4x64w1, back 4x64w1, gate torch, head 4x64w1, early)"


def test_large_batches_are_checked_inside_the_cache(parts):
    assert choose_plan(parts, 150) == (Plan(), "fused chain")


@pytest.mark.parametrize("wrong", ["output", "keys", "values"])
def test_a_prompt_that_differs_keeps_the_models_own_layers(parts, wrong, monkeypatch):
    right = decode_plan.prefill_layer

    def changed(layer, x, cos, sin, keys, values):
        out = right(layer, x, cos, sin, keys, values)
        {"output": out, "keys": keys, "values": values}[wrong][:, :, -5:] *= -1
        return out

    assert choose_plan(parts, 2)[0] is not None
    monkeypatch.setattr(decode_plan, "prefill_layer", changed)
    plan, words = choose_plan(parts, 2)
    assert plan is None and "differs from the model's own" in words
