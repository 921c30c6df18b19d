"""NAT, DiNAT, DiNAT_s and isotropic models: published numbers, key layouts, timm's interface."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from naive_neighborhood import naive_attention
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import vistoken
import vistoken.models.dinat
from vistoken.models.load import load_classifier
from vistoken.models.nat import NAT

# published: millions of parameters, GFLOPs at the model's image size
PUBLISHED = {
    "nat_mini": (20, 2.7),
    "nat_tiny": (28, 4.3),
    "nat_small": (51, 7.8),
    "nat_base": (90, 13.7),
    "dinat_mini": (20, 2.7),
    "dinat_tiny": (28, 4.3),
    "dinat_small": (51, 7.8),
    "dinat_base": (90, 13.7),
    "dinat_s_tiny": (28, 4.5),
    "dinat_s_small": (50, 8.7),
    "dinat_s_base": (88, 15.4),
    "dinat_s_large": (197, 34.5),
    "nat_isotropic_small": (22, 4.3),
    "nat_isotropic_base": (86, 16.9),
    "dinat_isotropic_small": (22, 4.3),
    "dinat_isotropic_base": (86, 16.9),
    "vitrpb_small": (22, 4.6),
    "vitrpb_base": (87, 17.5),
}
# The authors' counter adds 5 operations per normed element here, and their M are cut, not rounded.
PUBLISHED_WITH_NORMS = {
    "dinat_large": (200, 30.6),
    "dinat_large_384": (200, 89.7),
    "dinat_large_384_11x11": (201, 92.4),
    "dinat_s_large_384": (197, 101.5),
}
DEPTHS = {"mini": (3, 4, 6, 5), "s_tiny": (2, 2, 6, 2), "s": (2, 2, 18, 2), "": (3, 4, 18, 5)}
WIDTHS = {"mini": 64, "tiny": 64, "small": 96, "base": 128, "large": 192, "s_tiny": 96}


def meta(name: str, **settings) -> NAT:
    with torch.device("meta"):
        return timm.create_model(name, **settings)


def test_models_run_on_the_meta_device() -> None:
    model = meta("dinat_tiny")
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(name: str) -> None:
    model = meta(name)
    millions, gflops = PUBLISHED[name]
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count) == millions
    assert round(vistoken.flops(model), 1) == gflops


@pytest.mark.parametrize("name", PUBLISHED_WITH_NORMS)
def test_large_models_meet_the_published_numbers_up_to_norms(name: str) -> None:
    model = meta(name)
    millions, gflops = PUBLISHED_WITH_NORMS[name]
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions <= count < millions + 1 or round(count) == millions
    assert 0.995 * gflops < vistoken.flops(model) <= gflops


def test_flops_at_other_sizes() -> None:
    """Twice the side is four times the work while no map is smaller than its window."""
    model = meta("nat_isotropic_small", num_classes=0)
    assert vistoken.flops(model, image_size=448) == pytest.approx(4 * vistoken.flops(model))
    wide = vistoken.flops(model, image_size=(224, 448))
    assert wide == pytest.approx(2 * vistoken.flops(model))
    small, padded = meta("nat_mini", depths=(1, 1, 1, 1)), 0
    for level, side in enumerate((56, 28, 14, 7)):
        c = 64 * 2**level
        side = min(side, 25 if level == 0 else -(-25 // 2**level))  # images of 100 pixels
        cells, under = side**2, max(side, 7) ** 2
        padded += under * (3 * c * c + 2 * 49 * c) + cells * (c * c + 6 * c * c)
        if level < 3:
            padded += (-(-side // 2)) ** 2 * 18 * c * c
    stem = 50**2 * 27 * 32 + 25**2 * 9 * 32 * 64
    assert small.macs(100) == padded + stem + 512 * 1000


# Forward -----------------------------------------------------------------------------------------

TINY = {"embed_dim": 32, "depths": (2, 1, 1), "kernel_size": 3, "num_classes": 5}
FORWARDS = {
    "nat_tiny": {**TINY, "layer_scale": 0.3},
    "dinat_tiny": {**TINY, "dilations": ((1, 3), (2,), (1,))},
    "dinat_s_tiny": {**TINY, "dilations": ((1, 3), (2,), (1,))},
    "dinat_isotropic_small": {
        **TINY,
        "depths": (3,),
        "dilations": ((1, 2, 1),),
        "patch_size": 8,
    },
}


def tiny(name: str, **more) -> NAT:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**FORWARDS[name], "drop_path_rate": 0.0, **more})
    for key, parameter in model.named_parameters():
        if "rpb" in key:
            nn.init.normal_(parameter)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in key and "weight" in key else 0.0, 0.3)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def written_out(model: NAT, x: Tensor, dilations, scaled: bool, swin: bool) -> list[Tensor]:
    """Maps of every level and the logits, from the state dict alone."""
    p = model.state_dict()

    def norm(x: Tensor, key: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        spread = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / (spread + 1e-5).sqrt() * p[f"{key}.weight"] + p[f"{key}.bias"]

    def linear(x: Tensor, key: str) -> Tensor:
        return x @ p[f"{key}.weight"].T + p.get(f"{key}.bias", 0)

    def conv(x: Tensor, key: str, **options) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), p[f"{key}.weight"], p.get(f"{key}.bias"), **options)
        return y.permute(0, 2, 3, 1)

    def grown(x: Tensor, rows: int, columns: int) -> Tensor:
        out = x.new_zeros(x.shape[0], rows, columns, x.shape[3])
        out[:, : x.shape[1], : x.shape[2]] = x
        return out

    def attention(x: Tensor, key: str, dilation: int) -> Tensor:
        rows, columns = x.shape[1:3]
        x = grown(x, max(rows, 3 * dilation), max(columns, 3 * dilation))
        parts = linear(x, f"{key}.qkv").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, 32)) for part in parts)
        spread, rpb = (dilation,) * 2, p[f"{key}.rpb"]
        out = naive_attention(q, k, v, (3, 3), dilation=spread, rpb=rpb)
        return linear(out.flatten(-2)[:, :rows, :columns], f"{key}.proj")

    x, maps = x.permute(0, 2, 3, 1), []
    if swin:
        side = p["patch_embed.proj.weight"].shape[-1]
        x = grown(x, *(-(-n // side) * side for n in x.shape[1:3]))
        x = conv(x, "patch_embed.proj", stride=side)
    else:
        for layer in (0, 1):
            x = conv(x, f"patch_embed.proj.{layer}", stride=2, padding=1)
    x = norm(x, "patch_embed.norm")
    for i, level in enumerate(dilations):
        for j, dilation in enumerate(level):
            key = f"levels.{i}.blocks.{j}"
            y = attention(norm(x, f"{key}.norm1"), f"{key}.attn", dilation)
            x = x + y * (p[f"{key}.gamma1"] if scaled else 1)
            hidden = F.gelu(linear(norm(x, f"{key}.norm2"), f"{key}.mlp.fc1"))
            x = x + linear(hidden, f"{key}.mlp.fc2") * (p[f"{key}.gamma2"] if scaled else 1)
        maps.append(x)
        key = f"levels.{i}.downsample"
        if i < len(dilations) - 1 and swin:
            x = grown(x, x.shape[1] + x.shape[1] % 2, x.shape[2] + x.shape[2] % 2)
            cells = [x[:, a::2, b::2] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = linear(norm(torch.cat(cells, -1), f"{key}.norm"), f"{key}.reduction")
        elif i < len(dilations) - 1:
            x = norm(conv(x, f"{key}.reduction", stride=2, padding=1), f"{key}.norm")
    pooled = norm(x, "norm").flatten(1, 2).mean(1)
    return [*maps, linear(pooled, "head.fc")]


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_equals_the_network_written_out(name: str) -> None:
    model = tiny(name).double().eval()
    image = torch.randn(2, 3, 37, 46, dtype=torch.float64)  # odd maps: 10 x 12, 5 x 6, 3 x 3
    settings = FORWARDS[name]
    dilations = settings.get("dilations", [[1] * depth for depth in settings["depths"]])
    swin = "_s_" in name or "isotropic" in name
    *maps, logits = written_out(model, image, dilations, "layer_scale" in settings, swin)
    with torch.no_grad():
        assert torch.allclose(model(image), logits, atol=1e-11)
        found = model.forward_intermediates(image, output_fmt="NHWC", intermediates_only=True)
    for a, b in zip(found, maps, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


# Published layouts -------------------------------------------------------------------------------


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
    loaded = [tiny(name), timm.create_model(name, checkpoint_path=str(path), **FORWARDS[name])]
    loaded[0].load_state_dict({"model": state})
    overlay = {"file": str(path), "num_classes": 5}
    loaded.append(
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **FORWARDS[name])
    )
    for model in loaded:
        assert torch.equal(model.eval()(image), source(image))
    fewer = {**FORWARDS[name], "num_classes": 3}
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


# timm's interface ---------------------------------------------------------------------------------


def test_registration_takes_an_explicit_import_and_vistoken_alone_leaves_timm_out() -> None:
    code = (
        "import sys, vistoken; assert 'timm' not in sys.modules; import timm; "
        "assert not timm.is_model('nat_tiny'); import vistoken.models.nat; "
        "assert timm.is_model('nat_tiny') and not timm.is_model('dinat_tiny'); "
        "import vistoken.models.dinat; assert timm.is_model_pretrained('dinat_s_large.in22k')"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_head_features_and_classifier() -> None:
    model = tiny("nat_tiny", global_pool="avg").eval()
    image = torch.randn(2, 3, 48, 48)
    features = model.forward_features(image)
    assert features.shape == (2, 3, 3, 128) and model.num_features == 128
    assert torch.equal(model.forward_head(features), model(image))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.allclose(pooled, features.mean((1, 2)), atol=1e-6)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(11)
    assert model(image).shape == (2, 11) and model.num_classes == 11
    model.reset_classifier(0, "")
    assert torch.equal(model(image), features)
    data = timm.data.resolve_data_config(model=timm.create_model("nat_tiny", **TINY))
    assert data["input_size"] == (3, 224, 224) and data["interpolation"] == "bicubic"


@pytest.mark.parametrize("name", FORWARDS)
def test_feature_maps(name: str) -> None:
    settings = FORWARDS[name]
    whole = tiny(name).eval()
    net = timm.create_model(name, features_only=True, **settings).eval()
    net.model.load_state_dict(whole.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 48)
    maps = net(image)
    assert len(maps) == len(settings["depths"])
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == net.feature_info.reduction()
    final, found = whole.forward_intermediates(image)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(maps, found, strict=True))
    assert torch.equal(final, whole.forward_features(image))
    first = timm.create_model(name, features_only=True, out_indices=(0,), **settings)
    assert len(first(image)) == 1 and len(first.model.levels) == 1
    with pytest.raises(vistoken.ConfigError, match="NLC"):
        whole.forward_intermediates(image, output_fmt="NLC")


def test_training_hooks_of_timm() -> None:
    model = tiny("nat_tiny")
    assert model.no_weight_decay() == {n for n, _ in model.named_parameters() if "rpb" in n}
    for coarse in (False, True):
        groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse))
        named = [name for names in groups.values() for name in names]
        assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    groups = group_with_matcher(model.named_parameters(), model.group_matcher())
    first, *_, last, head = groups.values()
    assert "patch_embed.proj.0.weight" in first and "norm.weight" in last
    assert head == ["head.fc.weight", "head.fc.bias"]
    below, above = (
        next(i for i, names in groups.items() if key in names)
        for key in ("levels.0.blocks.1.norm1.weight", "levels.0.downsample.norm.weight")
    )
    assert below < above
    assert create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.8).param_groups


def test_checkpointing_gives_the_same_gradients() -> None:
    model = tiny("dinat_tiny").double()
    image = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    found = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model(image).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))
    assert all(g.abs().max() > 0 for g in found[0])


def test_drop_path_acts_in_training_only() -> None:
    model = tiny("nat_tiny", drop_path_rate=0.9)
    image = torch.randn(2, 3, 40, 40)
    assert not torch.equal(model.train()(image), model(image))
    assert torch.equal(model.eval()(image), model(image))


def test_compiles_without_graph_break() -> None:
    model = tiny("dinat_s_tiny").eval()
    image = torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(image), model(image), atol=1e-5)


def test_the_command_lines_loader_knows_them() -> None:
    loaded = load_classifier("nat_mini")
    assert loaded.num_classes == 1000 and loaded.image_size == (224, 224)


@pytest.mark.parametrize(
    "wrong",
    [
        {"embed_dim": 40},
        {"dilations": ((1,), (1,), (1,))},
        {"stem": "token"},
        {"merge": "pool"},
        {"patch_size": 8},
    ],
    ids=str,
)
def test_wrong_settings_are_named(wrong: dict) -> None:
    with pytest.raises(vistoken.ConfigError, match=next(iter(wrong))):
        NAT(**{**TINY, **wrong})


def test_wrapping_says_what_it_is() -> None:
    with pytest.raises(vistoken.UnsupportedBackboneError, match="looked for one vision"):
        vistoken.wrap(tiny("nat_tiny"), vistoken.ToMe(r=2))
