"""Masked simulation of a reduction against the real one, and merging in place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from learnable import MODELS, build, images_for

import vistoken
from vistoken.api import shape_of
from vistoken.errors import AlreadyWrappedError, ConfigError, ScheduleError, UnsupportedMethodError
from vistoken.methods import DiffRate
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape
from vistoken.train.masked import release, simulate, twin
from vistoken.train.matching import Matching
from vistoken.train.merging import best_partners, merge_in_place
from vistoken.train.rates import Plan, Rates


def random_schedule(shape: ModelShape, seed: int, blocks: tuple[int, ...]) -> Schedule:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(1, shape.patches + 1, (2 * len(blocks),), generator=generator)
    counts = iter((draws.sort(descending=True).values + shape.prefix).tolist())
    pairs = [
        (next(counts), next(counts)) if block in blocks else None for block in range(shape.depth)
    ]
    before, full = shape.tokens, []
    for pair in pairs:
        full.append((before, before) if pair is None else pair)
        before = full[-1][1]
    return Schedule(shape.tokens, shape.prefix, tuple(full))


# Merging in place ---------------------------------------------------------------------------------


def test_merge_in_place_has_the_gradients_of_its_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0, 0, 0, 1, 1, 0, 1.0], [0, 1, 0, 0, 0, 1, 0]]).double()
    weight.requires_grad_()
    partners = torch.tensor([[2, 1], [0, 1], [1, 0], [2, 1], [2, 0], [1, 2], [0, 2]])
    partners = torch.stack([partners, partners.flip(0).clamp(max=4)])
    partners[1, [1, 5]] = torch.tensor([[2, 0], [0, 4]])
    share = torch.zeros(2, 7, 2, dtype=torch.float64)
    share[..., 0] = 1
    share.requires_grad_()
    grad = torch.randn(2, 7, 3, dtype=torch.float64)

    def naive(x, weight, share):
        out = []
        for b in range(2):
            for j in range(7):
                top, bottom = x[b, j], 1.0
                for i in range(7):
                    for k in range(2):
                        if partners[b, i, k] == j:
                            top = top + weight[b, i] * share[b, i, k] * x[b, i]
                            bottom = bottom + weight[b, i] * share[b, i, k]
                out.append(top / bottom)
        return torch.stack(out).view(2, 7, 3)

    ours = merge_in_place(x, weight, share, partners)
    wanted = naive(x, weight, share)
    assert torch.allclose(ours, wanted)
    a = torch.autograd.grad((ours * grad).sum(), (x, weight, share))
    b = torch.autograd.grad((wanted * grad).sum(), (x, weight, share))
    for got, expected in zip(a, b, strict=True):
        assert torch.allclose(got, expected, atol=1e-12)


def test_best_partners_are_those_of_brute_force() -> None:
    torch.manual_seed(1)
    x, receives = torch.randn(2, 70, 5), torch.rand(2, 70) > 0.7
    value, index = best_partners(x, receives, 3)
    for b in range(2):
        for i in range(70):
            found = sorted(
                (
                    (float(torch.cosine_similarity(x[b, i], x[b, j], dim=0)), j)
                    for j in range(70)
                    if receives[b, j] and j != i
                ),
                reverse=True,
            )[:3]
            assert [j for _, j in found] == index[b, i].tolist()
            assert [c for c, _ in found] == pytest.approx(value[b, i].tolist(), abs=1e-5)


def test_who_has_no_partner_is_its_own() -> None:
    receives = torch.tensor([[False, True, False]])
    value, index = best_partners(torch.randn(1, 3, 4), receives)
    assert index[0, :, 0].tolist() == [1, 1, 1] and float(value[0, 1, 0]) == 0.0


# The simulation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, 16])
@pytest.mark.parametrize("key", MODELS)
def test_masked_training_is_real_reduction(key: str, features: int) -> None:
    model = build(key)
    images, shape = images_for(model), shape_of(model)
    rates = Rates(shape)
    matching = Matching(rates, features) if features else None
    dense = model(images).detach()
    for seed in range(3):
        schedule = random_schedule(shape, seed, rates.blocks)
        rates.load(schedule)
        real = twin(model)
        simulate(model, rates, matching)
        simulated = model(images)
        release(model)
        learned = matching.features() if matching else None
        vistoken.wrap(real, DiffRate(schedule=schedule, features=learned))
        with torch.no_grad():
            reduced = real(images)
        assert (simulated - reduced).abs().max() < 1e-5
        assert (dense - reduced).abs().max() > 1e-4, "nothing was tested"
    assert torch.equal(model(images), dense), "release must leave no trace"


def test_gradients_reach_every_count_and_projection() -> None:
    model = build("deit").requires_grad_(False)
    rates = Rates(shape_of(model))
    matching = Matching(rates, 16)
    rates.load(random_schedule(rates.shape, 1, rates.blocks))
    simulate(model, rates, matching)
    model(images_for(model)).square().sum().backward()
    task = rates.logits.grad.abs().sum(-1)
    assert (task[:-1] > 0).all()
    assert (task[-1] == 0).all(), "after the last block only the class token is read"
    assert (matching.weight.grad.flatten(1).abs().sum(1) > 0).any()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("key", ["mae", "deit"])
def test_mask_gradient_is_the_derivative_of_the_relaxed_simulation(key: str) -> None:
    """Between 0 and 1 masks weigh keys, means and sizes; at the ends one-sided differences hold."""
    model = build(key).double().requires_grad_(False)
    shape = shape_of(model)
    rates = Rates(shape, blocks=[1])
    rates.load(random_schedule(shape, 2, (1,)))
    images = images_for(model, 2).double()
    simulation = simulate(model, rates)
    plan, masks = rates(), rates().masks.detach().double()
    choice = {}

    def loss(masks: torch.Tensor) -> torch.Tensor:
        rates.forward = lambda: Plan(masks, plan.kept, plan.waking)  # type: ignore[method-assign]
        return model(images).square().sum()

    match = simulation._match

    def remember(block: int, x: torch.Tensor, receives: torch.Tensor):
        # Partners of the masks as they are: a difference must not choose others.
        if block not in choice:
            choice[block] = match(block, x, receives)
        return choice[block]

    simulation._match = remember  # type: ignore[method-assign]
    at = masks.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(at), at)
    base, step = float(loss(masks).detach()), 1e-5
    pruned, merged = rates.schedule().counts[1]
    assert 1 < merged < pruned < shape.tokens
    for kind, rank in [(0, 2), (0, pruned), (0, shape.tokens - 1), (0, merged), (1, 1),
                       (1, merged - 1), (1, merged), (1, pruned - 1)]:  # fmt: skip
        moved = masks.clone()
        change = step if moved[0, kind, rank] == 0 else -step
        moved[0, kind, rank] += change
        wanted = (float(loss(moved).detach()) - base) / change
        assert float(grad[0, kind, rank]) == pytest.approx(wanted, rel=2e-3, abs=1e-6)
        assert abs(wanted) > 1e-6


def test_activation_checkpointing_gives_the_same_gradient() -> None:
    model = build("deit").requires_grad_(False)
    rates = Rates(shape_of(model))
    rates.load(random_schedule(rates.shape, 1, rates.blocks))
    images = images_for(model)
    simulate(model, rates)
    (plain,) = torch.autograd.grad(model(images).square().sum(), rates.logits)
    model.set_grad_checkpointing()
    model.train()
    (again,) = torch.autograd.grad(model(images).square().sum(), rates.logits)
    assert torch.allclose(plain, again, rtol=1e-4, atol=1e-7)


def test_simulation_refuses_what_it_cannot_do() -> None:
    model = build("deit")
    rates = Rates(shape_of(model))
    vistoken.wrap(model, "tome:r=1")
    with pytest.raises(AlreadyWrappedError):
        simulate(model, rates)
    siglip = timm.create_model("vit_base_patch16_siglip_224", img_size=64, depth=2)
    with pytest.raises(UnsupportedMethodError, match="class token"):
        simulate(siglip, Rates(shape_of(siglip)))
    other = build("deit")
    simulate(other, rates)
    with pytest.raises(AlreadyWrappedError):
        simulate(other, rates)
    release(other)


# Export -------------------------------------------------------------------------------------------


def test_features_round_trip_and_are_checked(tmp_path) -> None:
    model = build("deit")
    shape = shape_of(model)
    rates = Rates(shape)
    matching = Matching(rates, 16)
    schedule = random_schedule(shape, 0, rates.blocks)
    matching.save(tmp_path / "f.safetensors")
    schedule.save(tmp_path / "s.json")
    text = f"diffrate:schedule={tmp_path / 's.json'},features={tmp_path / 'f.safetensors'}"
    method = vistoken.parse(text)
    images = images_for(model)
    a = vistoken.wrap(twin(model), method)(images)
    b = vistoken.wrap(twin(model), DiffRate(schedule=schedule, features=matching.features()))(
        images
    )
    c = vistoken.wrap(twin(model), DiffRate(schedule=schedule))(images)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert str(tmp_path / "f.safetensors") in method.to_string()
    with pytest.raises(ScheduleError, match="projection"):
        method.plan(replace(shape, width=32))
    with pytest.raises(ConfigError, match="no such file"):
        DiffRate(schedule=schedule, features="nowhere.safetensors")
