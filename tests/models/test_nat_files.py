"""Published NAT and DiNAT files: key layouts, shapes, and where their values land."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from pyramid_models import NATS, meta, tiny
from torch import Tensor

import vistoken.models.dinat
from vistoken.models.nat import NAT

DEPTHS = {"mini": (3, 4, 6, 5), "s_tiny": (2, 2, 6, 2), "s": (2, 2, 18, 2), "": (3, 4, 18, 5)}
WIDTHS = {"mini": 64, "tiny": 64, "small": 96, "base": 128, "large": 192, "s_tiny": 96}


def block_shapes(key: str, c: int, window: int, ratio: int, scaled: bool) -> dict[str, tuple]:
    heads, span, hidden = c // 32, 2 * window - 1, c * ratio
    found = {f"{key}.{norm}.{part}": (c,) for norm in ("norm1", "norm2") for part in PAIR}
    found |= {
        f"{key}.attn.rpb": (heads, span, span),
        f"{key}.attn.qkv.weight": (3 * c, c),
        f"{key}.attn.qkv.bias": (3 * c,),
        f"{key}.attn.proj.weight": (c, c),
        f"{key}.attn.proj.bias": (c,),
        f"{key}.mlp.fc1.weight": (hidden, c),
        f"{key}.mlp.fc1.bias": (hidden,),
        f"{key}.mlp.fc2.weight": (c, hidden),
        f"{key}.mlp.fc2.bias": (c,),
    }
    return found | ({f"{key}.gamma1": (c,), f"{key}.gamma2": (c,)} if scaled else {})


PAIR = ("weight", "bias")
ENDS = ("norm.weight", "norm.bias", "head.bias", "head.weight")


def ends(c: int, classes: int) -> dict[str, tuple]:
    return dict(zip(ENDS, ((c,), (c,), (classes,), (classes, c)), strict=True))


def nat_file(size: str, window=7, scaled=False, classes=1000) -> dict[str, tuple]:
    """Keys and shapes of the authors' NAT and DiNAT files."""
    c, ratio = WIDTHS[size], 3 if size in ("mini", "tiny") else 2
    found = {
        "patch_embed.proj.0.weight": (c // 2, 3, 3, 3),
        "patch_embed.proj.0.bias": (c // 2,),
        "patch_embed.proj.1.weight": (c, c // 2, 3, 3),
        "patch_embed.proj.1.bias": (c,),
        "patch_embed.norm.weight": (c,),
        "patch_embed.norm.bias": (c,),
    }
    for i, depth in enumerate(DEPTHS["mini" if size == "mini" else ""]):
        for j in range(depth):
            found |= block_shapes(f"levels.{i}.blocks.{j}", c, window, ratio, scaled)
        if i < 3:
            found[f"levels.{i}.downsample.reduction.weight"] = (2 * c, c, 3, 3)
            found |= {f"levels.{i}.downsample.norm.{part}": (2 * c,) for part in PAIR}
            c *= 2
    return found | ends(c, classes)


def swin_file(size: str, classes=1000) -> dict[str, tuple]:
    """Keys and shapes of the authors' DiNAT_s files."""
    c = {"tiny": 96, "small": 96, "base": 128, "large": 192}[size]
    found = {"patch_embed.proj.weight": (c, 3, 4, 4), "patch_embed.proj.bias": (c,)}
    found |= {f"patch_embed.norm.{part}": (c,) for part in PAIR}
    for i, depth in enumerate(DEPTHS["s_tiny" if size == "tiny" else "s"]):
        for j in range(depth):
            found |= block_shapes(f"layers.{i}.blocks.{j}", c, 7, 4, False)
        if i < 3:
            found[f"layers.{i}.downsample.reduction.weight"] = (2 * c, 4 * c)
            found |= {f"layers.{i}.downsample.norm.{part}": (4 * c,) for part in PAIR}
            c *= 2
    return found | ends(c, classes)


def flat_file(size: str, window=7) -> dict[str, tuple]:
    """Keys and shapes of the authors' isotropic files; ViT-rpb keeps an index table too."""
    c = {"small": 384, "base": 768}[size]
    found = {"patch_embed.proj.weight": (c, 3, 16, 16), "patch_embed.proj.bias": (c,)}
    found |= {f"patch_embed.norm.{part}": (c,) for part in PAIR}
    for j in range(12):
        found |= block_shapes(f"layers.{j}", c, window, 4, False)
        if window == 14:
            found[f"layers.{j}.attn.relative_position_index"] = (196, 196)
    return found | ends(c, 1000)


def port_file(model: str, authors: dict[str, tuple]) -> dict[str, tuple]:
    """The authors' file as the transformers port lays it out."""
    found = {}
    for key, shape in authors.items():
        name = key.replace("patch_embed.proj", f"{model}.embeddings.patch_embeddings.projection")
        name = name.replace("patch_embed.norm", f"{model}.embeddings.norm")
        name = name.replace("levels.", f"{model}.encoder.levels.").replace(".blocks.", ".layers.")
        for ours, theirs in (
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            (".attn.rpb", ".attention.self.rpb"),
            (".attn.proj.", ".attention.output.dense."),
            (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
        ):
            name = name.replace(ours, theirs)
        name = f"{model}.layernorm.{key[5:]}" if key.startswith("norm.") else name
        name = name.replace("head.", "classifier.")
        if ".attn.qkv." in name:
            shape = (shape[0] // 3, *shape[1:])
            for part in ("query", "key", "value"):
                found[name.replace(".attn.qkv.", f".attention.self.{part}.")] = shape
        elif key.endswith("gamma1"):
            found[name.replace("gamma1", "layer_scale_parameters")] = (2, *shape)
        elif not key.endswith("gamma2"):
            found[name] = shape
    return found


LARGE_22K = {"classes": 21841}
SIZES = ("mini", "tiny", "small", "base")
FILES = {
    **{f"nat_{s}.in1k": nat_file(s, scaled=s in ("small", "base")) for s in SIZES},
    **{f"dinat_{s}.in1k": nat_file(s, scaled=s == "base") for s in SIZES},
    "dinat_large.in22k_ft_in1k": nat_file("large"),
    "dinat_large.in22k": nat_file("large", **LARGE_22K),
    "dinat_large_384.in22k_ft_in1k": nat_file("large"),
    "dinat_large_384_11x11.in22k_ft_in1k": nat_file("large", window=11),
    "dinat_large_384_11x11.in22k": nat_file("large", window=11, **LARGE_22K),
    **{f"dinat_s_{s}.in1k": swin_file(s) for s in ("tiny", "small", "base")},
    "dinat_s_large.in22k_ft_in1k": swin_file("large"),
    "dinat_s_large.in22k": swin_file("large", **LARGE_22K),
    "dinat_s_large_384.in22k_ft_in1k": swin_file("large"),
    **{f"nat_isotropic_{s}.in1k": flat_file(s) for s in ("small", "base")},
    **{f"dinat_isotropic_{s}.in1k": flat_file(s) for s in ("small", "base")},
    **{f"vitrpb_{s}.in1k": flat_file(s, window=14) for s in ("small", "base")},
}


@pytest.mark.parametrize("name", FILES)
def test_published_files_fit(name: str) -> None:
    model = meta(name)
    assert model.pretrained_cfg["url"].endswith(".pth")
    layouts = [FILES[name]]
    if model.pretrained_cfg.get("hf_hub_id"):
        layouts.append(port_file(name.partition("_")[0], FILES[name]))
    for layout in layouts:
        state = {key: torch.empty(shape, device="meta") for key, shape in layout.items()}
        model.load_state_dict(state, strict=True, assign=True)
        short = {key: value for key, value in state.items() if not re.search("norm1|before", key)}
        with pytest.raises(RuntimeError, match="norm1"):
            model.load_state_dict(short, strict=True)


def test_every_registered_file_is_tested() -> None:
    names = {
        f"{name}.{tag}"
        for module in (vistoken.models.nat, vistoken.models.dinat)
        for name, cfg in module.default_cfgs.items()
        for tag in cfg.tags
    }
    assert names == set(FILES)


def test_layout_of_the_port_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from transformers.models.dinat import modeling_dinat

    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *args: None)
    config = transformers.DinatConfig(embed_dim=64, depths=[3, 4, 6, 5], num_labels=1000)
    with torch.device("meta"):
        port = modeling_dinat.DinatForImageClassification(config)
    theirs = {key: tuple(value.shape) for key, value in port.state_dict().items()}
    assert theirs == port_file("dinat", FILES["dinat_mini.in1k"])


def as_published(model: NAT, layout: str) -> dict[str, Tensor]:
    """A model's own values under published names."""
    own = {k.replace("head.fc.", "head."): v.clone() for k, v in model.state_dict().items()}
    if layout == "authors":
        return own
    if layout == "levels as layers":
        return {k.replace("levels.", "layers."): v for k, v in own.items()}
    if layout == "one level":
        return {k.replace("levels.0.blocks.", "layers."): v for k, v in own.items()}
    found = {}
    for key, value in own.items():
        names = list(port_file("nat", {key: tuple(value.shape)}))
        if ".qkv." in key:
            found |= dict(zip(names, value.chunk(3), strict=True))
        elif "gamma1" in key:
            found[names[0]] = torch.stack([value, own[key.replace("gamma1", "gamma2")]])
        elif names:
            found[names[0]] = value
    return found


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("nat_tiny", "authors"),
        ("nat_tiny", "port"),
        ("dinat_s_tiny", "levels as layers"),
        ("dinat_isotropic_small", "one level"),
    ],
)
def test_values_land_where_they_belong(name: str, layout: str, tmp_path) -> None:
    source = tiny(name).eval()
    image = torch.randn(1, 3, 40, 48)
    state = as_published(source, layout)
    path = tmp_path / "published.pth"
    torch.save(state, path)
    loaded = [tiny(name), timm.create_model(name, checkpoint_path=str(path), **NATS[name])]
    loaded[0].load_state_dict({"model": state})
    overlay = {"file": str(path), "num_classes": 5}
    loaded.append(
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **NATS[name])
    )
    for model in loaded:
        assert torch.equal(model.eval()(image), source(image))
    fewer = {**NATS[name], "num_classes": 3}
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **fewer)
    features = other.eval().forward_features(image)
    assert torch.equal(features, source.forward_features(image))
    assert other(image).shape == (1, 3)


def test_position_bias_follows_another_window() -> None:
    source = tiny("nat_tiny")
    ramp = torch.arange(5.0).expand(5, 5)
    with torch.no_grad():
        source.levels[0].blocks[0].attn.rpb.copy_(ramp)
    other = tiny("nat_tiny", kernel_size=5)
    other.load_state_dict(source.state_dict())
    rpb = other.levels[0].blocks[0].attn.rpb.detach()
    assert rpb.shape == (1, 9, 9)
    assert torch.allclose(rpb[0, :, 4], torch.full((9,), 2.0), atol=1e-5), "the middle stays"
    assert (rpb[0].diff(dim=1) > 0).all() and torch.allclose(rpb[0], rpb[0, :1], atol=1e-5)
    assert torch.allclose(rpb[0], 4 - rpb[0].flip(1), atol=1e-5), "mirrored offsets stay mirrored"
