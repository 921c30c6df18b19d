"""The neighborhood attention layers against loops in float64: outputs, gradients, small maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from naive_neighborhood import naive_attention
from torch import Tensor, nn

import vistoken
from vistoken.attention import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

# layer, its settings, grid
CASES = {
    "1d": (NeighborhoodAttention1D, {"kernel_size": 5}, (11,)),
    "1d causal stride": (
        NeighborhoodAttention1D,
        {"kernel_size": 4, "stride": 2, "is_causal": True},
        (9,),
    ),
    "2d": (NeighborhoodAttention2D, {"kernel_size": 3}, (5, 6)),
    "2d bias": (NeighborhoodAttention2D, {"kernel_size": 3, "rel_pos_bias": True}, (5, 6)),
    "2d bias ragged dilation": (
        NeighborhoodAttention2D,
        {"kernel_size": 3, "dilation": (2, 1), "rel_pos_bias": True},
        (7, 4),
    ),
    "2d even, scaled, no bias": (
        NeighborhoodAttention2D,
        {"kernel_size": (4, 3), "stride": (2, 1), "qk_scale": 0.3, "qkv_bias": False},
        (6, 5),
    ),
    "2d small map": (NeighborhoodAttention2D, {"kernel_size": 5, "rel_pos_bias": True}, (3, 6)),
    "2d small dilated map": (NeighborhoodAttention2D, {"kernel_size": 3, "dilation": 2}, (4, 5)),
    "2d causal small map": (
        NeighborhoodAttention2D,
        {"kernel_size": 5, "is_causal": (True, False)},
        (3, 6),
    ),
    "3d": (NeighborhoodAttention3D, {"kernel_size": (2, 3, 1)}, (3, 4, 2)),
    "3d causal": (
        NeighborhoodAttention3D,
        {"kernel_size": (2, 3, 3), "is_causal": (True, False, False)},
        (3, 3, 4),
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    cls, settings, grid = CASES[name]
    torch.manual_seed(0)
    layer = cls(12, 3, **settings).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer, torch.randn(2, *grid, 12, dtype=torch.float64, requires_grad=True)


def written_out(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer with the padding of the published models: zeros before the projection."""
    grid = x.shape[1:-1]
    for axis, (w, d) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True), 1):
        if x.shape[axis] < w * d:
            shape = list(x.shape)
            shape[axis] = w * d - shape[axis]
            x = torch.cat([x, x.new_zeros(shape)], axis)
    y = x @ layer.qkv.weight.T + (0 if layer.qkv.bias is None else layer.qkv.bias)
    q, k, v = (part.unflatten(-1, (layer.num_heads, -1)) for part in y.chunk(3, -1))
    out = naive_attention(
        q,
        k,
        v,
        layer.kernel_size,
        layer.stride,
        layer.dilation,
        layer.is_causal,
        layer.scale,
        layer.rpb,
    ).flatten(-2)
    out = out[(slice(None), *(slice(0, n) for n in grid))]
    return out @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_loops(name: str) -> None:
    layer, x = build(name)
    weights = [x, *layer.parameters()]
    out, expected = layer(x), written_out(layer, x)
    assert out.shape == x.shape
    assert torch.allclose(out, expected, atol=1e-12)
    noise = torch.randn_like(out)
    found = torch.autograd.grad((out * noise).sum(), weights)
    wanted = torch.autograd.grad((expected * noise).sum(), weights)
    for (key, _), a, b in zip([("x", x), *layer.named_parameters()], found, wanted, strict=True):
        assert b.abs().max() > 1e-3 or key == "qkv.bias", "the case tests nothing"
        assert torch.allclose(a, b, atol=1e-11), key


def test_a_window_as_large_as_the_map_is_dense_attention() -> None:
    torch.manual_seed(0)
    layer = NeighborhoodAttention2D(24, 2, kernel_size=(5, 4))
    x = torch.randn(2, 5, 4, 24)
    q, k, v = layer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    dense = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x).flatten(1, 2), layer.proj(dense), atol=1e-6)


def test_padded_cells_are_keys_that_carry_the_bias() -> None:
    """What the published models do on small maps, and why their window there is not the map."""
    layer, x = build("2d small map")
    before = layer(x)
    with torch.no_grad():
        layer.qkv.bias[-12:] += 1.0  # values of all cells, padding included
    moved = layer(x) - before
    assert torch.allclose(moved, (layer.proj.weight.sum(1)).expand_as(moved), atol=1e-10)
    with torch.no_grad():
        layer.qkv.bias.zero_()
    whole = NeighborhoodAttention2D(12, 3, kernel_size=(3, 5)).double()
    whole.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "rpb"})
    layer.rpb.data.zero_()
    assert not torch.allclose(layer(x), whole(x), atol=1e-3)


def test_parameters_have_the_published_names_and_shapes() -> None:
    layer = NeighborhoodAttention2D(64, 2, 7, rel_pos_bias=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "rpb": (2, 13, 13),
        "qkv.weight": (192, 64),
        "qkv.bias": (192,),
        "proj.weight": (64, 64),
        "proj.bias": (64,),
    }
    assert 0.015 < layer.rpb.std() < 0.025
    assert NeighborhoodAttention1D(8, 2, 3).rpb is None
    assert "kernel_size=(7, 7)" in repr(layer) and "rel_pos_bias=True" in repr(layer)


def test_projection_dropout_acts_in_training_only() -> None:
    layer = NeighborhoodAttention1D(8, 2, 3, proj_drop=0.5)
    x = torch.randn(4, 9, 8)
    assert (layer(x) == 0).any()
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer, x = build("2d bias")
    expected = layer(x)
    half = layer.to(dtype)(x.to(dtype)).double()
    assert (half - expected).norm() / expected.norm() < 2e-2


def test_autocast() -> None:
    layer, x = build("2d bias")
    expected = layer(x)
    layer = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.float())
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() < 2e-2


def test_compiles_without_graph_break_and_exports() -> None:
    layer, x = build("2d small map")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-12)
    out = torch.export.export(layer, (x.detach(),)).module()(x.detach())
    assert torch.allclose(out, layer(x), atol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_heads": 5},
        {"num_heads": 0},
        {"kernel_size": 0},
        {"kernel_size": (3, 3, 3)},
        {"kernel_size": 2.5},
        {"stride": 4},
        {"dilation": 0},
        {"is_causal": 1},
        {"attn_drop": 0.1},
        {"is_causal": True, "rel_pos_bias": True},
    ],
    ids=str,
)
def test_wrong_settings_are_named(wrong: dict) -> None:
    settings = {"num_heads": 2, "kernel_size": 3, **wrong}
    name = next(iter(wrong))
    with pytest.raises(vistoken.ConfigError, match=name):
        NeighborhoodAttention2D(12, **settings)


def test_wrong_inputs_are_named() -> None:
    layer = NeighborhoodAttention2D(12, 2, 3)
    for shape in ((2, 5, 12), (2, 5, 5, 8), (2, 5, 5, 5, 12)):
        with pytest.raises(vistoken.ConfigError, match="grid axes"):
            layer(torch.randn(shape))
