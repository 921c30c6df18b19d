"""transformers vision encoders against a forward written out in float64; hidden states; masks."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers as hf
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
from torch import Tensor, nn

import vistoken

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 40,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 12,
}
GRID = (5, 5)
METHODS = [
    (vistoken.ToMe(r=4), NaiveToMe(r=4)),
    (vistoken.ToMe(r=4, proportional=False), NaiveToMe(r=4, proportional=False)),
    (vistoken.RandomDrop(keep_rate=0.7, at=(0, 2)), NaiveRandom(rate=0.7, at=(0, 2))),
    (
        vistoken.ZeroTPrune(keep_rate=0.7, at=(0, 1), iterations=(6, 3, 1)),
        NaiveZeroTPrune(rate=0.7, at=(0, 1)),
    ),
]
EVIT = (vistoken.EViT(keep_rate=0.6, at=(0, 2)), NaiveEViT(rate=0.6, at=(0, 2)))


def config(kind: str) -> hf.PreTrainedConfig:
    more = {"layerscale_value": 0.6, "mlp_ratio": 2} if kind.startswith("Dinov2") else {}
    more |= {"num_register_tokens": 4} if "Registers" in kind else {}
    found = getattr(hf, f"{kind}Config")(**{**VISION, **more, "num_labels": 3})
    found._attn_implementation = "sdpa"
    return found


KINDS = {
    "vit": (hf.ViTModel, "ViT"),
    "deit": (hf.DeiTModel, "DeiT"),
    "dinov2": (hf.Dinov2Model, "Dinov2"),
    "dinov2 registers": (hf.Dinov2WithRegistersModel, "Dinov2WithRegisters"),
    "clip": (hf.CLIPVisionModel, "CLIPVision"),
    "siglip": (hf.SiglipVisionModel, "SiglipVision"),
}
PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2 registers": 5, "clip": 1, "siglip": 0}
CLS = {**PREFIX, "dinov2 registers": 1}


def build(kind: str) -> tuple[nn.Module, Tensor]:
    cls, name = KINDS[kind]
    torch.manual_seed(0)
    model = randomise(cls(config(name)).double())
    generator = torch.Generator().manual_seed(2)
    return model, torch.randn(2, 3, 40, 40, generator=generator, dtype=torch.float64)


class Layer:
    """One encoder layer taken apart; `mask` is added at the original tokens."""

    def __init__(self, layer: nn.Module, mask: Tensor | None = None) -> None:
        def first(*names: str) -> nn.Module:
            return next(getattr(layer, n) for n in names if hasattr(layer, n))

        self.mask = mask
        self.norm1 = first("layernorm_before", "layer_norm1", "norm1")
        self.norm2 = first("layernorm_after", "layer_norm2", "norm2")
        self.attn = first("attention", "self_attn")
        self.body = layer.mlp
        self.scale1 = getattr(layer, "layer_scale1", nn.Identity())
        self.scale2 = getattr(layer, "layer_scale2", nn.Identity())

    def attention(self, tokens, bias):
        h, attn = self.norm1(tokens.x), self.attn
        heads = VISION["num_attention_heads"]
        inner = getattr(attn, "attention", None)
        if inner is not None:
            parts, out = (inner.query, inner.key, inner.value), attn.output.dense
        else:
            parts = (attn.q_proj, attn.k_proj, attn.v_proj)
            out = attn.o_proj if hasattr(attn, "o_proj") else attn.out_proj
        q, k, v = (split_heads(part(h), heads) for part in parts)
        if self.mask is not None:
            living = self.mask.gather(1, tokens.origin)[:, None, None]
            bias = living if bias is None else bias + living
        scale = q.shape[-1] ** -0.5
        return self.scale1(out(join_heads(attend(q, k, scale, bias) @ v))), q, k, scale

    def mlp(self, x: Tensor) -> Tensor:
        return self.scale2(self.body(self.norm2(x)))


def layers_of(model: nn.Module) -> nn.ModuleList:
    owner = getattr(model, "encoder", model)
    return next(getattr(owner, n) for n in ("layers", "layer") if hasattr(owner, n))


def trail_of(model: nn.Module, image: Tensor, reducer, mask: Tensor | None = None):
    with torch.no_grad():
        x = model.embeddings(image)
        if hasattr(model, "pre_layrnorm"):
            x = model.pre_layrnorm(x)
        prefix = x.shape[1] - 25
        return run_blocks(x, prefix, [Layer(b, mask) for b in layers_of(model)], reducer)


def last_norm(kind: str, model: nn.Module) -> nn.Module:
    if kind == "clip":
        return nn.Identity()
    return model.post_layernorm if kind == "siglip" else model.layernorm


def pooled(kind: str, model: nn.Module, tokens) -> Tensor | None:
    with torch.no_grad():
        if kind == "clip":
            return model.post_layernorm(tokens.x[:, 0])
        x = last_norm(kind, model)(tokens.x)
        if kind == "siglip":
            return probe(model.head, x, tokens.size)
        pooler = getattr(model, "pooler", None)
        return x[:, 0] if pooler is None else pooler(x)


def probe(head: nn.Module, x: Tensor, size: Tensor) -> Tensor:
    attn, heads = head.attention, head.attention.num_heads
    weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    parts = (head.probe.expand(x.shape[0], -1, -1), x, x)
    q, k, v = (
        split_heads(p @ w.T + b, heads) for p, w, b in zip(parts, weights, biases, strict=True)
    )
    out = join_heads(attend(q, k, q.shape[-1] ** -0.5, size.log()[:, None, None]) @ v)
    out = attn.out_proj(out)
    return (out + head.mlp(head.layernorm(out)))[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_wrap_equals_the_forward_written_out(kind: str) -> None:
    model, image = build(kind)
    plain, before = copy.deepcopy(model), fingerprint(model)
    with torch.no_grad():
        dense = plain(image)
    methods = METHODS if kind == "siglip" else [*METHODS, EVIT]
    for method, reducer in methods:
        reducer = copy.copy(reducer)
        reducer.cls = CLS[kind]
        vistoken.wrap(model, method)
        torch.manual_seed(5)
        with torch.no_grad(), vistoken.trace(model) as trace:
            found = model(image)
        torch.manual_seed(5)
        trail = trail_of(plain, image, reducer)
        last = trail.steps[-1]
        assert trace.counts == trail.counts and last.prefix == PREFIX[kind]
        with torch.no_grad():
            expected = last.unmerged(last_norm(kind, plain)(last.x), GRID)
        assert (found.last_hidden_state - expected).abs().max() < 1e-10, method
        assert (found.pooler_output - pooled(kind, plain, last)).abs().max() < 1e-10, method
        assert (found.pooler_output - dense.pooler_output).abs().max() > 1e-8, method
        as_tuple = model(image, return_dict=False)
        if not isinstance(method, vistoken.RandomDrop):
            assert torch.allclose(as_tuple[0], expected, atol=1e-10)
        vistoken.unwrap(model)
    assert fingerprint(model) == before
    assert torch.equal(model(image).last_hidden_state, dense.last_hidden_state)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_reduction_is_bit_identical(kind: str) -> None:
    model, image = build(kind)
    dense = model(image, output_hidden_states=True)
    for method in ("tome:r=0", "random:keep_rate=1.0", "zero_tprune:keep_rate=1.0"):
        vistoken.wrap(model, method)
        found = model(image, output_hidden_states=True)
        vistoken.unwrap(model)
        assert torch.equal(found.last_hidden_state, dense.last_hidden_state)
        assert torch.equal(found.pooler_output, dense.pooler_output)
        assert len(found.hidden_states) == len(dense.hidden_states) == 4
        for a, b in zip(found.hidden_states, dense.hidden_states, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("fill", ["nearest", "zeros"])
@pytest.mark.parametrize("recorded_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_on_the_full_grid(kind: str, recorded_first: bool, fill: str) -> None:
    model, image = build(kind)
    plain = copy.deepcopy(model)
    if recorded_first:
        model(image, output_hidden_states=True)
    vistoken.wrap(model, vistoken.RandomDrop(keep_rate=0.7, at=(0, 2)), fill=fill)
    torch.manual_seed(5)
    with torch.no_grad():
        found = model(image, output_hidden_states=True)
    torch.manual_seed(5)
    trail = trail_of(plain, image, NaiveRandom(rate=0.7, at=(0, 2)))
    dense = plain(image, output_hidden_states=True)
    tied = torch.equal(dense.hidden_states[-1], dense.last_hidden_state)
    assert len(found.hidden_states) == 4
    for index, step in enumerate(trail.steps):
        y = step.x
        if index == 3 and tied:
            with torch.no_grad():
                y = last_norm(kind, plain)(y)
        expected = step.unmerged(y, GRID, fill)
        assert torch.allclose(found.hidden_states[index], expected, atol=1e-10), index


def test_attention_masks_follow_the_tokens() -> None:
    for kind in ("vit", "deit", "dinov2", "dinov2 registers"):
        model, image = build(kind)
        if "attention_mask" not in inspect.signature(type(model).forward).parameters:
            continue
        plain = copy.deepcopy(model)
        total = 25 + PREFIX[kind]
        seen = torch.ones(2, total, dtype=torch.long)
        seen[0, -6:] = 0
        seen[1, 9:12] = 0
        added = torch.zeros(2, total, dtype=torch.float64).masked_fill(seen == 0, float("-inf"))
        for method, reducer in METHODS[:1] + METHODS[2:3]:
            vistoken.wrap(model, method)
            torch.manual_seed(5)
            with torch.no_grad():
                found = model(image, attention_mask=seen)
            torch.manual_seed(5)
            last = trail_of(plain, image, reducer, added).steps[-1]
            with torch.no_grad():
                expected = plain.layernorm(last.x)[:, 0]
            assert (found.last_hidden_state[:, 0] - expected).abs().max() < 1e-10, (kind, method)
            unmasked = model(image).last_hidden_state[:, 0]
            assert (found.last_hidden_state[:, 0] - unmasked).abs().max() > 1e-8
            vistoken.unwrap(model)


@pytest.mark.parametrize("kind", KINDS)
def test_unfused_attention_is_refused_with_advice(kind: str) -> None:
    model, image = build(kind)
    model.set_attn_implementation("eager")
    before = fingerprint(model)
    with pytest.raises(vistoken.UnsupportedBackboneError, match="attn_implementation='sdpa'"):
        vistoken.wrap(model, "tome:r=2")
    assert fingerprint(model) == before
    model.set_attn_implementation("sdpa")
    vistoken.wrap(model, "tome:r=2")
    model.set_attn_implementation("eager")
    with pytest.raises(vistoken.TapError, match="sdpa"):
        model(image)


CLASSIFIERS = {
    "vit": (hf.ViTForImageClassification, "ViT"),
    "deit": (hf.DeiTForImageClassification, "DeiT"),
    "deit distilled": (hf.DeiTForImageClassificationWithTeacher, "DeiT"),
    "dinov2": (hf.Dinov2ForImageClassification, "Dinov2"),
    "dinov2 registers": (hf.Dinov2WithRegistersForImageClassification, "Dinov2WithRegisters"),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers(kind: str) -> None:
    cls, name = CLASSIFIERS[kind]
    torch.manual_seed(0)
    model = randomise(cls(config(name)).double())
    image = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    plain = copy.deepcopy(model)
    core = getattr(plain, plain.base_model_prefix)
    vistoken.wrap(model, "tome:r=4")
    last = trail_of(core, image, NaiveToMe(r=4)).steps[-1]
    with torch.no_grad():
        tokens = last.unmerged(core.layernorm(last.x), GRID)
        if "dinov2" in kind:
            mean = tokens[:, last.prefix :].mean(1)
            expected = plain.classifier(torch.cat([tokens[:, 0], mean], 1))
        elif kind == "deit distilled":
            expected = plain.cls_classifier(tokens[:, 0])
            expected = (expected + plain.distillation_classifier(tokens[:, 1])) / 2
        else:
            expected = plain.classifier(tokens[:, 0])
        found = model(image).logits
        assert torch.allclose(found, expected, atol=1e-10)
        states = model(image, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [last.parent.shape[1]] * 4


def siglip_config() -> hf.SiglipConfig:
    return hf.SiglipConfig(
        vision_config={**VISION, "attn_implementation": "sdpa"},
        text_config={**TEXT, "projection_size": 32},
        num_labels=3,
    )


def test_siglip_classifier_averages_the_full_grid() -> None:
    torch.manual_seed(0)
    model = randomise(hf.SiglipForImageClassification(siglip_config()).double())
    image = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    plain = copy.deepcopy(model)
    vistoken.wrap(model, "tome:r=4")
    core = plain.vision_model
    last = trail_of(core, image, NaiveToMe(r=4)).steps[-1]
    with torch.no_grad():
        x = core.post_layernorm(last.x)
        mean = (last.size[..., None] * x).sum(1) / last.size.sum(1, keepdim=True)
        assert torch.allclose(model(image).logits, plain.classifier(mean), atol=1e-10)


def features(found: object) -> Tensor:
    """`get_image_features` returns a tensor or an output object, by release."""
    return found if isinstance(found, Tensor) else found.pooler_output


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_image_features_of_two_tower_models(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "clip":
        both = hf.CLIPConfig(
            vision_config=VISION,
            text_config={**TEXT, "eos_token_id": 59, "bos_token_id": 58},
            projection_dim=16,
        )
        model = hf.CLIPModel(both)
    else:
        model = hf.SiglipModel(siglip_config())
    model = randomise(model.double())
    plain, before = copy.deepcopy(model), fingerprint(model)
    image = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    words = torch.randint(3, 50, (2, 12))
    words[:, -1] = 59
    vistoken.wrap(model, "tome:r=4")
    assert vistoken.info(model).path == "vision_model"
    core = plain.vision_model
    expected = pooled(kind, core, trail_of(core, image, NaiveToMe(r=4)).steps[-1])
    with torch.no_grad():
        if kind == "clip":
            expected = plain.visual_projection(expected)
        assert torch.allclose(features(model.get_image_features(image)), expected, atol=1e-10)
        text = features(model.get_text_features(words))
        assert torch.equal(text, features(plain.get_text_features(words)))
        joint = model(input_ids=words, pixel_values=image).image_embeds
        unit = torch.nn.functional.normalize(expected, dim=-1)
        assert torch.allclose(joint, unit, atol=1e-10)
    vistoken.unwrap(model)
    assert fingerprint(model) == before


def test_odd_grids_interpolate_positions() -> None:
    for kind in ("vit", "clip", "siglip", "dinov2"):
        model, _ = build(kind)
        vistoken.wrap(model, "tome:r=4")
        image = torch.randn(1, 3, 56, 88, dtype=torch.float64)
        more = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
        with torch.no_grad(), vistoken.trace(model) as trace:
            found = model(image, **more)
        assert trace.source_map.grid == (7, 11)
        assert trace.counts[-1] == 77 + PREFIX[kind] - 12
        assert found.last_hidden_state.shape[1] == 77 + PREFIX[kind]
