"""torch.compile and torch.export of wrapped models: one graph, no recompilation, equal outputs."""

from __future__ import annotations

import pytest
import timm
import torch
import torch._dynamo as dynamo
import transformers as hf
from naive import randomise
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch._dynamo.utils import counters

import vistoken

TINY = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
SCHEDULE = vistoken.Schedule(17, 1, ((14, 12), (10, 9), (9, 6)))
METHODS = {
    "tome": vistoken.ToMe(r=3),
    "tome plain": vistoken.ToMe(r=3, proportional=False, round_to=4),
    "diffrate": vistoken.DiffRate(schedule=SCHEDULE),
    "zero_tprune": vistoken.ZeroTPrune(keep_rate=0.7, at=(0, 2), iterations=(3, 2, 1)),
    "evit": vistoken.EViT(keep_rate=0.6, at=(0, 2)),
    "evit prune": vistoken.EViT(keep_rate=0.6, at=(1,), fuse=False),
    "tofu": vistoken.ToFu(r=3, prune_blocks=1),
    "mctf": vistoken.MCTF(r=3),
    "random": vistoken.RandomDrop(keep_rate=0.7, at=(1,)),
    "pool": vistoken.Pool(at=(1,)),
}
SEEDED = {"random"}


def vit(**more: object) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model("vit_tiny_patch16_224", **{**TINY, **more}))


def tower() -> nn.Module:
    torch.manual_seed(0)
    return randomise(VisionTransformer(64, 16, 32, 3, 4, 2.0, output_dim=8))


def encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=64,
        patch_size=16,
    )
    return randomise(getattr(hf, f"{kind}Model")(config))


HOSTS = {
    "timm deit": lambda: randomise(timm.create_model("deit_tiny_patch16_224", **TINY)),
    "timm mean": lambda: vit(global_pool="avg"),
    "timm eva": lambda: randomise(
        timm.create_model("eva02_tiny_patch14_224", **{**TINY, "img_size": 56})
    ),
    "open_clip": tower,
    "transformers ViT": lambda: encoder("ViT"),
    "transformers CLIP": lambda: encoder("CLIPVision"),
}


def images(count: int, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def tensor_of(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


def run(model: nn.Module, image: Tensor) -> Tensor:
    torch.manual_seed(7)
    with torch.no_grad():
        return tensor_of(model(image))


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
def test_one_graph_and_no_break(method: str) -> None:
    model = vistoken.wrap(vit(), METHODS[method])
    with torch.no_grad():
        found = dynamo.explain(model)(images(2))
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


@pytest.mark.parametrize("method", METHODS)
def test_compiled_equals_eager(method: str) -> None:
    model, image = vistoken.wrap(vit(), METHODS[method]), images(2)
    expected = run(model, image)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = run(compiled, image)
    if method not in SEEDED:
        assert torch.allclose(found, expected, atol=1e-5)
    assert found.shape == expected.shape and torch.isfinite(found).all()
    assert torch.equal(run(model, image), expected), "compiling changed the eager model"


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_hosts_compile_once(host: str) -> None:
    model = vistoken.wrap(HOSTS[host](), "tome:r=2")
    side = 56 if "eva" in host else 64
    image = images(2, side)
    expected = run(model, image)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # Decorated forwards (transformers) make dynamo trace the hooks of the outermost module apart.
    graphs = 2 if "transformers" in host else 1
    for index in range(3):
        assert torch.allclose(run(compiled, image), expected, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == graphs, f"recompiled in call {index}"
        if index == 0:
            assert torch.equal(run(model, image), expected)
    assert not counters["graph_break"]


def test_an_encoder_inside_a_model_is_one_graph() -> None:
    model = nn.Sequential(vistoken.wrap(encoder("CLIPVision"), "tome:r=2"))
    expected = run(model, images(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        assert torch.allclose(run(compiled, images(2)), expected, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 1


def test_no_recompilation_over_calls_and_an_eager_call_between() -> None:
    model = vistoken.wrap(vit(), "tome:r=3")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batches = [images(2), images(2) + 1, images(2) - 1]
    for index, image in enumerate(batches):
        found = run(compiled, image)
        eager = run(model, image)
        assert torch.allclose(found, eager, atol=1e-5)
        with vistoken.trace(model) as trace:
            run(model, image)
        assert trace.counts == (14, 11, 8)
        assert counters["stats"]["unique_graphs"] == 1, index


@pytest.mark.slow
def test_two_batch_sizes_share_a_dynamic_graph() -> None:
    model = vistoken.wrap(vit(), "tome:r=3")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for count in (2, 3, 5, 4):
        image = images(count)
        torch._dynamo.mark_dynamic(image, 0)
        assert torch.allclose(run(compiled, image), run(model, image), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_two_batch_sizes_without_a_hint_compile_twice_at_most() -> None:
    model = vistoken.wrap(vit(), "evit:at=[0,2]")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for count in (2, 3, 5, 2, 4):
        image = images(count)
        assert torch.allclose(run(compiled, image), run(model, image), atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tome", "evit"])
def test_gradients_of_the_compiled_model(method: str) -> None:
    model, image = vistoken.wrap(vit(), METHODS[method]), images(2)
    model(image).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(image).square().sum().backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-4 * g.abs().max())


def test_intermediates_compile() -> None:
    model, image = vistoken.wrap(vit(), "evit:at=[0,2],fuse=False"), images(2)
    with torch.no_grad():
        expected = model.forward_features(image)
        compiled = torch.compile(model.forward_features, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(image), expected, atol=1e-5)


def test_unwrap_after_compiling() -> None:
    model, image = vit(), images(2)
    dense = run(model, image)
    vistoken.wrap(model, "tome:r=3")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(compiled, image)
    vistoken.unwrap(model)
    assert torch.equal(run(model, image), dense)
    assert torch.allclose(run(compiled, image), dense, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_export_equals_eager(host: str) -> None:
    model = vistoken.wrap(HOSTS[host](), "tome:r=2")
    image = images(2, 56 if "eva" in host else 64)
    expected = run(model, image)
    with torch.no_grad():
        program = torch.export.export(model, (image,), strict=False)
    assert torch.allclose(run(program.module(), image), expected, atol=1e-5)
    assert torch.equal(run(model, image), expected), "exporting changed the eager model"
    other = image.flip(0) * 0.5
    assert torch.allclose(run(program.module(), other), run(model, other), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tome", "diffrate", "zero_tprune", "evit", "mctf", "pool"])
def test_methods_export_with_a_dynamic_batch(method: str) -> None:
    model = vistoken.wrap(vit(), METHODS[method])
    batch = torch.export.Dim("batch", min=2, max=16)
    with torch.no_grad():
        program = torch.export.export(
            model, (images(3),), dynamic_shapes=({0: batch},), strict=False
        )
    for count in (2, 5):
        found = run(program.module(), images(count))
        assert torch.allclose(found, run(model, images(count)), atol=1e-5)
