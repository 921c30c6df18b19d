"""Activation checkpointing: exact gradients, or an error that says what to use."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import timm
import torch
import transformers as hf
from naive import randomise
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import vistoken

TINY = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 64,
    "patch_size": 16,
}


def vit(**more: object) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model("vit_tiny_patch16_224", **TINY, **more).double())


def images(count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 64, 64, generator=generator, dtype=torch.float64)


def run(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model(image)


def open_clip_tower() -> nn.Module:
    torch.manual_seed(0)
    tower = VisionTransformer(64, 16, 32, 4, 4, 2.0, output_dim=8)
    return randomise(tower.double())


def hf_vision(kind: str) -> nn.Module:
    torch.manual_seed(0)
    more = {"mlp_ratio": 2} if kind == "Dinov2" else {}
    name = kind if kind in ("ViT", "Dinov2") else f"{kind}Vision"
    model = getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**SMALL, **more))
    return randomise(model.double())


def timm_checkpoints(model: nn.Module, reentrant: bool) -> None:
    model.set_grad_checkpointing()
    timm.layers.config.set_reentrant_ckpt(reentrant)


def hf_checkpoints(model: nn.Module, reentrant: bool) -> None:
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def open_clip_checkpoints(model: nn.Module, reentrant: bool) -> None:
    if not reentrant:
        model.set_grad_checkpointing()
        return
    for block in model.transformer.resblocks:
        block.forward = functools.partial(recomputed, type(block).forward, block)


def recomputed(forward: Callable, block: nn.Module, x: Tensor, **kwargs: object) -> Tensor:
    return checkpoint(functools.partial(forward, block, **kwargs), x, use_reentrant=True)


HOSTS = {
    "timm": (vit, timm_checkpoints),
    "timm eva": (
        lambda: randomise(
            timm.create_model("eva02_tiny_patch14_224", **{**TINY, "img_size": 56}).double()
        ),
        timm_checkpoints,
    ),
    "open_clip": (open_clip_tower, open_clip_checkpoints),
    "transformers ViT": (lambda: hf_vision("ViT"), hf_checkpoints),
    "transformers CLIP": (lambda: hf_vision("CLIP"), hf_checkpoints),
    "transformers DINOv2": (lambda: hf_vision("Dinov2"), hf_checkpoints),
}


METHODS = {
    "merge": vistoken.ToMe(r=2),
    "fuse": vistoken.EViT(keep_rate=0.6, at=(0, 2)),
    "after the block": vistoken.ZeroTPrune(keep_rate=0.7, at=(0, 2)),
    "random": vistoken.RandomDrop(keep_rate=0.7, at=(0, 2)),
}


@pytest.fixture(autouse=True)
def plain_checkpoints():
    before = timm.layers.config.use_reentrant_ckpt()
    yield
    timm.layers.config.set_reentrant_ckpt(before)


def tensor_of(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


def batch_for(name: str, seed: int) -> Tensor:
    side = 56 if name == "timm eva" else 64
    return images(2, seed)[..., :side, :side]


def gradients(model: nn.Module, name: str, passes: int) -> list[Tensor]:
    """Gradients of a loss over `passes` forward passes that are all done before one backward."""
    torch.manual_seed(3)
    model.zero_grad()
    outputs = [tensor_of(model(batch_for(name, seed))) for seed in range(passes)]
    weights = torch.linspace(-1, 1, outputs[0].numel(), dtype=torch.float64)
    loss = sum((index + 1) * (y.flatten() * weights).sum() for index, y in enumerate(outputs))
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_checkpointing_gives_exact_gradients(name: str, method: str, passes: int) -> None:
    build, enable = HOSTS[name]
    model = vistoken.wrap(build(), METHODS[method])
    model.train()
    expected = gradients(model, name, passes)
    assert max(g.abs().max() for g in expected) > 1e-3
    enable(model, reentrant=False)
    calls = count_calls(first_mlp(model))
    found = gradients(model, name, passes)
    assert calls[0] == 2 * passes, "nothing was recomputed"
    assert len(found) == len(expected)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) == 0


def first_mlp(model: nn.Module) -> nn.Module:
    return next(m for path, m in model.named_modules() if path.endswith("mlp"))


def count_calls(module: nn.Module) -> list[int]:
    calls = [0]

    def add(*_: object) -> None:
        calls[0] += 1

    module.register_forward_pre_hook(add)
    return calls


@pytest.mark.parametrize("name", ["timm", "transformers ViT", "transformers CLIP", "open_clip"])
def test_reentrant_checkpointing_says_what_to_use(name: str) -> None:
    build, enable = HOSTS[name]
    model = vistoken.wrap(build(), "tome:r=2")
    enable(model, reentrant=True)
    with pytest.raises(vistoken.RecomputeError, match="use_reentrant=False"):
        gradients(model, name, 1)


@pytest.mark.parametrize("every", [2, 3])
def test_checkpointed_segments_of_several_blocks(every: int) -> None:
    model = vistoken.wrap(vit(), "tome:r=2")

    def features(image: Tensor) -> Tensor:
        x = model._pos_embed(model.patch_embed(image))
        return timm.models.checkpoint_seq(model.blocks, x, every=every, use_reentrant=False)

    def grads(forward: Callable) -> list[Tensor]:
        model.zero_grad()
        outputs = [forward(images(2, seed)) for seed in (0, 1)]
        (outputs[0].square().sum() + outputs[1].square().sum() * 3).backward()
        return [p.grad.clone() for p in model.blocks.parameters()]

    expected = grads(lambda image: model.blocks(model._pos_embed(model.patch_embed(image))))
    found = grads(features)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) == 0


def test_two_image_sizes_before_one_backward() -> None:
    model = vistoken.wrap(vit(dynamic_img_size=True), "tome:r=2")

    def grads() -> list[Tensor]:
        model.zero_grad()
        outputs = [model(images()[..., :side]) for side in (64, 48, 32)]
        sum((index + 1) * y.square().sum() for index, y in enumerate(outputs)).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = grads()
    model.set_grad_checkpointing()
    timm.layers.config.set_reentrant_ckpt(False)
    found = grads()
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) == 0


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_the_whole_model(method: str) -> None:
    model = vistoken.wrap(vit(), METHODS[method])

    def grads(forward: Callable) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(4)
        outputs = [forward(images(2, seed)) for seed in (0, 1)]
        (outputs[0].square().sum() + outputs[1].square().sum() * 3).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = grads(model)
    found = grads(lambda image: checkpoint(model, image, use_reentrant=False))
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) == 0


def test_too_many_passes_before_a_backward_are_an_error_not_a_wrong_gradient() -> None:
    model = vistoken.wrap(vit(), "tome:r=2")
    model.set_grad_checkpointing()
    timm.layers.config.set_reentrant_ckpt(False)
    outputs = [model(images(1, seed)) for seed in range(20)]
    with pytest.raises(vistoken.RecomputeError, match="not known any more"):
        sum(y.sum() for y in outputs).backward()
    assert _get_current_function_mode_stack() == []
    assert torch.isfinite(run(model, images())).all()
