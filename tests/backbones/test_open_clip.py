"""open_clip towers against a forward written out in float64; dense outputs; undo."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from naive import (
    NaiveEViT,
    NaiveRandom,
    NaiveToMe,
    NaiveZeroTPrune,
    attend,
    fingerprint,
    join_heads,
    randomise,
    run_blocks,
    split_heads,
)
from naive_timm import timm_head, timm_trail
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

import vistoken

TOWER = {"image_size": (40, 56), "patch_size": 8, "width": 32, "layers": 3, "heads": 4}
GRID = (5, 7)
TOWERS = {
    "class token": {},
    "layer scale": {"ls_init_value": 0.4},
    "no norm before": {"no_ln_pre": True},
    "mean": {"pool_type": "avg"},
    "mean, norm after": {"pool_type": "avg", "final_ln_after_pool": True},
    "tokens too": {"output_tokens": True},
    "attention pool": {
        "attentional_pool": True,
        "attn_pooler_queries": 6,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
    "two attention pools": {
        "attentional_pool": "parallel",
        "output_dim": 32,
        "attn_pooler_queries": 6,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
}
METHODS = [
    (vistoken.ToMe(r=6), NaiveToMe(r=6)),
    (vistoken.ToMe(r=6, proportional=False), NaiveToMe(r=6, proportional=False)),
    (vistoken.RandomDrop(keep_rate=0.7, at=(0, 2)), NaiveRandom(rate=0.7, at=(0, 2))),
    (
        vistoken.ZeroTPrune(keep_rate=0.7, at=(0, 1), iterations=(6, 3, 1)),
        NaiveZeroTPrune(rate=0.7, at=(0, 1)),
    ),
    (vistoken.EViT(keep_rate=0.6, at=(0, 2)), NaiveEViT(rate=0.6, at=(0, 2))),
]


def images(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def tower(name: str) -> nn.Module:
    settings = {"mlp_ratio": 2.0, "output_dim": 16, **TOWER, **TOWERS[name]}
    torch.manual_seed(0)
    return randomise(VisionTransformer(**settings).double())


class Block:
    """One residual attention block with `nn.MultiheadAttention` taken apart."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def attention(self, tokens, bias):
        attn, h = self.block.attn, self.block.ln_1(tokens.x)
        weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        q, k, v = (
            split_heads(h @ w.T + b, attn.num_heads) for w, b in zip(weights, biases, strict=True)
        )
        scale = q.shape[-1] ** -0.5
        out = join_heads(attend(q, k, scale, bias) @ v)
        out = out @ attn.out_proj.weight.T + attn.out_proj.bias
        return self.block.ls_1(out), q, k, scale

    def mlp(self, x: Tensor) -> Tensor:
        return self.block.ls_2(self.block.mlp(self.block.ln_2(x)))


def trail_of(visual: nn.Module, image: Tensor, reducer):
    with torch.no_grad():
        x = visual._embeds(image)
        return run_blocks(x, 1, [Block(b) for b in visual.transformer.resblocks], reducer)


def head(visual: nn.Module, tokens) -> tuple[Tensor, Tensor]:
    """Pooled output and tokens; everything but the class token is read from the full grid."""
    with torch.no_grad():
        x = tokens.unmerged(tokens.x, GRID)
        pooled, rest = visual._pool(x)
        return pooled @ visual.proj, rest


@pytest.mark.parametrize("name", TOWERS)
def test_wrap_equals_the_forward_written_out(name: str) -> None:
    visual, image = tower(name), images(2, 3, 40, 56)
    plain, before = copy.deepcopy(visual), fingerprint(visual)
    with torch.no_grad():
        dense = plain(image)
    for method, reducer in METHODS:
        vistoken.wrap(visual, method)
        torch.manual_seed(5)
        with torch.no_grad(), vistoken.trace(visual) as trace:
            found = visual(image)
        torch.manual_seed(5)
        trail = trail_of(plain, image, reducer)
        assert trace.counts == trail.counts, method
        pooled, tokens = head(plain, trail.steps[-1])
        if visual.output_tokens:
            assert (found[1] - tokens).abs().max() < 1e-10, method
            assert (found[1] - dense[1]).abs().max() > 1e-6, method
            found = found[0]
        assert (found - pooled).abs().max() < 1e-10, method
        last = trace.blocks[-1]
        assert torch.equal(last.source_map.parent, trail.steps[-1].parent)
        vistoken.unwrap(visual)
    assert fingerprint(visual) == before
    with torch.no_grad():
        again = visual(image)
    pairs = zip(again, dense, strict=True) if visual.output_tokens else ((again, dense),)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("grad", [False, True])
def test_zero_reduction_is_bit_identical(name: str, grad: bool) -> None:
    visual, image = tower(name), images(2, 3, 40, 56)
    with torch.set_grad_enabled(grad):
        dense = visual(image)
        for method in ("tome:r=0", "random:keep_rate=1.0", "evit:keep_rate=1.0"):
            vistoken.wrap(visual, method)
            found = visual(image)
            vistoken.unwrap(visual)
            pairs = zip(found, dense, strict=True) if visual.output_tokens else ((found, dense),)
            assert all(torch.equal(a, b) for a, b in pairs), method


def test_the_fast_path_of_eval_mode_does_not_bypass_the_tap() -> None:
    visual, image = tower("class token"), images(2, 3, 40, 56)
    vistoken.wrap(visual, "tome:r=6")
    with torch.no_grad():
        fast = visual(image)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            slow = visual(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(fast, slow, atol=1e-12)
    assert torch.allclose(fast, visual(image), atol=1e-12)


@pytest.mark.parametrize("name", ["class token", "mean", "mean, norm after", "attention pool"])
@pytest.mark.parametrize("fill", ["nearest", "zeros"])
def test_forward_intermediates_are_on_the_full_grid(name: str, fill: str) -> None:
    visual, image = tower(name), images(2, 3, 40, 56)
    plain = copy.deepcopy(visual)
    trail = trail_of(plain, image, NaiveEViT(rate=0.6, at=(0, 2), fuse=False))
    vistoken.wrap(visual, vistoken.EViT(keep_rate=0.6, at=(0, 2), fuse=False), fill=fill)
    with torch.no_grad():
        whole = visual(image)
        whole = whole[0] if visual.output_tokens else whole
        for indices, blocks in ((None, [0, 1, 2]), (1, [2]), ([0, -1], [0, 2]), ([1], [1])):
            for fmt, stop in (("NCHW", False), ("NLC", True)):
                norm = stop and plain.attn_pool is None
                found = visual.forward_intermediates(
                    image,
                    indices,
                    stop_early=stop,
                    normalize_intermediates=norm,
                    output_fmt=fmt,
                    output_extra_tokens=True,
                )
                for position, block in enumerate(blocks):
                    step = trail.steps[block + 1]
                    full = step.unmerged(plain.ln_post(step.x) if norm else step.x, GRID, fill)
                    y, first = full[:, 1:], full[:, :1]
                    if fmt == "NCHW":
                        y = y.transpose(1, 2).reshape(2, -1, *GRID)
                    assert torch.allclose(found["image_intermediates"][position], y, atol=1e-10)
                    prefix = found["image_intermediates_prefix"][position]
                    assert torch.allclose(prefix, first, atol=1e-10)
                if not stop or blocks[-1] == 2:
                    assert torch.allclose(found["image_features"], whole, atol=1e-10)


TEXT = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 4, "layers": 2}
VISION = {"image_size": 40, "patch_size": 8, "width": 32, "head_width": 8, "layers": 3}


def clip(cls: type, **vision: object) -> nn.Module:
    torch.manual_seed(0)
    model = cls(embed_dim=16, vision_cfg={**VISION, **vision}, text_cfg=dict(TEXT))
    return randomise(model.double())


@pytest.mark.parametrize("cls", [CLIP, CustomTextCLIP])
def test_encode_image_of_a_wrapped_clip(cls: type) -> None:
    model, image = clip(cls), images(2, 3, 40, 40)
    plain, before = copy.deepcopy(model), fingerprint(model)
    words = torch.randint(1, 40, (2, 8))
    vistoken.wrap(model, "tome:r=4")
    assert vistoken.info(model).path == "visual"
    trail = trail_of(plain.visual, image, NaiveToMe(r=4))
    with torch.no_grad():
        expected = plain.visual.ln_post(trail.steps[-1].x)[:, 0] @ plain.visual.proj
        assert torch.allclose(model.encode_image(image), expected, atol=1e-10)
        unit = torch.nn.functional.normalize(expected, dim=-1)
        assert torch.allclose(model.encode_image(image, normalize=True), unit, atol=1e-10)
        assert torch.equal(model.encode_text(words), plain.encode_text(words))
        features, text, _ = model(image, words)[:3]
        assert torch.allclose(features, unit, atol=1e-10)
        assert torch.equal(text, plain(image, words)[1])
    text_hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.named_modules()
        if not name.startswith("visual") and name
    ]
    assert sum(text_hooks) == 0
    vistoken.unwrap(model)
    assert fingerprint(model) == before
    assert torch.equal(model.encode_image(image), plain.encode_image(image))


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_timm_tower(pool: str) -> None:
    settings = {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": {"tok": "token"}.get(pool, pool),
        "timm_proj": "linear",
        "image_size": 224,
    }
    torch.manual_seed(0)
    cfg = {**settings, "layers": 12}
    model = CustomTextCLIP(embed_dim=16, vision_cfg=cfg, text_cfg=dict(TEXT))
    model.visual.trunk.blocks = model.visual.trunk.blocks[:3]
    model, image = model.double().eval(), images(2, 3, 224, 224)
    plain = copy.deepcopy(model)
    vistoken.wrap(model, "tome:r=5")
    assert vistoken.info(model).path == "visual.trunk"
    trail = timm_trail(plain.visual.trunk, image, NaiveToMe(r=5))
    with torch.no_grad():
        expected = plain.visual.head(timm_head(plain.visual.trunk, trail.steps[-1]))
        assert torch.allclose(model.encode_image(image), expected, atol=1e-10)
        assert (model.encode_image(image) - plain.encode_image(image)).abs().max() > 1e-7


def test_blocks_and_towers_that_cannot_be_tapped_are_refused() -> None:
    custom = VisionTransformer(mlp_ratio=2.0, output_dim=16, qk_norm=True, **TOWER)
    resnet = clip(CLIP, layers=(1, 1, 1, 1), width=8, image_size=32)
    for model, words in ((custom, "CustomResidualAttentionBlock"), (resnet, "none among")):
        before = fingerprint(model)
        with pytest.raises(vistoken.UnsupportedBackboneError, match=words):
            vistoken.wrap(model, "tome:r=2")
        assert fingerprint(model) == before


def test_create_model_gives_towers_that_wrap() -> None:
    model = open_clip.create_model("ViT-B-32", pretrained=None).eval()
    image = torch.randn(1, 3, 224, 224)
    vistoken.wrap(model, "evit:keep_rate=0.5")
    with torch.no_grad(), vistoken.trace(model) as trace:
        assert model.encode_image(image).shape == (1, 512)
    assert trace.counts[2:4] == (50, 27) and trace.counts[-1] == 9
