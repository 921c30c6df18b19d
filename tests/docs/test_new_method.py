"""The method of "Adding a method", as printed there, against the same model in plain loops."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from naive import Reducer, alone, attend, randomise
from naive_timm import timm_head, timm_trail
from pages import code_blocks, run

import vistoken
from vistoken.errors import ConfigError

PAGE = "docs/adding-a-method.md"
MODELS = {
    "no class token": ("vit_base_patch16_siglip_224", {"img_size": (80, 112)}, (80, 112)),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 70}, (70, 70)),
}


@pytest.fixture(scope="module")
def method() -> type[vistoken.Method]:
    names: dict = {"__name__": "page"}
    run(code_blocks(PAGE)[0], names)
    return names["TopReceived"]


class Loops(Reducer):
    """Mean attention that arrives at a token, by a loop over heads and queries."""

    rate, at = 0.6, (0, 2)

    def slots(self, block, depth, tokens, q, k, scale):
        if block not in self.at:
            return None
        weights, prefix = attend(q, k, scale), tokens.prefix
        count = math.ceil(self.rate * (q.shape[2] - prefix))
        out = []
        for image in weights:
            heads, queries, keys = image.shape
            arrives = [
                sum(float(image[h, i, j]) for h in range(heads) for i in range(queries))
                for j in range(keys)
            ]
            order = sorted(range(prefix, keys), key=lambda j: -arrives[j])
            out.append([alone(i, 1.0) for i in [*range(prefix), *sorted(order[:count])]])
        return out


@pytest.mark.parametrize("name", MODELS)
def test_the_printed_method_equals_plain_loops(name: str, method: type[vistoken.Method]) -> None:
    variant, settings, size = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(
        variant, embed_dim=32, depth=3, num_heads=4, num_classes=7, **settings
    )
    model = randomise(model).double().eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    trail = timm_trail(model, image, Loops())
    vistoken.wrap(model, method(keep_rate=0.6, at=(0, 2)))
    with torch.no_grad(), vistoken.trace(model) as trace:
        logits = model(image)
    assert trace.counts == trail.counts
    assert torch.equal(trace.source_map.parent, trail.steps[-1].parent)
    assert torch.allclose(logits, timm_head(model, trail.steps[-1]), atol=1e-10)


def test_the_printed_call_runs(method: type[vistoken.Method]) -> None:
    names = {"TopReceived": method}
    run(code_blocks(PAGE)[1], names)
    info = vistoken.info(names["model"])
    assert info.counts == (196,) * 3 + (98,) * 3 + (49,) * 3 + (25,) * 3
    vistoken.unwrap(names["model"])
    plan = method.at_gflops(vistoken.api.shape_of(names["model"]), 10.0)
    assert 9.9 < plan.cost(vistoken.api.shape_of(names["model"])) <= 10.0


def test_the_printed_check_names_the_setting(method: type[vistoken.Method]) -> None:
    with pytest.raises(ConfigError, match=r"keep_rate=1\.2.*must be in"):
        method(keep_rate=1.2)


def test_the_page_says_how_long_it_is() -> None:
    code = [line for line in code_blocks(PAGE)[0].splitlines() if line and "import" not in line]
    assert len(code) <= 32
