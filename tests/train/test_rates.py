"""Counts, masks, costs and the masked simulation against independent references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import vistoken
from vistoken.api import shape_of
from vistoken.errors import AlreadyWrappedError, ConfigError, ScheduleError, UnsupportedMethodError
from vistoken.flops import count_macs
from vistoken.latency import LatencyTable
from vistoken.methods import DiffRate
from vistoken.probe import Case
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape
from vistoken.train.costs import FlopsCost, LatencyCost, check_reachable, resolve_target
from vistoken.train.masked import release, simulate, twin
from vistoken.train.matching import Matching
from vistoken.train.merging import best_partners, merge_in_place
from vistoken.train.rates import Plan, Rates, initial_schedule

SMALL = ModelShape.plain(64, 5, (3, 7))


def shaken(rates: Rates, seed: int = 0) -> Rates:
    generator = torch.Generator().manual_seed(seed)
    rates.logits.data = torch.randn(rates.logits.shape, generator=generator) * 2
    return rates


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


# Counts and masks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 4, 21])
def test_counts_and_survival_are_those_of_a_loop_over_candidates(granularity: int) -> None:
    rates = shaken(Rates(SMALL, granularity=granularity))
    candidates = list(range(21, 0, -granularity))
    p = rates.logits.detach().double().softmax(-1)
    plan, survival = rates(), rates.survival().detach()
    for place in range(len(rates.blocks)):
        for kind in range(2):
            row = p[place, kind]
            mean = sum(k * float(q) for k, q in zip(candidates, row, strict=True))
            expected = int(-(-(mean - 1e-3) // 1)) + 1
            assert int(rates.counts[place, kind]) == expected
            assert float(plan.masks[place, kind].detach().sum()) == expected
            for rank in range(SMALL.tokens):
                chance = sum(float(q) for k, q in zip(candidates, row, strict=True) if k + 1 > rank)
                got = float(survival[place, kind, rank])
                assert got == pytest.approx(chance if rank else 1.0, abs=1e-5)


def test_gradients_of_counts_and_masks_are_the_closed_forms() -> None:
    rates = shaken(Rates(SMALL)).double()
    p = rates.logits.detach().softmax(-1)
    k = rates.candidates.double()
    (grad,) = torch.autograd.grad(rates.expected().sum(), rates.logits)
    mean = (p * k).sum(-1, keepdim=True)
    assert torch.allclose(grad, p * (k - mean), atol=1e-10)
    weight = torch.randn(SMALL.tokens, dtype=torch.float64)
    (grad,) = torch.autograd.grad((rates().masks * weight).sum(), rates.logits)
    step = 1e-6

    def soft(logits: torch.Tensor) -> torch.Tensor:
        q = logits.softmax(-1)
        above = (k[None] + 1 > torch.arange(SMALL.tokens)[:, None]).double()
        return (q @ above.T * weight).sum()

    for place in [(0, 0, 3), (2, 1, 20), (3, 0, 11)]:
        up, down = rates.logits.detach().clone(), rates.logits.detach().clone()
        up[place] += step
        down[place] -= step
        assert float(grad[place]) == pytest.approx(
            float(soft(up) - soft(down)) / step / 2, rel=1e-4
        )


@pytest.mark.parametrize("seed", range(4))
def test_loaded_schedules_come_back_and_survive_a_state_dict(seed: int) -> None:
    rates = Rates(SMALL, blocks=[1, 2, 4])
    schedule = random_schedule(SMALL, seed, rates.blocks)
    rates.load(schedule)
    assert rates.schedule() == schedule
    rates()
    assert rates.schedule() == schedule
    fresh = Rates(SMALL, blocks=[1, 2, 4])
    fresh.load_state_dict(rates.state_dict())
    assert fresh.schedule() == schedule


def test_identity_and_extremes_can_be_loaded() -> None:
    for count in (SMALL.tokens, 2):
        rates = Rates(SMALL)
        counts = ((SMALL.tokens,) * 2,) + ((count, count),) * 4
        rates.load(Schedule(SMALL.tokens, 1, counts))
        assert rates.schedule().kept[1:] == (count,) * 4


def test_uniform_start_keeps_half_as_published() -> None:
    shape = ModelShape.plain(384, 12)
    assert initial_schedule(shape, "uniform") is None
    assert set(Rates(shape).schedule().kept[1:]) <= {100, 101}


def test_initial_schedules_from_files_and_methods(tmp_path) -> None:
    shape = ModelShape.plain(384, 12)
    plan = DiffRate(gflops=2.9).plan(shape)
    plan.save(tmp_path / "s.json")
    assert initial_schedule(shape, str(tmp_path / "s.json")) == plan
    assert initial_schedule(shape, "diffrate:gflops=2.9") == plan
    assert initial_schedule(shape, "tome:r=13").kept[-1] == 41


def test_a_schedule_holds_the_last_step_of_the_optimizer() -> None:
    rates = Rates(SMALL)
    optimizer = torch.optim.AdamW([rates.logits], lr=0.5)
    for _ in range(3):
        rates().kept.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    want = rates.expected().long()[:, 1].cummin(0).values.tolist()
    assert [rates.schedule().kept[block] for block in rates.blocks] == want


def test_frozen_counts_stay() -> None:
    rates = shaken(Rates(SMALL))
    before = rates.freeze(random_schedule(SMALL, 3, rates.blocks))
    rates.logits.data += torch.randn_like(rates.logits) * 5
    rates()
    assert rates.schedule() == before and not rates.logits.requires_grad


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"blocks": [5]}, "blocks"),
        ({"blocks": [2, 1]}, "blocks"),
        ({"granularity": 0}, "granularity"),
        ({"spread": 0.0}, "spread"),
        ({"carry": "none"}, "carry"),
    ],
)
def test_wrong_settings_are_named(options, word) -> None:
    with pytest.raises(ConfigError, match=word):
        Rates(SMALL, **options)


def test_schedules_that_do_not_fit_are_refused() -> None:
    rates = Rates(SMALL, blocks=[2])
    with pytest.raises(ScheduleError, match="block 1"):
        rates.load(random_schedule(SMALL, 0, (1, 2)))
    with pytest.raises(ScheduleError, match="tokens"):
        rates.load(random_schedule(ModelShape.plain(64, 5, (4, 4)), 0, (2,)))


# Costs --------------------------------------------------------------------------------------------


def table_of(shape: ModelShape) -> LatencyTable:
    counts = (3, 8, 15, shape.tokens)
    case = Case("h", "b", 64, 1, 256, shape.depth, 1, shape.tokens, 1, "float32", 2, "cpu",
                "eager", "diffrate", True, 8)  # fmt: skip
    return LatencyTable(case, shape, "mlp", counts, (1.0, 1.6, 2.5, 3.9), (0.5, 0.9, 1.3, 2.0),
                        (0.5, 0.7, 1.2, 1.9), (0.1, 0.15, 0.3, 0.2), 20.5, 1.0, 0.8, "x", {},
                        0.0)  # fmt: skip


def test_flops_cost_is_the_published_count() -> None:
    shape = ModelShape.plain(384, 12)
    for label in (2.3, 2.9, 3.1):
        plan = DiffRate(gflops=label, model="vit_small_deit").plan(shape)
        cost = FlopsCost(shape).double()
        got = float(cost.of(torch.tensor(plan.kept, dtype=torch.float64)))
        assert got == pytest.approx(count_macs(shape, plan.kept) / 1e9, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_latency_cost_is_the_tables_in_value_and_gradient(seed: int) -> None:
    table = table_of(SMALL)
    kept = torch.tensor(random_schedule(SMALL, seed, (1, 2, 3)).kept, dtype=torch.float64)
    kept = kept + torch.linspace(0.4, 0.1, SMALL.depth)
    ours, theirs = kept.clone().requires_grad_(), kept.clone().requires_grad_()
    cost = LatencyCost(table).double()
    value, wanted = cost.of(ours), table.cost(theirs)
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    value.backward()
    wanted.backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5)


@pytest.mark.parametrize("cost", [FlopsCost(SMALL), LatencyCost(table_of(SMALL))])
def test_cost_gradient_is_the_finite_difference(cost) -> None:
    """Of the cost in the expected counts, with the running minimum of the active rule."""
    cost = cost.double()
    rates = Rates(SMALL, carry="active").double()
    # Non-monotone on purpose: some counts must be inactive.
    rates.logits.data = torch.randn(
        rates.logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    rates.logits.data[:, :, :10] += torch.linspace(3, -3, 4, dtype=torch.float64)[:, None, None]
    counts = rates.expected().detach()

    def spent(values: torch.Tensor) -> torch.Tensor:
        kept, _ = rates._running_minimum(values)
        return cost.of(kept)

    # Whole counts lie on knots and ties; a little aside there are none.
    shift = torch.rand(counts.shape, generator=torch.Generator().manual_seed(1)).double() * 0.3
    at = (counts + 0.2 + shift).clamp(max=SMALL.tokens - 0.01).requires_grad_()
    (grad,) = torch.autograd.grad(spent(at), at)
    step = 1e-5
    numeric = torch.zeros_like(at)
    for i in range(at.shape[0]):
        for j in range(2):
            up, down = at.detach().clone(), at.detach().clone()
            up[i, j] += step
            down[i, j] -= step
            numeric[i, j] = (spent(up) - spent(down)) / (2 * step)
    assert torch.allclose(grad, numeric, rtol=1e-4, atol=1e-9)
    assert 0 < int((grad == 0).sum()) < grad.numel()


def test_published_rule_pushes_both_counts_and_never_the_block_before() -> None:
    rates = Rates(SMALL, carry="both").double()
    at = torch.tensor([[20.0, 18], [19, 21], [9, 12], [15, 4]], dtype=torch.float64)
    at.requires_grad_()
    kept, _ = rates._running_minimum(at)
    assert kept.tolist() == [22, 18, 18, 9, 4]
    (grad,) = torch.autograd.grad(kept[3], at)
    assert grad.tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]


def test_waking_counts_reducing_blocks_and_pushes_towards_rest() -> None:
    rates = Rates(SMALL)
    schedule = Schedule(22, 1, ((22, 22), (22, 20), (20, 20), (11, 11), (11, 11)))
    rates.load(schedule)
    plan = rates()
    assert plan.waking.tolist() == [0, 1, 0, 1, 0]
    (grad,) = torch.autograd.grad(plan.waking[1], rates.logits)
    assert float(grad[0, 1, 0]) < 0, "more weight on keeping all makes the block sleep"
    assert not grad[1:].any()


@pytest.mark.parametrize("target", [0.001, 99.0])
def test_unreachable_targets_are_refused_with_what_is_possible(target: float) -> None:
    with pytest.raises(ScheduleError, match="between"):
        check_reachable(FlopsCost(SMALL), Rates(SMALL), target)


def test_targets_need_a_matching_cost() -> None:
    flops, latency = FlopsCost(SMALL), LatencyCost(table_of(SMALL))
    assert resolve_target(latency, None, 2.0) == pytest.approx(20.5 / 2)
    assert resolve_target(flops, 1.5, None) == 1.5
    for args in [(flops, None, None), (flops, 1.0, 2.0), (latency, 1.0, None), (flops, None, 0.5)]:
        with pytest.raises(ConfigError, match="target"):
            resolve_target(*args)


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

MODELS = {
    "deit": (
        "deit_tiny_patch16_224",
        {"img_size": 80, "depth": 4, "embed_dim": 96, "num_heads": 3},
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 4}),
    "mae": (
        "vit_base_patch16_224",
        {"img_size": (48, 112), "depth": 5, "embed_dim": 64, "num_heads": 2, "global_pool": "avg"},
    ),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        {"img_size": 70, "depth": 4, "embed_dim": 64, "num_heads": 2},
    ),
    "rotary": ("eva02_tiny_patch14_224", {"img_size": 70, "depth": 4}),
}


def build(key: str) -> nn.Module:
    name, options = MODELS[key]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.03))
    return model


def images_for(model: nn.Module, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size)


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
