"""Random models, methods, sizes and types: invariants hold, or vistoken says what is wrong."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive import randomise
from torch import Tensor, nn

import vistoken
from vistoken.methods import METHODS

DEPTH = 3
MODELS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "two prefix tokens": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
    "mean": ("vit_base_patch16_gap_224", {}),
    "map": ("vit_base_patch16_siglip_224", {}),
    "rotary": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "rotary mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "post-norm": ("vit_base_patch16_rpn_224", {}),
}
MERGING = (vistoken.ToMe, vistoken.MCTF, vistoken.Pool)
PRUNING = (vistoken.RandomDrop, vistoken.ZeroTPrune)


@functools.cache
def model_of(name: str, dtype: torch.dtype) -> nn.Module:
    entry, more = MODELS[name]
    torch.manual_seed(0)
    tiny = {"embed_dim": 16, "depth": DEPTH, "num_heads": 2, "num_classes": 3, "img_size": 64}
    model = timm.create_model(entry, dynamic_img_size=True, **{**tiny, **more})
    return randomise(model, gain=0.8).to(dtype)


rates = st.floats(0.02, 1.0)
blocks = st.sets(st.integers(0, DEPTH), min_size=1).map(lambda s: tuple(sorted(s)))
numbers = st.integers(0, 40)
rounding = st.sampled_from([1, 1, 4, 8])
lists = st.lists(st.integers(1, 60), min_size=DEPTH - 1, max_size=DEPTH + 1)
methods = st.one_of(
    st.builds(
        vistoken.ToMe,
        r=st.one_of(numbers, st.lists(numbers, max_size=DEPTH + 1)),
        proportional=st.booleans(),
        round_to=rounding,
    ),
    st.builds(vistoken.ToMe, r=numbers, schedule=st.just("decreasing"), round_to=rounding),
    st.builds(vistoken.EViT, keep_rate=rates, at=blocks, fuse=st.booleans(), round_to=rounding),
    st.builds(vistoken.RandomDrop, keep_rate=rates, at=blocks, round_to=rounding),
    st.builds(vistoken.ZeroTPrune, keep_rate=rates, at=blocks, round_to=rounding),
    st.builds(vistoken.ToFu, r=numbers, prune_blocks=st.integers(0, 4), round_to=rounding),
    st.builds(vistoken.MCTF, r=numbers, round_to=rounding),
    st.builds(vistoken.Pool, stride=st.integers(2, 5), at=blocks, proportional=st.booleans()),
    st.builds(vistoken.DiffRate, gflops=st.floats(1e-5, 1e-2), round_to=rounding),
    st.builds(vistoken.DiffRate, schedule=st.tuples(lists, lists), rescale=st.booleans()),
)
grids = st.tuples(st.integers(1, 17), st.integers(1, 17)).filter(lambda g: g[0] * g[1] <= 221)
kinds = st.sampled_from(["float32", "float64", "bfloat16", "float16", "autocast"])
cases = st.fixed_dictionaries(
    {
        "name": st.sampled_from(sorted(MODELS)),
        "method": methods,
        "grid": grids,
        "batch": st.integers(1, 3),
        "kind": kinds,
        "layout": st.sampled_from(["plain", "channels last", "strided", "expanded"]),
        "needs_grad": st.booleans(),
        "fill": st.sampled_from(["nearest", "zeros"]),
        "constant": st.booleans(),
    }
)


def image_of(case: dict, dtype: torch.dtype) -> Tensor:
    """A batch with the wanted memory layout."""
    rows, cols = (16 * side for side in case["grid"])
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    shape = (case["batch"], 3, rows, cols)
    image = torch.zeros(shape) if case["constant"] else torch.randn(shape, generator=generator)
    image = image.to(dtype)
    if case["layout"] == "channels last":
        image = image.to(memory_format=torch.channels_last)
    elif case["layout"] == "strided":
        image = torch.stack([image, image], -1).flatten(-2)[..., ::2]
    elif case["layout"] == "expanded":
        image = image[:1].expand(case["batch"], -1, -1, -1)
    return image.requires_grad_(case["needs_grad"])


def check_blocks(case: dict, trace: vistoken.Trace) -> None:
    """Sizes, counts and source maps of every traced block."""
    method, start = case["method"], trace.start_state.tokens
    prefix = trace.start_state.prefix
    assert start == case["grid"][0] * case["grid"][1] + prefix
    before = start
    for block in trace.blocks:
        parent, origin = block.source_map.parent, block.source_map.origin
        tokens = block.tokens
        assert prefix < tokens <= before
        before = tokens
        assert parent.shape == (case["batch"], start) and origin.shape[1] == tokens
        assert (parent.sort(1).values.diff(dim=1) <= 1).all() and int(parent.max()) == tokens - 1
        slots = torch.arange(tokens).expand_as(origin)
        assert torch.equal(parent.gather(1, origin), slots), "a token moved away from its own cell"
        assert torch.equal(parent[:, :prefix], slots[:, :prefix])
        members = torch.zeros_like(block.size).scatter_add(
            1, parent.clamp_min(0), (parent >= 0).to(block.size.dtype)
        )
        assert (block.size[:, :prefix] == 1).all()
        assert block.size.dtype == torch.float32 and (block.size >= 1).all()
        if isinstance(method, MERGING) and not isinstance(method, vistoken.ToFu):
            assert (block.size.sum(1) == start).all()
            assert torch.equal(block.size, members)
        if isinstance(method, PRUNING):
            assert (block.size == 1).all() and (members == 1).all()


@pytest.mark.slow
@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(cases)
def test_any_call_keeps_the_invariants_or_raises_a_vistoken_error(case: dict) -> None:
    autocast = case["kind"] == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, case["kind"])
    model, image = model_of(case["name"], dtype), image_of(case, dtype)
    try:
        vistoken.wrap(model, case["method"], fill=case["fill"])
    except vistoken.VistokenError as error:
        assert len(str(error)) > 20
        return
    try:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            vistoken.trace(model) as trace,
        ):
            output = model(image)
            features = model.forward_features(image)
        assert torch.isfinite(output).all() and torch.isfinite(features).all()
        assert features.shape[1] == trace.start_state.tokens
        planned = case["method"].plan(vistoken.api.shape_of(model).at(case["grid"]))
        assert trace.counts == planned.kept
        check_blocks(case, trace)
        if case["needs_grad"]:
            output.float().square().sum().backward()
            assert image.grad is not None and torch.isfinite(image.grad).all()
    except vistoken.VistokenError as error:
        assert len(str(error)) > 20
    finally:
        vistoken.unwrap(model)
        model.zero_grad()


@pytest.mark.parametrize("name", METHODS)
def test_same_choice_for_an_image_alone_and_in_a_batch(name: str) -> None:
    given_at = "at=[0,2]" if name in ("evit", "zero_tprune", "random") else "r=5"
    text = {"diffrate": "diffrate:gflops=0.0008", "pool": "pool:at=1"}.get(
        name, f"{name}:{given_at}"
    )
    model = model_of("class token", torch.float64)
    batch = torch.randn(3, 3, 80, 112, dtype=torch.float64)
    vistoken.wrap(model, text)
    try:
        together, alone = [], []
        for images, found in ((batch, together), (batch[1:2], alone)):
            torch.manual_seed(0)
            with torch.no_grad(), vistoken.trace(model) as trace:
                found.append(model(images))
            found.append(trace.source_map.parent)
    finally:
        vistoken.unwrap(model)
    if name == "random":
        assert together[1].shape[1] == alone[1].shape[1]
        return
    assert torch.equal(together[1][1:2], alone[1])
    assert torch.allclose(together[0][1:2], alone[0], atol=1e-10)


@pytest.mark.parametrize("name", ["tome", "tofu", "mctf"])
def test_rounded_merging_never_asks_for_more_than_half(name: str) -> None:
    model = model_of("class token", torch.float32)
    for r in range(1, 12):
        for side in (48, 64, 80):
            vistoken.wrap(model, f"{name}:r={r},round_to=8")
            try:
                with torch.no_grad(), vistoken.trace(model) as trace:
                    model(torch.randn(1, 3, side, side))
            finally:
                vistoken.unwrap(model)
            start = trace.start_state.tokens
            assert all(count % 8 == 0 or count == start for count in trace.counts)


def test_fp16_and_fp32_agree_on_counts_and_sizes() -> None:
    for name in MODELS:
        counts = set()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = vistoken.wrap(model_of(name, dtype), "tome:r=7")
            try:
                with torch.no_grad(), vistoken.trace(model) as trace:
                    model(torch.randn(1, 3, 80, 112, dtype=dtype))
                counts.add(trace.counts)
                assert all((size.sum(1) == trace.start_state.tokens).all() for size in trace.sizes)
            finally:
                vistoken.unwrap(model)
        assert len(counts) == 1
