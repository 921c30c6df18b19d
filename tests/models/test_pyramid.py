"""What timm expects of NAT, DiNAT and BiFormer: registration, head, feature maps, training."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from pyramid_models import PYRAMIDS, tiny
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2

import vistoken
from vistoken.models.load import load_classifier

ONE_EACH = ("nat_tiny", "dinat_s_tiny", "biformer_tiny")
STEM = {"nat_tiny": "patch_embed.proj.0.weight", "dinat_s_tiny": "patch_embed.proj.weight"}


@pytest.mark.parametrize(
    ("module", "own", "other"),
    [("nat", "nat_tiny", "dinat_tiny"), ("biformer", "biformer_tiny", "nat_tiny")],
)
def test_registration_takes_an_explicit_import(module: str, own: str, other: str) -> None:
    code = (
        "import sys, vistoken; assert 'timm' not in sys.modules; import timm; "
        f"assert not timm.is_model('{own}'); import vistoken.models.{module}; "
        f"assert timm.is_model('{own}') and not timm.is_model('{other}'); "
        "import vistoken.models.dinat; assert timm.is_model_pretrained('dinat_s_large.in22k')"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


@pytest.mark.parametrize("name", ONE_EACH)
def test_head_features_and_classifier(name: str) -> None:
    model = tiny(name, global_pool="avg").eval()
    image = torch.randn(2, 3, 48, 48)
    features = model.forward_features(image)
    map_axes = (1, 2) if model.output_fmt == "NHWC" else (2, 3)
    assert [features.shape[axis] for axis in map_axes] == [3, 3]
    assert features.numel() == 2 * 9 * model.num_features
    assert torch.equal(model.forward_head(features), model(image))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.allclose(pooled, features.mean(map_axes), atol=1e-6)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(11)
    assert model(image).shape == (2, 11) and model.num_classes == 11
    model.reset_classifier(0, "")
    assert torch.equal(model(image), features)
    data = timm.data.resolve_data_config(model=timm.create_model(name, **PYRAMIDS[name]))
    assert data["input_size"] == (3, 224, 224) and data["interpolation"] == "bicubic"


@pytest.mark.parametrize("name", PYRAMIDS)
def test_feature_maps(name: str) -> None:
    settings = PYRAMIDS[name]
    whole = tiny(name).eval()
    net = timm.create_model(name, features_only=True, **settings).eval()
    net.model.load_state_dict(whole.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 96)
    maps = net(image)
    assert len(maps) == len(settings["depths"])
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == net.feature_info.reduction()
    final, found = whole.forward_intermediates(image)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(maps, found, strict=True))
    assert torch.equal(final, whole.forward_features(image))
    turned = whole.forward_intermediates(image, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(turned, found, strict=True))
    first = timm.create_model(name, features_only=True, out_indices=(0,), **settings)
    assert len(first(image)) == 1 and first.model.depth == 1
    with pytest.raises(vistoken.ConfigError, match="NLC"):
        whole.forward_intermediates(image, output_fmt="NLC")


@pytest.mark.parametrize("name", ONE_EACH)
def test_stopping_early_and_norming_the_last_map(name: str) -> None:
    model = tiny(name).eval()
    image = torch.randn(1, 3, 64, 96)
    final, (first,) = model.forward_intermediates(image, indices=[0], stop_early=True)
    assert torch.equal(final if model.output_fmt == "NCHW" else final.permute(0, 3, 1, 2), first)
    _, (last,) = model.forward_intermediates(image, 1, norm=True, output_fmt=model.output_fmt)
    assert torch.equal(last, model.forward_features(image))


@pytest.mark.parametrize("name", ONE_EACH)
def test_training_hooks_of_timm(name: str) -> None:
    model = tiny(name)
    assert model.no_weight_decay() == {n for n, _ in model.named_parameters() if "rpb" in n}
    for coarse in (False, True):
        groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse))
        named = [name for names in groups.values() for name in names]
        assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    groups = group_with_matcher(model.named_parameters(), model.group_matcher())
    assert STEM.get(name, "downsample_layers.0.0.weight") in groups[min(groups)]
    assert groups[max(groups)] == ["head.fc.weight", "head.fc.bias"]
    assert create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.8).param_groups


def test_what_halves_the_map_learns_at_the_rate_of_the_level_after_it() -> None:
    model = tiny("nat_tiny")
    groups = group_with_matcher(model.named_parameters(), model.group_matcher())
    below, above = (
        next(i for i, names in groups.items() if key in names)
        for key in ("levels.0.blocks.1.norm1.weight", "levels.0.downsample.norm.weight")
    )
    assert below < above


@pytest.mark.parametrize("name", ["dinat_tiny", "biformer_tiny"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = tiny(name).double()
    image = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    found = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model(image).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))
    assert all(torch.isfinite(g).all() for g in found[0])


@pytest.mark.parametrize("name", ["dinat_s_tiny", "biformer_tiny"])
def test_compiles_without_graph_break(name: str) -> None:
    model = tiny(name).eval()
    image = torch.randn(1, 3, 56, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(image), model(image), atol=1e-5)


@pytest.mark.parametrize("name", ["nat_mini", "biformer_tiny"])
def test_the_command_lines_loader_knows_them(name: str) -> None:
    loaded = load_classifier(name)
    assert loaded.num_classes == 1000 and loaded.image_size == (224, 224)


@pytest.mark.parametrize("name", ["nat_tiny", "biformer_tiny"])
def test_wrapping_says_what_it_is(name: str) -> None:
    with pytest.raises(vistoken.UnsupportedBackboneError, match="looked for one vision"):
        vistoken.wrap(tiny(name), vistoken.ToMe(r=2))
