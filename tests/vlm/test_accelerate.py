"""`vistoken.accelerate` against the model's own `generate`, on tiny models with random weights."""

import pytest
import torch

pytest.importorskip("transformers")

from decode_models import batch_of, make_llava, make_llava_next, make_onevision

import vistoken

MAKERS = {"llava": make_llava, "llava_next": make_llava_next, "onevision": make_onevision}


def plain(model, inputs, count, **settings):
    return model.generate(**inputs, max_new_tokens=count, do_sample=False, **settings)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("rows", [[5], [3, 9], [7, 7, 1]], ids=str)
def test_greedy_ids_are_those_of_generate(name, rows):
    model = MAKERS[name]()
    inputs = batch_of(model, rows)
    fast = vistoken.accelerate(model, max_new_tokens=19)
    wanted = plain(model, inputs, 19)
    assert wanted[:, -19:].unique().numel() > 5
    assert torch.equal(fast.generate(**inputs), wanted)
    assert fast.execution == "fused chain"
