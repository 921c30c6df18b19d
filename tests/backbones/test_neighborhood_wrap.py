"""Neighborhood attention inside pretrained ViTs, against the host with attention written out.

The reference runs the untouched host and answers its fused attention calls from loops over queries.
"""

from __future__ import annotations

import copy
import pickle

import open_clip
import pytest
import timm
import torch
import transformers as hf
from naive import fingerprint, randomise
from naive_neighborhood import axis_keys
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

import vistoken
from vistoken.methods import ATTENTIONS, METHODS

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
TOWER = {"image_size": (40, 56), "patch_size": 8, "width": 32, "layers": 3, "heads": 4}
HF = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 40,
    "patch_size": 8,
}


def timm_model(name: str, **settings) -> nn.Module:
    return timm.create_model(name, **{**TINY, **settings})


def hf_model(cls: str, **settings) -> nn.Module:
    found = getattr(hf, f"{cls.removesuffix('Model')}Config")(**{**HF, **settings})
    found._attn_implementation = "sdpa"
    return getattr(hf, cls)(found)


# how to build it, image size, patch grid, prefix tokens
HOSTS = {
    "deit": (lambda: timm_model("deit_tiny_patch16_224", img_size=80), (80, 80), (5, 5), 1),
    "distilled": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=(80, 112)),
        (80, 112),
        (5, 7),
        2,
    ),
    "registers, any size": (
        lambda: timm_model("vit_small_patch14_reg4_dinov2", img_size=98, dynamic_img_size=True),
        (70, 98),
        (5, 7),
        5,
    ),
    "siglip": (
        lambda: timm_model("vit_base_patch16_siglip_224", img_size=(80, 112)),
        (80, 112),
        (5, 7),
        0,
    ),
    "qk norm": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=80, qk_norm=True),
        (80, 80),
        (5, 5),
        1,
    ),
    "eva02 rope": (lambda: timm_model("eva02_tiny_patch14_224", img_size=70), (70, 70), (5, 5), 1),
    "open_clip": (
        lambda: VisionTransformer(mlp_ratio=2.0, output_dim=16, **TOWER),
        (40, 56),
        (5, 7),
        1,
    ),
    "transformers vit": (lambda: hf_model("ViTModel"), (40, 40), (5, 5), 1),
    "transformers dinov2 registers": (
        lambda: hf_model("Dinov2WithRegistersModel", num_register_tokens=4, mlp_ratio=2),
        (40, 40),
        (5, 5),
        5,
    ),
    "transformers clip": (lambda: hf_model("CLIPVisionModel"), (40, 40), (5, 5), 1),
    "transformers siglip": (lambda: hf_model("SiglipVisionModel"), (40, 40), (5, 5), 0),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, size, _, _ = HOSTS[name]
    torch.manual_seed(0)
    model = randomise(make().double()).eval()
    generator = torch.Generator().manual_seed(1)
    return model, torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)


def tokens_of(output) -> Tensor:
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output


def allowed(grid, prefix: int, window, dilation: int, stride) -> Tensor:
    """Which token attends to which, `[N, N]`: windows between patches, everything for the rest."""
    patches = grid[0] * grid[1]
    mask = torch.ones(prefix + patches, prefix + patches, dtype=torch.bool)
    mask[prefix:, prefix:] = False
    for x in range(grid[0]):
        for y in range(grid[1]):
            for a in axis_keys(grid[0], x, window[0], stride[0], dilation):
                for b in axis_keys(grid[1], y, window[1], stride[1], dilation):
                    mask[prefix + x * grid[1] + y, prefix + a * grid[1] + b] = True
    return mask


class Reference:
    """Stands in for fused attention: the n-th call is the n-th block's."""

    def __init__(self, masks: dict[int, Tensor]) -> None:
        self.masks = masks
        self.calls = 0

    def __call__(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        scores = q @ k.transpose(-2, -1) * scale
        if attn_mask is not None:
            scores = scores + attn_mask
        if self.calls in self.masks:
            scores = scores.masked_fill(~self.masks[self.calls], float("-inf"))
        self.calls += 1
        return scores.softmax(-1) @ v


def expected(name: str, model: nn.Module, image: Tensor, method) -> Tensor:
    _, _, grid, prefix = HOSTS[name]
    rows = method.window if isinstance(method.window, tuple) else (method.window,) * 2
    stride = method.stride if isinstance(method.stride, tuple) else (method.stride,) * 2
    blocks = range(3) if method.blocks is None else method.blocks
    each = method.dilation if isinstance(method.dilation, tuple) else (method.dilation,)
    masks = {
        block: allowed(grid, prefix, rows, each[place % len(each)], stride)
        for place, block in enumerate(blocks)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", Reference(masks))
        # With gradients nn.MultiheadAttention takes its open path, which calls fused attention.
        return tokens_of(model(image))


CASES = [
    vistoken.NeighborhoodAttention(window=3),
    vistoken.NeighborhoodAttention(window=(3, 4), blocks=[0, 2]),
    vistoken.NeighborhoodAttention(window=2, dilation=[1, 2]),
    vistoken.NeighborhoodAttention(window=3, stride=2, blocks=1),
]


@pytest.mark.parametrize("name", HOSTS)
def test_wrap_equals_attention_written_out(name: str) -> None:
    model, image = build(name)
    plain = copy.deepcopy(model)
    dense = tokens_of(plain(image))
    before = fingerprint(model)
    for method in CASES:
        wanted = expected(name, plain, image, method)
        assert (wanted - dense).abs().max() > 1e-4, "the case changes nothing"
        vistoken.wrap(model, method)
        found = tokens_of(model(image))
        assert torch.allclose(found, wanted, atol=1e-10), method
        with torch.no_grad():
            assert torch.allclose(tokens_of(model(image)), wanted, atol=1e-10), method
        vistoken.unwrap(model)
    assert fingerprint(model) == before
    assert torch.equal(tokens_of(model(image)), dense)


@pytest.mark.parametrize("name", HOSTS)
def test_a_window_as_large_as_the_grid_changes_nothing(name: str) -> None:
    model, image = build(name)
    dense = tokens_of(model(image))
    vistoken.wrap(model, vistoken.NeighborhoodAttention(window=HOSTS[name][2]))
    assert torch.allclose(tokens_of(model(image)), dense, atol=1e-12)


def test_gradients_and_checkpointing() -> None:
    model, image = build("distilled")
    method = CASES[1]
    plain = copy.deepcopy(model)
    weight = torch.randn(2, 7, dtype=torch.float64)
    (expected("distilled", plain, image, method) * weight).sum().backward()
    vistoken.wrap(model, method)
    for recompute in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        (model(image) * weight).sum().backward()
        for (key, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-10), key


def test_other_image_sizes_while_running() -> None:
    model, image = build("registers, any size")
    wanted = expected("registers, any size", model, image, CASES[0])
    vistoken.wrap(model, CASES[0])
    assert torch.allclose(model(image), wanted, atol=1e-10)
    with pytest.raises(vistoken.ScheduleError, match="patch grid has 2 x 4"):
        model(image[..., :28, :56])
    assert model(image).shape == (2, 7)


@pytest.mark.parametrize("name", ["deit", "open_clip", "transformers dinov2 registers"])
def test_half_precision_and_autocast(name: str) -> None:
    model, image = build(name)
    wanted = expected(name, model, image, CASES[0]).detach()
    dense = tokens_of(model(image)).detach()
    vistoken.wrap(model, CASES[0])

    def off(found: Tensor) -> float:
        return float((found.double() - wanted).norm() / (dense - wanted).norm())

    with torch.no_grad():
        model.float()
        assert off(tokens_of(model(image.float()))) < 1e-4
        with torch.autocast("cpu", torch.bfloat16):
            assert off(tokens_of(model(image.float()))) < 0.5
        model.bfloat16()
        assert off(tokens_of(model(image.bfloat16()))) < 0.5


def test_autocast_with_normed_queries() -> None:
    """Norms leave queries and keys in float32 under autocast, values come in bfloat16."""
    model, image = build("qk norm")
    vistoken.wrap(model.float(), CASES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(image.float()).isfinite().all()


@pytest.mark.parametrize("name", ["deit", "eva02 rope", "open_clip"])
def test_compiles_without_graph_break(name: str) -> None:
    model, image = build(name)
    vistoken.wrap(model, CASES[1])
    with torch.no_grad():
        eager = model(image)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(image), eager, atol=1e-10)


def test_exports() -> None:
    model, image = build("deit")
    vistoken.wrap(model, CASES[0])
    with torch.no_grad():
        program = torch.export.export(model, (image,))
        assert torch.allclose(program.module()(image), model(image), atol=1e-10)


def test_copies_and_pickles() -> None:
    model, image = build("deit")
    vistoken.wrap(model, CASES[0])
    wanted = model(image)
    assert torch.equal(copy.deepcopy(model)(image), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(image), wanted)


def test_found_inside_clip() -> None:
    torch.manual_seed(0)
    clip = open_clip.CLIP(
        16,
        {"image_size": 40, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8},
        {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
    )
    image, text = torch.randn(2, 3, 40, 40), torch.randint(50, (2, 8))
    before, words = clip.encode_image(image), clip.encode_text(text)
    vistoken.wrap(clip, "na:window=3")
    assert not torch.allclose(clip.encode_image(image), before, atol=1e-3)
    assert torch.equal(clip.encode_text(text), words)


def test_info_and_cost() -> None:
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=518)
    dense = vistoken.flops(model)
    vistoken.wrap(model, "na:window=13,blocks=[0,1,3,4,6,7,9,10],dilation=[1,2]")
    info = vistoken.info(model)
    assert info.method == "na:window=13,dilation=[1,2],blocks=[0,1,3,4,6,7,9,10]"
    assert info.sparse == (0, 1, 3, 4, 6, 7, 9, 10)
    assert "blocks 0, 1, 3, 4, 6, 7, 9, 10 of 12" in str(info)
    assert "na replaces attention" in info.execution
    patches, prefix, width = 37 * 37, 5, 384
    tokens = patches + prefix
    pairs = patches * (13 * 13 + prefix) + prefix * tokens
    saved = 8 * 2 * width * (tokens**2 - pairs) / 1e9
    assert info.gflops == pytest.approx(dense - saved, rel=1e-12) == vistoken.flops(model)
    assert info.dense_gflops == pytest.approx(dense)
    assert vistoken.flops(vistoken.unwrap(model), "na:window=37") == pytest.approx(dense)
    with pytest.raises(vistoken.ScheduleError, match="blocks=\\[12\\] do not exist"):
        vistoken.flops(model, "na:window=3,blocks=12")


def test_a_budget_finds_the_widest_window() -> None:
    model = timm.create_model("vit_small_patch14_dinov2", img_size=518)
    shape, dense = vistoken.api.shape_of(model), vistoken.flops(model)
    method = vistoken.NeighborhoodAttention.at_gflops(shape, 0.7 * dense)
    assert method.cost(shape) <= 0.7 * dense
    assert vistoken.NeighborhoodAttention(window=method.window + 1).cost(shape) > 0.7 * dense
    with pytest.raises(vistoken.ScheduleError, match="out of reach"):
        vistoken.NeighborhoodAttention.at_gflops(shape, 0.1 * dense)


def test_trace_sees_all_tokens() -> None:
    model, image = build("distilled")
    vistoken.wrap(model, CASES[0])
    with vistoken.trace(model) as trace:
        model(image)
    assert trace.counts == (37,) * 3 and trace.assignments == (None,) * 3


@pytest.mark.parametrize("method", CASES, ids=str)
def test_string_form_reads_back(method) -> None:
    assert vistoken.parse(method.to_string()) == method


def test_it_is_listed_apart_from_the_methods_that_reduce_tokens() -> None:
    assert "na" in ATTENTIONS and "na" not in METHODS
    ranged = vistoken.NeighborhoodAttention(blocks=range(0, 12, 2))
    assert ranged.blocks == (0, 2, 4, 6, 8, 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0},
        {"window": (3, 3, 3)},
        {"window": 2.5},
        {"dilation": ()},
        {"dilation": 0},
        {"stride": 4, "window": 3},
        {"blocks": (2, 1)},
        {"blocks": ()},
        {"round_to": 8},
    ],
    ids=str,
)
def test_wrong_settings_are_named(wrong: dict) -> None:
    with pytest.raises(vistoken.ConfigError, match=next(iter(wrong))):
        vistoken.NeighborhoodAttention(**wrong)


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        ("na:window=7", vistoken.ScheduleError, "7 x 7 cells, the patch grid has 5 x 5"),
        ("na:window=3,dilation=2", vistoken.ScheduleError, "6 x 6 cells"),
        ("na:window=3,blocks=[1,3]", vistoken.ScheduleError, "has 3 blocks, 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(method, error, says) -> None:
    model, _ = build("deit")
    before = fingerprint(model)
    with pytest.raises(error, match=says):
        vistoken.wrap(model, method)
    assert fingerprint(model) == before


def test_hosts_without_a_whole_grid_are_refused() -> None:
    model = timm_model("vit_tiny_patch16_224", img_size=80, patch_drop_rate=0.25)
    with pytest.raises(vistoken.UnsupportedMethodError, match="drops patches in training"):
        vistoken.wrap(model, "na:window=3")
    with pytest.raises(vistoken.UnsupportedBackboneError):
        vistoken.wrap(timm.create_model("naflexvit_base_patch16_gap", depth=1), "na:window=3")


def test_what_it_cannot_honour_is_refused_while_running() -> None:
    model, image = build("deit")
    vistoken.wrap(model, "na:window=3,blocks=[1]")
    with pytest.raises(vistoken.TapError, match="block 1, but the model hands it an attention"):
        model(image, attn_mask=torch.zeros(26, 26, dtype=torch.float64))
    assert model(image).shape == (2, 7), "a refused call leaves nothing behind"
    dropping = timm_model("vit_tiny_patch16_224", img_size=80, attn_drop_rate=0.1)
    vistoken.wrap(dropping, "na:window=3")
    assert dropping.eval()(image.float()).shape == (2, 7)
    with pytest.raises(vistoken.TapError, match="drops attention weights"):
        dropping.train()(image.float())
