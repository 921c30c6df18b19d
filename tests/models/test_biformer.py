"""BiFormer: published numbers, key layouts, a forward pass written out, timm's interface."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from naive_routing import attend, multiplicity, region_ids
from pyramid_models import BIFORMER_TINY, meta, tiny
from torch import Tensor

import vistoken
from vistoken.models.biformer import BiFormer

# published: millions of parameters, GFLOPs at 224 pixels
PUBLISHED = {
    "biformer_tiny": (13.1, 2.2),
    "biformer_small": (25.5, 4.5),
    "biformer_base": (56.8, 9.8),
    "biformer_stl": (28.4, 4.6),
    "biformer_stl_nchw": (28.4, 4.6),
}
DEPTHS = {"tiny": (2, 2, 8, 2), "small": (4, 4, 18, 4), "base": (4, 4, 18, 4), "stl": (2, 2, 6, 2)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_and_flops(name: str) -> None:
    model = meta(name)
    millions, gflops = PUBLISHED[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert round(model.macs() / 1e9, 1) == gflops


def test_macs_follow_the_operations() -> None:
    """Torch's counter, which sees convolutions, linear layers and dense attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("biformer_tiny").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # noqa: SIM117
        with sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(1, 3, 64, 64))
    # The counter does not know routed attention: a block on 18 x 18 padded cells with 1 region of
    # 36, two on 9 x 9 with 2 regions of 9.
    routed = 2 * 18**2 * (1 * 36) * 32 + 2 * 2 * 9**2 * (2 * 9) * 64
    assert 2 * (model.macs(64) - routed) == counter.get_total_flops()


# checkpoints --------------------------------------------------------------------------------------


def pair(key: str, *weight: int) -> dict[str, tuple[int, ...]]:
    return {f"{key}.weight": weight, f"{key}.bias": weight[:1]}


def batch_norm(key: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {
        **pair(key, dim),
        f"{key}.running_mean": (dim,),
        f"{key}.running_var": (dim,),
        f"{key}.num_batches_tracked": (),
    }


def published_file(
    dims, depths, topks, ratio: int, layout: str, classes: int = 1000
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the authors' files: layout `plain`, `stl` or `nchw`."""
    one = (1, 1) if layout == "nchw" else ()
    found: dict[str, tuple[int, ...]] = {}
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        down = f"downsample_layers.{i}"
        if layout == "plain" and i == 0:
            found |= pair(f"{down}.0", dim // 2, 3, 3, 3) | batch_norm(f"{down}.1", dim // 2)
            found |= pair(f"{down}.3", dim, dim // 2, 3, 3) | batch_norm(f"{down}.4", dim)
        elif layout == "plain":
            found |= pair(f"{down}.0", dim, dims[i - 1], 3, 3) | batch_norm(f"{down}.1", dim)
        elif i == 0:
            found |= pair(f"{down}.0", dim, 3, 4, 4) | batch_norm(f"{down}.1", dim)
        else:
            found |= batch_norm(f"{down}.0", dims[i - 1])
            found |= pair(f"{down}.1", dim, dims[i - 1], 2, 2)
        for j in range(depth):
            block = f"stages.{i}.{j}" if layout == "plain" else f"stages.{i}.blocks.{j}"
            if layout == "plain":
                found |= pair(f"{block}.pos_embed", dim, 1, 3, 3)
            found |= pair(f"{block}.norm1", dim) | pair(f"{block}.norm2", dim)
            found |= pair(f"{block}.attn.lepe", dim, 1, 5, 5)
            if topks[i] is None:
                found |= {f"{block}.attn.qkv.weight": (3 * dim, dim, *one)}
                found |= pair(f"{block}.attn.proj", dim, dim, *one)
            else:
                qkv, out = ("qkv_linear", "output_linear") if one else ("qkv.qkv", "wo")
                found |= pair(f"{block}.attn.{qkv}", 3 * dim, dim, *one)
                found |= pair(f"{block}.attn.{out}", dim, dim, *one)
            second = 3 if layout == "plain" else 2
            found |= pair(f"{block}.mlp.0", ratio * dim, dim, *one)
            found |= pair(f"{block}.mlp.{second}", dim, ratio * dim, *one)
    return found | batch_norm("norm", dims[-1]) | pair("head", classes, dims[-1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_fit(name: str) -> None:
    kind = name.removeprefix("biformer_").removesuffix("_nchw")
    layout = "nchw" if name.endswith("nchw") else "stl" if kind == "stl" else "plain"
    dims = (96, 192, 384, 768) if kind in ("base", "stl") else (64, 128, 256, 512)
    ratio = 4 if kind == "stl" else 3
    shapes = published_file(dims, DEPTHS[kind], (1, 4, 16, None), ratio, layout)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = meta(name)
    model.load_state_dict({"model": state}, strict=True, assign=True)
    short = {key: value for key, value in state.items() if not re.search("norm1", key)}
    with pytest.raises(RuntimeError, match="norm1"):
        model.load_state_dict(short, strict=True)


def written_out(state: dict[str, Tensor], image: Tensor, layout: str) -> Tensor:
    """The published network from a published file, by loops and dense masks."""

    def norm(x: Tensor, key: str) -> Tensor:
        mean, var = (state[f"{key}.running_{name}"].view(-1, 1, 1) for name in ("mean", "var"))
        weight, bias = (state[f"{key}.{name}"].view(-1, 1, 1) for name in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(x: Tensor, key: str, **more) -> Tensor:
        return F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), **more)

    def linear(x: Tensor, key: str) -> Tensor:
        return F.linear(x, state[f"{key}.weight"].flatten(1), state.get(f"{key}.bias"))

    def layer_norm(x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"], 1e-6)

    def lepe(x: Tensor, key: str) -> Tensor:
        dim = x.shape[-1]
        return conv(x.movedim(-1, 1), f"{key}.lepe", padding=2, groups=dim).movedim(1, -1)

    def dense(x: Tensor, key: str) -> Tensor:
        b, rows, columns, dim = x.shape
        q, k, v = linear(x, f"{key}.qkv").chunk(3, -1)
        near = lepe(v if layout == "nchw" else x, key)
        flat = [t.reshape(b, rows * columns, 8, dim // 8) for t in (q, k, v)]
        times = torch.ones(b, 8, rows * columns, rows * columns, dtype=x.dtype)
        out = attend(*flat, times, (dim // 8) ** -0.5)[0].reshape(x.shape)
        return linear(out + near, f"{key}.proj")

    def routed(x: Tensor, key: str, topk: int) -> Tensor:
        b, rows, columns, dim = x.shape
        size = tuple(-(-n // 3) for n in (rows, columns))
        if layout == "nchw":
            size = tuple(n // 3 for n in (rows, columns))
        else:
            x = F.pad(x, (0, 0, 0, 3 * size[1] - columns, 0, 3 * size[0] - rows))
        grid = tuple(x.shape[1:3])
        names = ("qkv_linear", "output_linear") if layout == "nchw" else ("qkv.qkv", "wo")
        q, k, v = linear(x, f"{key}.{names[0]}").chunk(3, -1)
        ids = torch.tensor(region_ids(grid, size))
        count = int(ids.max()) + 1
        means = [
            torch.stack([t.flatten(1, 2)[:, ids == r].mean(1) for r in range(count)], 1)
            for t in (q, k)
        ]
        index = (means[0] @ means[1].mT).topk(topk).indices[:, None]
        flat = [t.flatten(1, 2).unflatten(-1, (-1, 32)) for t in (q, k, v)]
        heads = dim // 32
        times = multiplicity(index, ids.tolist(), ids.tolist(), b, heads)
        zeros = None
        if layout == "nchw":
            lack = size[0] * size[1] - torch.bincount(ids)
            zeros = lack[index].sum(-1)[:, :, ids].expand(b, heads, -1).double()
        out = attend(*flat, times, dim**-0.5, zeros=zeros)[0].reshape(x.shape)
        out = (out + lepe(v, key))[:, :rows, :columns]
        return linear(out, f"{key}.{names[1]}")

    x = image
    for i, (depth, topk) in enumerate(
        zip(BIFORMER_TINY["depths"], BIFORMER_TINY["topks"], strict=True)
    ):
        down = f"downsample_layers.{i}"
        if layout == "plain" and i == 0:
            x = F.gelu(norm(conv(x, f"{down}.0", stride=2, padding=1), f"{down}.1"))
            x = norm(conv(x, f"{down}.3", stride=2, padding=1), f"{down}.4")
        elif layout == "plain":
            x = norm(conv(x, f"{down}.0", stride=2, padding=1), f"{down}.1")
        elif i == 0:
            x = norm(conv(x, f"{down}.0", stride=4), f"{down}.1")
        else:
            x = conv(norm(x, f"{down}.0"), f"{down}.1", stride=2)
        for j in range(depth):
            block = f"stages.{i}.{j}" if layout == "plain" else f"stages.{i}.blocks.{j}"
            if layout == "plain":
                x = x + conv(x, f"{block}.pos_embed", padding=1, groups=x.shape[1])
            x = x.movedim(1, -1)
            y = layer_norm(x, f"{block}.norm1")
            attn = f"{block}.attn"
            x = x + (dense(y, attn) if topk is None else routed(y, attn, topk))
            y = F.gelu(linear(layer_norm(x, f"{block}.norm2"), f"{block}.mlp.0"))
            x = x + linear(y, f"{block}.mlp.{3 if layout == 'plain' else 2}")
            x = x.movedim(-1, 1)
    return linear(norm(x, "norm").mean((2, 3)), "head")


LAYOUTS = {"biformer_tiny": "plain", "biformer_stl": "stl", "biformer_stl_nchw": "nchw"}


def synthetic(name: str, ratio: int) -> dict[str, Tensor]:
    """A published file with random values."""
    shapes = published_file(
        BIFORMER_TINY["embed_dims"],
        BIFORMER_TINY["depths"],
        BIFORMER_TINY["topks"],
        ratio,
        LAYOUTS[name],
        5,
    )
    torch.manual_seed(2)
    state = {}
    for key, shape in shapes.items():
        if key.endswith("tracked"):
            state[key] = torch.tensor(3)
        elif key.endswith("var") or "norm" in key:
            state[key] = torch.rand(shape, dtype=torch.float64) + 0.5
        else:
            state[key] = (
                torch.randn(shape, dtype=torch.float64)
                * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5
            )
    return state


@pytest.mark.parametrize("size", [(96, 96), (80, 112)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_file_runs_as_the_authors_network(name: str, size: tuple[int, int]) -> None:
    state = synthetic(name, 3 if name == "biformer_tiny" else 4)
    model = timm.create_model(name, **BIFORMER_TINY).double().eval()
    model.load_state_dict({"model": state})
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted = written_out(state, image, LAYOUTS[name])
    assert wanted.abs().max() > 1e-2
    with torch.no_grad():
        assert torch.allclose(model(image), wanted, atol=1e-9)


def test_timm_loads_a_published_file(tmp_path) -> None:
    state = {k: v.float() if v.dim() else v for k, v in synthetic("biformer_tiny", 3).items()}
    path = tmp_path / "published.pth"
    torch.save({"model": state}, path)
    image = torch.randn(1, 3, 64, 64)
    whole = timm.create_model("biformer_tiny", **BIFORMER_TINY).eval()
    whole.load_state_dict(state)
    again = timm.create_model("biformer_tiny", checkpoint_path=str(path), **BIFORMER_TINY).eval()
    assert torch.equal(again(image), whole(image))
    own = timm.create_model("biformer_tiny", **BIFORMER_TINY).eval()
    own.load_state_dict(whole.state_dict())
    assert torch.equal(own(image), whole(image))
    overlay = {"file": str(path), "num_classes": 5}
    fewer = {**BIFORMER_TINY, "num_classes": 3}
    other = timm.create_model(
        "biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **fewer
    ).eval()
    assert torch.equal(other.forward_features(image), whole.forward_features(image))
    assert other(image).shape == (1, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"embed_dims": (32, 48, 64)},
        {"depths": (1, 1)},
        {"topks": (1, 2)},
        {"side_dwconv": 4},
        {"pos_dwconv": 2},
        {"stem": "token"},
        {"pad_keys": "drop"},
    ],
    ids=str,
)
def test_wrong_settings_are_named(wrong: dict) -> None:
    with pytest.raises(vistoken.ConfigError, match=next(iter(wrong))):
        BiFormer(**{**BIFORMER_TINY, **wrong})
