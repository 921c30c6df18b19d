"""Bi-level routing attention layers against loops over regions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vistoken
from vistoken.attention import BiLevelRoutingAttention

# settings, map
CASES = {
    "divides": ({"n_win": 3, "topk": 2}, (6, 9)),
    "all regions": ({"n_win": 2, "topk": 4}, (4, 6)),
    "no convolution, own scale": (
        {"n_win": 2, "topk": 1, "side_dwconv": 0, "qk_scale": 0.7}, (4, 4)
    ),
    "ragged, masked": ({"n_win": 3, "topk": 2, "side_dwconv": 3}, (7, 5)),
    "ragged, few regions": ({"n_win": 7, "topk": 30}, (4, 9)),
    "ragged, attended": ({"n_win": 3, "topk": 2, "pad_keys": "attend"}, (7, 5)),
    "ragged, regions of padding only": ({"n_win": 4, "topk": 9, "pad_keys": "attend"}, (5, 6)),
    "ragged, zeros": ({"n_win": 3, "topk": 2, "pad_keys": "zeros"}, (7, 5)),
    "ragged, more regions": ({"n_win": 4, "topk": 5, "pad_keys": "zeros"}, (7, 9)),
}  # fmt: skip


def build(name: str) -> tuple[BiLevelRoutingAttention, Tensor]:
    settings, grid = CASES[name]
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(12, 3, **settings).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer, torch.randn(2, *grid, 12, dtype=torch.float64, requires_grad=True)


def written_out(layer: BiLevelRoutingAttention, x: Tensor, settings: dict) -> Tensor:
    """Loops over images, regions and heads; padding as the layer describes it."""
    n_win, topk = settings["n_win"], settings["topk"]
    pads, scale = settings.get("pad_keys", "mask"), settings.get("qk_scale", 12**-0.5)
    rows, columns = x.shape[1:3]
    size = [-(-n // n_win) for n in (rows, columns)]
    if pads == "zeros":
        size = [n // n_win for n in (rows, columns)]
    count = [-(-n // s) for n, s in zip((rows, columns), size, strict=True)]
    if pads == "attend":
        count = [n_win, n_win]
        wide = x.new_zeros(2, size[0] * n_win, size[1] * n_win, 12)
        wide[:, :rows, :columns] = x
        x = wide
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1)
    cells = [
        [
            (a, b)
            for a in range(i * size[0], min((i + 1) * size[0], x.shape[1]))
            for b in range(j * size[1], min((j + 1) * size[1], x.shape[2]))
        ]
        for i in range(count[0])
        for j in range(count[1])
    ]
    out = torch.zeros_like(v)
    for image in range(len(x)):
        take = [tuple(torch.tensor(c).T) for c in cells]
        means = [torch.stack([y[image][at].mean(0) for at in take]).detach() for y in (q, k)]
        best = (means[0] @ means[1].T).topk(min(topk, len(cells))).indices
        for region, at in enumerate(take):
            listed = best[region].tolist()
            keys, values = (torch.cat([y[image][take[r]] for r in listed]) for y in (k, v))
            if pads == "zeros":
                lack = len(listed) * size[0] * size[1] - len(keys)
                keys, values = (torch.cat([y, y.new_zeros(lack, 12)]) for y in (keys, values))
            for head in range(3):
                own = slice(4 * head, 4 * head + 4)
                score = q[image][at][:, own] @ keys[:, own].T * scale
                out[image][at[0], at[1], own] = score.softmax(-1) @ values[:, own]
    if layer.lepe is not None:
        w, b = layer.lepe.weight, layer.lepe.bias
        side = w.shape[-1] // 2
        conv = F.conv2d(v.permute(0, 3, 1, 2), w, b, padding=side, groups=12)
        out = out + conv.permute(0, 2, 3, 1)
    return out[:, :rows, :columns] @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_loops(name: str) -> None:
    layer, x = build(name)
    weights = [x, *layer.parameters()]
    out, expected = layer(x), written_out(layer, x, CASES[name][0])
    assert out.shape == x.shape
    assert torch.allclose(out, expected, atol=1e-11)
    noise = torch.randn_like(out)
    found = torch.autograd.grad((out * noise).sum(), weights)
    wanted = torch.autograd.grad((expected * noise).sum(), weights)
    for (key, _), a, b in zip([("x", x), *layer.named_parameters()], found, wanted, strict=True):
        assert b.abs().max() > 1e-3, "the case tests nothing"
        assert torch.allclose(a, b, atol=1e-10), key


def test_padding_rules_differ_on_ragged_maps_only() -> None:
    layer, x = build("ragged, masked")
    even = torch.randn(1, 6, 9, 12, dtype=torch.float64)
    outs, same = [], []
    for pads in ("mask", "attend", "zeros"):
        layer.pad_keys = pads
        outs.append(layer(x))
        same.append(layer(even))
    assert torch.allclose(same[0], same[1]) and torch.allclose(same[0], same[2])
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)
    assert not torch.allclose(outs[0], outs[2], atol=1e-3)


def test_macs() -> None:
    layer = BiLevelRoutingAttention(12, 3, n_win=3, topk=2)
    linear, conv, scores = 54 * 4 * 144, 54 * 25 * 12, 9 * 9 * 12
    assert layer.macs((6, 9)) == linear + conv + 2 * 54 * (2 * 6) * 12 + scores
    layer.pad_keys = "attend"
    cells = 9 * 6
    padded = cells * (3 * 144 + 25 * 12 + 2 * 12 * 12) + scores
    assert layer.macs((7, 5)) == padded + 7 * 5 * 144


def test_half_precision_and_autocast() -> None:
    layer, x = build("divides")
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer.float()(x.float())
    assert out.dtype == torch.bfloat16
    # A region on the border of the lists may change in half precision, so most cells agree.
    close = (out.double() - expected).norm(dim=-1) < 5e-2 * expected.norm(dim=-1)
    assert close.double().mean() > 0.6


def test_compiles_without_graph_break_and_exports() -> None:
    layer, x = build("ragged, attended")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-12)
    out = torch.export.export(layer, (x.detach(),)).module()(x.detach())
    assert torch.allclose(out, layer(x), atol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_heads": 5},
        {"num_heads": 0},
        {"n_win": 0},
        {"topk": 0},
        {"topk": 2.5},
        {"n_win": True},
        {"side_dwconv": 4},
        {"side_dwconv": -1},
        {"pad_keys": "drop"},
    ],
    ids=str,
)
def test_wrong_settings_are_named(wrong: dict) -> None:
    with pytest.raises(vistoken.ConfigError, match=next(iter(wrong))):
        BiLevelRoutingAttention(12, **{"num_heads": 2, **wrong})


def test_wrong_inputs_are_named() -> None:
    layer = BiLevelRoutingAttention(12, 2)
    for shape in ((2, 5, 12), (2, 5, 5, 8)):
        with pytest.raises(vistoken.ConfigError, match=r"\[B, X, Y, 12\]"):
            layer(torch.randn(shape))
