"""Every transformer name of timm's registry is carried exactly, or refused in words."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from naive import fingerprint
from timm.models._registry import _model_to_module
from torch import nn

import vistoken
from vistoken.api import shape_of

# timm module: fewest names that must be carried and refused; the supported releases have as many.
EXPECTED = {
    "vision_transformer": (148, 9),
    "deit": (16, 0),
    "eva": (60, 0),
    "vision_transformer_hybrid": (14, 0),
    "vitamin": (13, 0),
    "beit": (0, 7),
    "naflexvit": (0, 8),
    "vision_transformer_relpos": (0, 13),
    "vision_transformer_sam": (0, 4),
    "cait": (0, 10),
    "xcit": (0, 28),
    "hiera": (0, 8),
    "hieradet_sam2": (0, 5),
    "swin_transformer": (0, 9),
    "swin_transformer_v2": (0, 12),
    "swin_transformer_v2_cr": (0, 16),
    "tnt": (0, 3),
    "convit": (0, 3),
    "levit": (0, 20),
    "pit": (0, 8),
    "crossvit": (0, 11),
    "volo": (0, 11),
    "twins": (0, 6),
    "deepseek_vit": (0, 3),
    "gemma4_vit": (0, 4),
    "qwen3_vit": (0, 9),
    "visformer": (0, 2),
    "mvitv2": (0, 8),
    "davit": (0, 8),
    "nest": (0, 6),
    "coat": (0, 8),
    "pvt_v2": (0, 7),
}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}


def names_of(module: str) -> list[str]:
    return sorted(name for name in timm.list_models() if _model_to_module[name] == module)


def build(name: str) -> tuple[nn.Module, torch.Tensor | None]:
    """A tiny model and an image; or, where the factory takes no sizes, one without storage."""
    patch = int((re.search(r"patch(\d+)", name) or [0, 16])[1])
    fixed_width = {"depth": 2, "num_classes": 3}
    for settings in (TINY, {**TINY, "num_kv_heads": 2}, fixed_width):
        try:
            model = timm.create_model(name, img_size=4 * patch, **settings)
        except (TypeError, AssertionError, ValueError, AttributeError, RuntimeError):
            continue
        return model.eval(), torch.randn(1, 3, 4 * patch, 4 * patch)
    with torch.device("meta"):
        return timm.create_model(name).eval(), None


def check_carried(name: str, model: nn.Module, image: torch.Tensor) -> None:
    """`model` is wrapped with zero reduction; compares it with itself unwrapped, then reduces."""
    with torch.no_grad():
        idle = model(image)
        vistoken.unwrap(model)
        assert torch.equal(idle, model(image)), f"{name}: zero reduction changes the output"
        vistoken.wrap(model, "tome:r=2")
        with vistoken.trace(model) as trace:
            reduced = model(image)
    start, prefix = trace.start_state.tokens, trace.start_state.prefix
    first = start - min(2, (start - prefix) // 2)
    assert trace.counts == (first, first - min(2, (first - prefix) // 2)), name
    assert torch.isfinite(reduced).all(), name
    assert all((size.sum(1) == start).all() for size in trace.sizes), name
    vistoken.unwrap(model)
    vistoken.wrap(model, vistoken.NeighborhoodAttention(window=shape_of(model).grid))
    with torch.no_grad():
        whole = model(image)
    assert torch.allclose(idle, whole, atol=1e-5, rtol=1e-4), f"{name}: windows of the whole grid"


@pytest.mark.slow
@pytest.mark.parametrize("module", EXPECTED)
def test_every_name_is_carried_or_refused(module: str, record_property) -> None:
    names = names_of(module)
    if not names:
        pytest.skip(f"this timm release has no {module}")
    carried, refused = [], []
    for name in names:
        torch.manual_seed(0)
        model, image = build(name)
        before = fingerprint(model)
        try:
            vistoken.wrap(model, "tome:r=0")
        except vistoken.UnsupportedBackboneError as error:
            assert re.search(r"looked for .* found |: its attention ", str(error)), str(error)
            assert type(model).__name__ in str(error)
            assert fingerprint(model) == before, f"{name}: refused, but not left untouched"
            refused.append(name)
            continue
        assert image is not None, f"{name} is carried but cannot be built tiny"
        check_carried(name, model, image)
        carried.append(name)
    record_property("carried", len(carried))
    record_property("refused", len(refused))
    print(f"{module}: {len(carried)} carried, {len(refused)} refused")
    least = EXPECTED[module]
    assert len(carried) >= least[0], refused
    assert len(refused) >= least[1], carried
