"""Counts, masks and costs against independent references."""

from __future__ import annotations

import pytest
import torch

from vistoken.errors import ConfigError, ScheduleError
from vistoken.flops import count_macs
from vistoken.latency import LatencyTable
from vistoken.methods import DiffRate
from vistoken.probe import Case
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape
from vistoken.train.costs import FlopsCost, LatencyCost, check_reachable, resolve_target
from vistoken.train.rates import Rates, initial_schedule

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
