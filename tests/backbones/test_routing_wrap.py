"""Bi-level routing inside pretrained ViTs, against the host with attention written out."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from naive import fingerprint, randomise
from naive_routing import attend, multiplicity, region_ids
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

import vistoken
from vistoken.methods import ATTENTIONS, METHODS

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
TOWER = {"image_size": (40, 56), "patch_size": 8, "width": 32, "layers": 3, "heads": 4}

# how to build it, image size, patch grid, prefix tokens
HOSTS = {
    "deit": (
        lambda: timm.create_model("deit_tiny_patch16_224", img_size=80, **TINY), (80, 80), (5, 5), 1
    ),
    "registers, any size": (
        lambda: timm.create_model(
            "vit_small_patch14_reg4_dinov2", img_size=98, dynamic_img_size=True, **TINY
        ),
        (70, 98), (5, 7), 5,
    ),
    "siglip": (
        lambda: timm.create_model("vit_base_patch16_siglip_224", img_size=(80, 112), **TINY),
        (80, 112), (5, 7), 0,
    ),
    "open_clip": (
        lambda: VisionTransformer(mlp_ratio=2.0, output_dim=16, **TOWER), (40, 56), (5, 7), 1
    ),
}  # fmt: skip

CASES = [
    vistoken.BiLevelRouting(regions=3, topk=2),
    vistoken.BiLevelRouting(regions=(5, 2), topk=4, blocks=[0, 2]),
    vistoken.BiLevelRouting(regions=2, topk=1, per_head=True, blocks=1),
]


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, size, _, _ = HOSTS[name]
    torch.manual_seed(0)
    model = randomise(make().double()).eval()
    generator = torch.Generator().manual_seed(1)
    return model, torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)


class Reference:
    """Stands in for fused attention: the n-th call is the n-th block's."""

    def __init__(self, method, grid: tuple[int, int], prefix: int) -> None:
        self.method, self.grid, self.prefix, self.calls = method, grid, prefix, 0

    def __call__(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        blocks = range(3) if self.method.blocks is None else self.method.blocks
        self.calls += 1
        batch, heads, tokens, _ = q.shape
        times = torch.ones(batch, heads, tokens, tokens, dtype=torch.float64)
        if self.calls - 1 in blocks:
            times[:, :, self.prefix :, self.prefix :] = self.listed(q, k)
        rows = (x.transpose(1, 2) for x in (q, k, v))
        return attend(*rows, times, scale)[0].transpose(1, 2)

    def listed(self, q: Tensor, k: Tensor) -> Tensor:
        many = self.method.regions
        many = many if isinstance(many, tuple) else (many, many)
        size = tuple(-(-n // m) for n, m in zip(self.grid, many, strict=True))
        ids = torch.tensor(region_ids(self.grid, size))
        means = [
            torch.stack(
                [x[:, :, self.prefix :][:, :, ids == r].mean(2) for r in range(int(ids.max()) + 1)],
                2,
            ).detach()
            for x in (q, k)
        ]
        scores = means[0] @ means[1].transpose(-1, -2)  # [B, H, R, R]
        if not self.method.per_head:
            scores = scores.sum(1, keepdim=True)
        index = scores.topk(self.method.topk).indices
        return multiplicity(index, ids.tolist(), ids.tolist(), *q.shape[:2])


def expected(name: str, model: nn.Module, image: Tensor, method) -> Tensor:
    reference = Reference(method, *HOSTS[name][2:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", reference)
        return model(image)


@pytest.mark.parametrize("name", HOSTS)
def test_wrap_equals_attention_written_out(name: str) -> None:
    model, image = build(name)
    plain = copy.deepcopy(model)
    dense = plain(image)
    before = fingerprint(model)
    for method in CASES:
        wanted = expected(name, plain, image, method)
        assert (wanted - dense).abs().max() > 1e-4, "the case changes nothing"
        vistoken.wrap(model, method)
        assert torch.allclose(model(image), wanted, atol=1e-10), method
        vistoken.unwrap(model)
    assert fingerprint(model) == before
    assert torch.equal(model(image), dense)


@pytest.mark.parametrize("name", HOSTS)
def test_all_regions_change_nothing(name: str) -> None:
    model, image = build(name)
    dense = model(image)
    vistoken.wrap(model, vistoken.BiLevelRouting(regions=2, topk=4))
    assert torch.allclose(model(image), dense, atol=1e-12)


def test_gradients() -> None:
    model, image = build("deit")
    plain = copy.deepcopy(model)
    weight = torch.randn(2, 7, dtype=torch.float64)
    (expected("deit", plain, image, CASES[0]) * weight).sum().backward()
    vistoken.wrap(model, CASES[0])
    (model(image) * weight).sum().backward()
    for (key, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-10), key


def test_compiles_without_graph_break() -> None:
    model, image = build("deit")
    vistoken.wrap(model, CASES[0])
    wanted = model(image)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(image), wanted, atol=1e-10)


def test_cost_and_command_line_form() -> None:
    model, _ = build("deit")
    dense = vistoken.flops(model)
    method = vistoken.parse("bra:regions=5,topk=3,blocks=[0,2]")
    assert method == vistoken.BiLevelRouting(regions=5, topk=3, blocks=[0, 2])
    assert vistoken.parse(method.to_string()) == method
    # patches, patches to prefix and back, the prefix itself; scores of the 25 regions
    sparse = 2 * 32 * (25 * 3 + 25 + 26 + 25 * 25 // 2)
    full = 2 * 32 * 26 * 26
    found = vistoken.flops(model, method)
    assert found == pytest.approx(dense + 2 * (sparse - full) / 1e9, rel=1e-9)
    assert "bra" in ATTENTIONS and "bra" not in METHODS
    shape = vistoken.info(vistoken.wrap(model, method))
    assert "bra" in str(shape)


def test_budget() -> None:
    from vistoken.api import shape_of

    shape = shape_of(timm.create_model("deit_tiny_patch16_224", **TINY))
    dense = vistoken.BiLevelRouting(topk=49).cost(shape)
    method = vistoken.BiLevelRouting.at_gflops(shape, 0.9 * dense)
    assert method.cost(shape) <= 0.9 * dense
    assert vistoken.BiLevelRouting(topk=method.topk + 1).cost(shape) > 0.9 * dense
    with pytest.raises(vistoken.ScheduleError, match="out of reach"):
        vistoken.BiLevelRouting.at_gflops(shape, 0.0)


@pytest.mark.parametrize(
    "wrong",
    [{"regions": 0}, {"regions": (2, 2, 2)}, {"topk": 0}, {"per_head": 1}, {"blocks": [-1]}],
    ids=str,
)
def test_wrong_settings_are_named(wrong: dict) -> None:
    with pytest.raises(vistoken.ConfigError, match=next(iter(wrong))):
        vistoken.BiLevelRouting(**wrong)


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    model, _ = build("deit")
    before = fingerprint(model)
    for method, message in (
        (vistoken.BiLevelRouting(regions=2, topk=5), "2 x 2 regions"),
        (vistoken.BiLevelRouting(regions=5, topk=1, blocks=[3]), "do not exist"),
    ):
        with pytest.raises(vistoken.ScheduleError, match=message):
            vistoken.wrap(model, method)
    assert fingerprint(model) == before
