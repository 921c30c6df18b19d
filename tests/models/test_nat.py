"""NAT, DiNAT, DiNAT_s and isotropic models: published numbers, key layouts, timm's interface."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from naive_neighborhood import naive_attention
from pyramid_models import NAT_TINY, NATS, meta, tiny
from torch import Tensor

import vistoken
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


@pytest.mark.parametrize("name", NATS)
def test_forward_equals_the_network_written_out(name: str) -> None:
    model = tiny(name).double().eval()
    image = torch.randn(2, 3, 37, 46, dtype=torch.float64)  # odd maps: 10 x 12, 5 x 6, 3 x 3
    settings = NATS[name]
    dilations = settings.get("dilations", [[1] * depth for depth in settings["depths"]])
    swin = "_s_" in name or "isotropic" in name
    *maps, logits = written_out(model, image, dilations, "layer_scale" in settings, swin)
    with torch.no_grad():
        assert torch.allclose(model(image), logits, atol=1e-11)
        found = model.forward_intermediates(image, output_fmt="NHWC", intermediates_only=True)
    for a, b in zip(found, maps, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


def test_drop_path_acts_in_training_only() -> None:
    model = tiny("nat_tiny", drop_path_rate=0.9)
    image = torch.randn(2, 3, 40, 40)
    assert not torch.equal(model.train()(image), model(image))
    assert torch.equal(model.eval()(image), model(image))


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
        NAT(**{**NAT_TINY, **wrong})
