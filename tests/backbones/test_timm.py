"""timm backbones: reduced outputs against a forward written out in float64, dense outputs, undo."""

from __future__ import annotations

import copy
import inspect

import pytest
import timm
import torch
from naive import NaiveEViT, NaiveRandom, NaiveToMe, NaiveZeroTPrune, fingerprint, randomise
from naive_timm import timm_head, timm_trail
from torch import nn

import vistoken
from vistoken.api import shape_of

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
DYNAMIC = {"dynamic_img_size": True, "img_size": 64}

# name, settings, image size; 13 x 17 grids where the model takes any size
MODELS = {
    "deit": ("deit_tiny_patch16_224", DYNAMIC, (13 * 16, 17 * 16)),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {"img_size": (80, 112)}, (80, 112)),
    "deit3 layer scale": ("deit3_small_patch16_224", {"img_size": (80, 112)}, (80, 112)),
    "augreg": ("vit_tiny_patch16_224.augreg_in21k", DYNAMIC, (5 * 16, 7 * 16)),
    "mae-like mean": (
        "vit_base_patch16_224.mae",
        {**DYNAMIC, "global_pool": "avg"},
        (5 * 16, 7 * 16),
    ),
    "mean without class token": ("vit_base_patch16_gap_224", {"img_size": 96}, (96, 96)),
    "mean with prefix": (
        "vit_tiny_patch16_224",
        {"img_size": 96, "global_pool": "avg", "pool_include_prefix": True},
        (96, 96),
    ),
    "clip norm_pre": ("vit_base_patch32_clip_224", {"img_size": 192}, (192, 192)),
    "dinov2": ("vit_small_patch14_dinov2", {**DYNAMIC, "img_size": 70}, (7 * 14, 5 * 14)),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 84}, (84, 84)),
    "qk norm": ("vit_tiny_patch16_224", {"img_size": 96, "qk_norm": True}, (96, 96)),
    "siglip map": ("vit_base_patch16_siglip_224", {"img_size": (80, 112)}, (80, 112)),
    "post-norm": ("vit_base_patch16_rpn_224", {"img_size": 96}, (96, 96)),
    "eva02": ("eva02_tiny_patch14_224", {**DYNAMIC, "img_size": 70}, (5 * 14, 7 * 14)),
    "eva absolute": ("eva_giant_patch14_224", {"img_size": 84}, (84, 84)),
    "eva02 split qkv": ("eva02_base_patch16_clip_224", {"img_size": 96}, (96, 96)),
    "eva post-norm": ("eva02_enormous_patch14_clip_224", {"img_size": 84}, (84, 84)),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", DYNAMIC, (13 * 16, 17 * 16)),
    "rope registers mean": (
        "vit_medium_patch16_rope_reg1_gap_256",
        {"img_size": (80, 112)},
        (80, 112),
    ),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 96}, (96, 96)),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {"img_size": 96}, (96, 96)),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A tiny random float64 model of `MODELS` and a batch of two images for it."""
    entry, settings, size = MODELS[name]
    model = timm.create_model(entry, **{**TINY, **settings}).double()
    # Attention after a norm would saturate at the gain that others need.
    randomise(model, seed, 0.7 if "post-norm" in name else 1.6)
    generator = torch.Generator().manual_seed(seed)
    return model, torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)


def pairs(cls: int, patches: int) -> list[tuple[vistoken.Method, object]]:
    """Methods of the package with the same rule written out."""
    r = patches // 6
    found = [
        (vistoken.ToMe(r=r), NaiveToMe(r=r)),
        (vistoken.ToMe(r=r, proportional=False), NaiveToMe(r=r, proportional=False)),
        (vistoken.RandomDrop(keep_rate=0.7, at=(0, 1, 2)), NaiveRandom(rate=0.7)),
        (
            vistoken.ZeroTPrune(keep_rate=0.7, at=(0, 2), iterations=(6, 3, 1)),
            NaiveZeroTPrune(rate=0.7, at=(0, 2)),
        ),
    ]
    if cls:
        found += [
            (vistoken.EViT(keep_rate=0.6, at=(0, 2)), NaiveEViT(rate=0.6, at=(0, 2), fuse=True)),
            (
                vistoken.EViT(keep_rate=0.6, at=(1,), fuse=False),
                NaiveEViT(rate=0.6, at=(1,), fuse=False),
            ),
        ]
    return found


def dense_output(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The plain model's output; skips where this timm release cannot run the model in float64."""
    try:
        with torch.no_grad():
            return model(image)
    except RuntimeError as error:
        if "Double but found Float" in str(error):
            pytest.skip("this timm release has no float64 tables")
        raise


@pytest.mark.parametrize("name", MODELS)
def test_wrap_equals_the_forward_written_out(name: str) -> None:
    model, image = build(name)
    plain = copy.deepcopy(model)
    dense = dense_output(plain, image)
    whole = timm_trail(plain, image, NaiveToMe(r=0)).steps[-1]
    assert torch.allclose(dense, timm_head(plain, whole), atol=1e-10), "the reference is wrong"
    shape = shape_of(model)
    for method, reducer in pairs(shape.cls, whole.x.shape[1] - whole.prefix):
        reducer.cls = shape.cls
        vistoken.wrap(model, method)
        torch.manual_seed(5)
        with torch.no_grad(), vistoken.trace(model) as trace:
            reduced = model(image)
        torch.manual_seed(5)
        trail = timm_trail(plain, image, reducer)
        assert trace.counts == trail.counts, method
        error = (reduced - timm_head(plain, trail.steps[-1])).abs().max().item()
        assert error < 1e-10, f"{method}: {error}"
        assert (reduced - dense).abs().max() > 1e-6, f"{method} changed nothing"
        for block, step in zip(trace.blocks, trail.steps[1:], strict=True):
            assert torch.equal(block.source_map.parent, step.parent)
            assert torch.equal(block.source_map.origin, step.origin)
            assert torch.allclose(block.size.double(), step.size)
        vistoken.unwrap(model)
    assert torch.equal(dense_output(model, image), dense)


@pytest.mark.parametrize("name", MODELS)
def test_zero_reduction_is_bit_identical(name: str) -> None:
    model, image = build(name)
    dense = dense_output(model, image)
    idle = [
        vistoken.ToMe(r=0),
        vistoken.RandomDrop(keep_rate=1.0),
        vistoken.ZeroTPrune(keep_rate=1.0),
    ]
    if shape_of(model).cls:
        idle.append(vistoken.EViT(keep_rate=1.0))
    for method in idle:
        vistoken.wrap(model, method)
        assert torch.equal(dense_output(model, image), dense), method
        vistoken.unwrap(model)


@pytest.mark.parametrize("name", MODELS)
def test_unwrap_leaves_nothing_behind(name: str) -> None:
    model, image = build(name)
    dense, before = dense_output(model, image), fingerprint(model)
    method = vistoken.ToMe(r=4)
    keys = list(model.state_dict())
    assert vistoken.wrap(model, method) is model
    assert list(model.state_dict()) == keys
    assert fingerprint(model) != before
    model(image)
    model.forward_features(image)
    assert list(model.state_dict()) == keys
    assert vistoken.unwrap(model) is model
    assert fingerprint(model) == before
    assert torch.equal(dense_output(model, image), dense)


def test_second_wrap_and_second_unwrap_are_refused() -> None:
    model, image = build("augreg")
    with pytest.raises(vistoken.NotWrappedError, match="carries no vistoken method"):
        vistoken.unwrap(model)
    vistoken.wrap(model, "tome:r=2")
    before, reduced = fingerprint(model), dense_output(model, image)
    with pytest.raises(vistoken.AlreadyWrappedError, match="tome:r=2"):
        vistoken.wrap(model, "random")
    with pytest.raises(vistoken.AlreadyWrappedError):
        vistoken.wrap(nn.Sequential(model), "random")
    assert fingerprint(model) == before
    assert torch.equal(dense_output(model, image), reduced)
    vistoken.unwrap(model)
    with pytest.raises(vistoken.NotWrappedError):
        vistoken.unwrap(model)
    outer = nn.Sequential(model)
    vistoken.wrap(outer, "tome:r=2")
    with pytest.raises(vistoken.AlreadyWrappedError):
        vistoken.wrap(model, "tome:r=2")


def test_methods_that_need_a_class_token_say_so() -> None:
    model, _ = build("siglip map")
    before = fingerprint(model)
    for method in ("evit", "diffrate:gflops=0.01"):
        with pytest.raises(vistoken.UnsupportedMethodError, match="no class token"):
            vistoken.wrap(model, method)
    with pytest.raises(vistoken.ScheduleError, match="blocks 0 to 2"):
        vistoken.wrap(model, "pool:at=5")
    assert fingerprint(model) == before


def test_schedule_follows_the_image_size() -> None:
    model, _ = build("deit")
    vistoken.wrap(model, vistoken.Pool(at=(1,)))
    for size, counts in (
        ((208, 272), (222, 64, 64)),
        ((64, 64), (17, 5, 5)),
        ((80, 48), (16, 7, 7)),
    ):
        with torch.no_grad(), vistoken.trace(model) as trace:
            model(torch.zeros(1, 3, *size, dtype=torch.float64))
        assert trace.counts == counts
        assert trace.source_map.grid == (size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("name", ["augreg", "eva02", "siglip map"])
def test_attention_masks_follow_the_tokens(name: str, boolean: bool) -> None:
    model, image = build(name)
    if "attn_mask" not in inspect.signature(type(model).forward).parameters:
        pytest.skip("this timm release takes no mask")
    plain = copy.deepcopy(model)
    total = shape_of(model).at((5, 7)).tokens
    generator = torch.Generator().manual_seed(1)
    added = torch.randn(total, total, generator=generator, dtype=torch.float64)
    if boolean:
        seen = added > -0.7
        seen.fill_diagonal_(True)
        added = torch.zeros_like(added).masked_fill(~seen, float("-inf"))
    for method, reducer in (
        (vistoken.ToMe(r=5), NaiveToMe(r=5)),
        (vistoken.RandomDrop(keep_rate=0.7, at=(0, 1)), NaiveRandom(rate=0.7, at=(0, 1))),
    ):
        vistoken.wrap(model, method)
        torch.manual_seed(5)
        with torch.no_grad():
            found = model(image, attn_mask=seen if boolean else added)
        torch.manual_seed(5)
        expected = timm_head(plain, timm_trail(plain, image, reducer, added).steps[-1])
        assert (found - expected).abs().max() < 1e-10
        with pytest.raises(vistoken.TapError, match="causal"):
            model(image, is_causal=True)
        vistoken.unwrap(model)


# Dense outputs ------------------------------------------------------------------------------------

DENSE = ("augreg", "dinov2 registers", "siglip map", "eva02", "post-norm")


def dense_case(name: str, fill: str):
    """A model wrapped with a method that merges or prunes, the image, and the trail written out."""
    model, image = build(name)
    plain = copy.deepcopy(model)
    dense_output(plain, image)
    shape = shape_of(model)
    if fill == "zeros":
        method, reducer = (
            vistoken.RandomDrop(keep_rate=0.6, at=(0, 2)),
            NaiveRandom(rate=0.6, at=(0, 2)),
        )
    else:
        method, reducer = vistoken.ToMe(r=5), NaiveToMe(r=5)
        if shape.cls:
            method = vistoken.EViT(keep_rate=0.6, at=(0, 2), fuse=False)
            reducer = NaiveEViT(rate=0.6, at=(0, 2), fuse=False, cls=shape.cls)
    vistoken.wrap(model, method, fill=fill)
    torch.manual_seed(9)
    trail = timm_trail(plain, image, reducer)
    rows, cols = plain.patch_embed.dynamic_feat_size(image.shape[-2:])
    return model, plain, image, trail, (rows, cols)


@pytest.mark.parametrize("fill", ["nearest", "zeros"])
@pytest.mark.parametrize("name", DENSE)
def test_forward_features_is_on_the_full_grid(name: str, fill: str) -> None:
    model, plain, image, trail, grid = dense_case(name, fill)
    torch.manual_seed(9)
    with torch.no_grad():
        features = model.forward_features(image)
        last = trail.steps[-1]
        expected = last.unmerged(plain.norm(last.x), grid, fill)
    assert torch.allclose(features, expected, atol=1e-10)
    assert (features == 0).all(-1).any() == (fill == "zeros")


@pytest.mark.parametrize("fill", ["nearest", "zeros"])
@pytest.mark.parametrize("name", DENSE)
def test_forward_intermediates_are_on_the_full_grid(name: str, fill: str) -> None:
    model, plain, image, trail, grid = dense_case(name, fill)
    prefix = trail.steps[0].prefix

    def expected(block: int, norm: bool, fmt: str):
        step = trail.steps[block + 1]
        y = plain.norm(step.x) if norm else step.x
        full = step.unmerged(y, grid, fill)
        patches = full[:, prefix:]
        if fmt == "NCHW":
            patches = patches.transpose(1, 2).reshape(2, -1, *grid)
        return patches, full[:, :prefix]

    cases = [
        (None, [0, 1, 2]),
        (2, [1, 2]),
        ([0, 2], [0, 2]),
        ([-1], [2]),
        ((-3, 1), [0, 1]),
        ([1, 0], [0, 1]),
    ]
    with torch.no_grad():
        for indices, blocks in cases:
            for norm, fmt, stop in ((False, "NCHW", True), (True, "NLC", False)):
                options = {"norm": norm, "output_fmt": fmt, "stop_early": stop}
                torch.manual_seed(9)
                listed = model.forward_intermediates(
                    image, indices, intermediates_only=True, **options
                )
                assert len(listed) == len(blocks)
                for y, block in zip(listed, blocks, strict=True):
                    assert torch.allclose(y, expected(block, norm, fmt)[0], atol=1e-10)
                if not prefix:
                    continue
                torch.manual_seed(9)
                final, both = model.forward_intermediates(
                    image, indices, return_prefix_tokens=True, **options
                )
                for (y, first), block in zip(both, blocks, strict=True):
                    assert torch.allclose(y, expected(block, norm, fmt)[0], atol=1e-10)
                    assert torch.allclose(first, expected(block, norm, fmt)[1], atol=1e-10)
                step = trail.steps[blocks[-1] + 1 if stop else 3]
                whole = step.unmerged(plain.norm(step.x), grid, fill)
                assert torch.allclose(final, whole, atol=1e-10)


def test_forward_intermediates_as_dict_and_get_intermediate_layers() -> None:
    model, plain, image, trail, grid = dense_case("dinov2 registers", "nearest")
    prefix = trail.steps[0].prefix
    assert prefix == 5
    full = [step.unmerged(step.x, grid) for step in trail.steps[1:]]
    with torch.no_grad():
        found = model.forward_intermediates(
            image, 2, output_dict=True, return_prefix_tokens=True, output_fmt="NLC"
        )
        last = trail.steps[-1]
        whole = last.unmerged(plain.norm(last.x), grid)
        assert torch.allclose(found["image_features"], whole, atol=1e-10)
        for position, block in enumerate((1, 2)):
            y, first = full[block][:, prefix:], full[block][:, :prefix]
            assert torch.allclose(found["image_intermediates"][position], y, atol=1e-10)
            assert torch.allclose(found["image_intermediates_prefix"][position], first, atol=1e-10)
        (only,) = model.get_intermediate_layers(image, 1, reshape=True)
        expected = full[2][:, prefix:].transpose(1, 2).reshape(2, -1, *grid)
        assert torch.allclose(only, expected, atol=1e-10)
        ((y, first),) = model.get_intermediate_layers(
            image, [1], return_prefix_tokens=True, norm=True
        )
        normed = trail.steps[2].unmerged(plain.norm(trail.steps[2].x), grid)
        assert torch.allclose(y, normed[:, prefix:], atol=1e-10)
        assert torch.allclose(first, normed[:, :prefix], atol=1e-10)


@pytest.mark.parametrize("pool", ["avg", "avgmax", "max", "token", ""])
def test_head_follows_reset_classifier_after_wrap(pool: str) -> None:
    model = randomise(timm.create_model("vit_tiny_patch16_224", img_size=64, **TINY).double())
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    early, late = copy.deepcopy(model), model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        early.reset_classifier(5, pool)
        vistoken.wrap(early, "tome:r=3")
        vistoken.wrap(late, "tome:r=3")
        torch.manual_seed(0)
        late.reset_classifier(5, pool)
    with torch.no_grad():
        assert torch.equal(early(image), late(image))
