"""Counts of an operator that only merges (ToMe): masked training against real merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learnable import MODELS, NO_CLASS, build, images_for

import vistoken
from vistoken.api import shape_of
from vistoken.errors import ConfigError, ScheduleError, UnsupportedMethodError
from vistoken.latency import LatencyTable
from vistoken.methods import DiffRate, ToMe
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape
from vistoken.train import masked_merge
from vistoken.train.costs import FlopsCost, check_reachable
from vistoken.train.learn import RateLearning
from vistoken.train.masked import release, simulate, twin
from vistoken.train.masked_merge import MergeSimulation, pair_up_in_place
from vistoken.train.merge_rates import MergeRates
from vistoken.train.merging import merge_in_place
from vistoken.train.rates import Plan, Rates
from vistoken.train.search import learn_schedule

SMALL = ModelShape.plain(64, 5, (3, 7))


def random_merging(shape: ModelShape, seed: int, blocks: tuple[int, ...]) -> Schedule:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, shape.patches, (shape.depth,), generator=generator) // 2
    rest = torch.rand(shape.depth, generator=generator) < 0.3
    numbers = [int(n) if b in blocks and not rest[b] else 0 for b, n in enumerate(draws.tolist())]
    return Schedule.merging(shape, numbers)


@pytest.mark.parametrize("key", [*MODELS, *NO_CLASS])
def test_masked_training_is_real_merging(key: str) -> None:
    model = build(key)
    images, shape = images_for(model), shape_of(model)
    rates = MergeRates(shape)
    dense = model(images).detach()
    for seed in range(4):
        schedule = random_merging(shape, seed, rates.blocks)
        rates.load(schedule)
        assert rates.schedule() == schedule
        real = twin(model)
        simulate(model, rates, kind=MergeSimulation)
        simulated = model(images).detach()
        release(model)
        vistoken.wrap(real, ToMe.from_schedule(schedule))
        with torch.no_grad():
            reduced = real(images)
        assert (simulated - reduced).abs().max() < 1e-5
        assert (dense - reduced).abs().max() > 1e-4, "nothing was tested"


def test_counts_beyond_half_of_the_patches_merge_half() -> None:
    model = build("deit")
    shape = shape_of(model)
    rates = MergeRates(shape)
    with torch.no_grad():
        rates.logits.copy_(torch.linspace(0, 60, shape.patches))  # nearly none kept
    schedule = rates.schedule()
    assert schedule == Schedule.merging(shape, [shape.tokens] * shape.depth)
    assert rates.counts[:, 0].tolist() == list(schedule.kept), "what is run, not what is wanted"
    plan = rates()
    assert rates.counts[:, 0].tolist() == list(schedule.kept)
    assert plan.kept.tolist() == list(schedule.kept)
    assert plan.masks.detach()[:, 0].sum(-1).tolist() == list(schedule.kept)
    images = images_for(model)
    real = vistoken.wrap(twin(model), ToMe.from_schedule(schedule))
    simulate(model, rates, kind=MergeSimulation)
    assert (model(images) - real(images)).abs().max() < 1e-5


@pytest.mark.parametrize("share", [0.9, 0.6, 0.45])
def test_meeting_a_target_scales_what_can_be_scaled(share: float) -> None:
    """Where a block merges half already, later ones make up for it."""
    shape = ModelShape.plain(64, 12, (14, 14))
    rates, cost = MergeRates(shape), FlopsCost(shape)
    for numbers in ([3] * 12, [0, 90, 0, 40, 1, 0, 0, 0, 0, 0, 0, 0], list(range(12))):
        met = cost.meet(Schedule.merging(shape, numbers), share * cost.dense, rates.allowed)
        spent = cost.exactly(met)
        assert (share - 0.03) * cost.dense < spent <= share * cost.dense
        assert ToMe.from_schedule(met).plan(shape) == met
        assert rates.allowed(met) == met


@pytest.mark.parametrize("kind", [Rates, MergeRates])
def test_meeting_a_target_leaves_blocks_that_are_not_learned_alone(kind: type[Rates]) -> None:
    shape = ModelShape.plain(64, 8, (9, 9))
    rates, cost = kind(shape, blocks=(2, 6)), FlopsCost(shape)
    start = Schedule.merging(shape, [0, 35, 0, 0, 0, 0, 3, 0])
    for share in (0.9, 0.8, 0.75):
        met = cost.meet(start, share * cost.dense, rates.allowed)
        assert (share - 0.03) * cost.dense < cost.exactly(met) <= share * cost.dense
        assert all(step.idle for step in met.steps if step.block not in rates.blocks)


@pytest.mark.parametrize("granularity", [1, 10])
def test_the_fewest_counts_are_those_of_the_smallest_candidates(granularity: int) -> None:
    shape = ModelShape.plain(64, 8, (7, 7))
    rates, cost = MergeRates(shape, (0, 1, 2, 4, 5, 7), granularity), FlopsCost(shape)
    with torch.no_grad():
        rates.logits[..., -1] = 100.0
    assert rates.fewest_counts() == rates.schedule()
    lowest = cost.exactly(rates.schedule())
    check_reachable(cost, rates, 1.001 * lowest)
    with pytest.raises(ScheduleError, match="cannot be reached"):
        check_reachable(cost, rates, 0.999 * lowest)


def test_a_start_that_merges_more_than_half_is_raised_to_half() -> None:
    module = RateLearning(backbone=build("no class"), operator="tome", target_speedup=1.3,
                          init="tome:r=9", blocks=(0, 3))  # fmt: skip
    module.setup("fit")
    assert module.rates.schedule().kept == (12, 12, 12, 6)
    assert module.rates.counts.flatten().tolist() == [12, 6]


def test_times_of_another_operator_or_model_are_refused() -> None:
    model, other = build("deit"), build("distilled")
    loader = torch.utils.data.DataLoader(Noise(), 16)
    for timed, method in ((model, "diffrate"), (other, "tome")):
        table = LatencyTable.measure(timed, batch=1, method=method, step=8, repeats=1)
        with pytest.raises(ConfigError, match=f"times '{method}' on 4 blocks .* needed .* 'tome'"):
            learn_schedule(model, loader, target_speedup=1.1, operator="tome", cost="latency",
                           table=table, steps=1)  # fmt: skip


def test_matching_in_slots_is_a_loop_over_pairs() -> None:
    torch.manual_seed(0)
    metric, prefix, entering = torch.randn(2, 23, 5), 2, 17
    metric[1, 6] = metric[1, 4]  # two that are equally like their partner
    looks, turn, partner = pair_up_in_place(metric, prefix, torch.tensor(entering))
    even, odd = range(prefix, entering, 2), range(prefix + 1, entering, 2)
    assert [2 * i for i, on in enumerate(looks.tolist()) if on] == list(even)
    for b in range(2):
        found = []
        for i in even:
            likeness = [float(torch.cosine_similarity(metric[b, i], metric[b, j], 0)) for j in odd]
            best = max(range(len(odd)), key=lambda j: likeness[j])
            assert int(partner[b, i // 2]) == odd[best]
            found.append((-round(likeness[best], 5), i))
        assert [i for _, i in sorted(found)] == sorted(even, key=lambda i: int(turn[b, i // 2]))


def test_weighted_mean_in_place_has_the_gradients_of_its_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0, 0, 1, 1, 0, 1.0]]).double().requires_grad_()
    size = (1 + 3 * torch.rand(1, 6, dtype=torch.float64)).requires_grad_()
    partner = torch.tensor([[0, 1, 1, 0, 4, 1]])
    grad = torch.randn(1, 6, 3, dtype=torch.float64)
    top, bottom = (size[..., None] * x)[0].unbind(), size[0].unbind()
    top, bottom = list(top), list(bottom)
    for i in (2, 3, 5):
        j = int(partner[0, i])
        top[j] = top[j] + weight[0, i] * size[0, i] * x[0, i]
        bottom[j] = bottom[j] + weight[0, i] * size[0, i]
    wanted = torch.stack([t / b for t, b in zip(top, bottom, strict=True)])[None]
    share = torch.ones(1, 6, 1, dtype=torch.float64)
    ours = merge_in_place(x, weight, share, partner[..., None], size)
    assert torch.allclose(ours, wanted)
    got = torch.autograd.grad((ours * grad).sum(), (x, weight, size))
    expected = torch.autograd.grad((wanted * grad).sum(), (x, weight, size))
    assert torch.allclose(got[0], expected[0]) and torch.allclose(got[2], expected[2])
    assert torch.allclose(got[1][0, [2, 3, 5]], expected[1][0, [2, 3, 5]])


def test_mask_gradient_is_the_derivative_of_the_relaxed_simulation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between 0 and 1 masks weigh keys, means and sizes; at the ends one-sided differences hold."""
    model = build("deit").double().requires_grad_(False)
    shape = shape_of(model)
    rates = MergeRates(shape, blocks=[0, 2])
    rates.load(Schedule.merging(shape, [7, 0, 5, 0]))
    images = images_for(model, 2).double()
    simulate(model, rates, kind=MergeSimulation)
    plan, masks = rates(), rates().masks.detach().double()
    for name in ("pair_up_in_place", "_new_order"):
        # Partners and slots of the masks as they are: a difference must not choose others.
        monkeypatch.setattr(masked_merge, name, Remembered(getattr(masked_merge, name), 2))

    def loss(masks: torch.Tensor) -> torch.Tensor:
        rates.forward = lambda: Plan(masks, plan.kept, plan.waking)  # type: ignore[method-assign]
        return model(images).square().sum()

    at = masks.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(at), at)
    base, step = float(loss(masks).detach()), 1e-6
    for place, entering, kept in ((0, 26, 19), (1, 19, 14)):
        # The kept side would choose other partners; what merges keeps its own.
        for rank in (kept, kept + 1, entering - 1):
            moved = masks.clone()
            moved[place, 0, rank] += step
            wanted = (float(loss(moved).detach()) - base) / step
            assert float(grad[place, 0, rank]) == pytest.approx(wanted, rel=5e-3, abs=1e-6)
            assert abs(wanted) > 1e-6


class Remembered:
    """A function that answers as it did in the first `count` calls, in turns."""

    def __init__(self, call: Callable[..., object], count: int) -> None:
        self.call, self.count, self.turn, self.known = call, count, 0, []

    def __call__(self, *given: object) -> object:
        if len(self.known) < self.count:
            self.known.append(self.call(*given))
        self.turn += 1
        return self.known[(self.turn - 1) % self.count]


def test_gradients_reach_every_count_and_the_cost_falls_with_it() -> None:
    rates = MergeRates(SMALL, carry="active")
    rates.load(Schedule.merging(SMALL, [3, 2, 0, 4, 1]))
    cost = FlopsCost(SMALL)
    (grad,) = torch.autograd.grad(cost(rates()), rates.logits)
    assert (grad.abs().sum((1, 2)) > 0).sum() >= 4
    assert float(cost(rates()).detach()) == pytest.approx(cost.exactly(rates.schedule()), rel=1e-5)
    check_reachable(cost, rates, 0.6 * cost.dense)
    with pytest.raises(ScheduleError, match="cannot be reached"):
        check_reachable(cost, rates, 0.1 * cost.dense)


class Noise(torch.utils.data.Dataset):
    """Pictures of one colour each, whose class is the colour."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 80, 80, generator=generator), index % 7


def test_learned_numbers_meet_the_target_and_run_as_tome(tmp_path: Path) -> None:
    model = build("deit")
    shape, loader = shape_of(model), torch.utils.data.DataLoader(Noise(), 16)
    target = 0.7 * FlopsCost(shape).dense
    before = {name: x.clone() for name, x in model.state_dict().items()}
    counts = learn_schedule(model, loader, target_gflops=target, operator="tome", steps=6,
                            folder=tmp_path)  # fmt: skip
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    method = ToMe.from_schedule(tmp_path / "schedule.json")
    assert method == ToMe.from_schedule(counts) and method.plan(shape) == counts
    assert 0.9 * target < method.cost(shape) <= target
    assert counts.removed[0] == 0
    assert vistoken.parse(method.to_string()) == method
    assert (tmp_path / "schedule.png").stat().st_size > 1000


def test_what_does_not_go_together_is_refused() -> None:
    model = build("deit")
    shape = shape_of(model)
    with pytest.raises(ConfigError, match=r"operator='merge'.*diffrate, tome"):
        RateLearning(backbone=twin(model, shared=False), operator="merge", target_speedup=1.3)
    with pytest.raises(ConfigError, match=r"matching=16.*operator='diffrate'"):
        RateLearning(
            backbone=twin(model, shared=False), operator="tome", matching=16, target_speedup=1.3
        )
    with pytest.raises(ScheduleError, match="prunes"):
        ToMe.from_schedule(DiffRate(gflops=0.8 * FlopsCost(shape).dense).plan(shape))
    halved = ((26, 14), (14, 8), (8, 5), (5, 5))
    assert ToMe.from_schedule(Schedule(26, 1, halved)).plan(shape).counts == halved
    for beyond in (((26, 13),) + ((13, 13),) * 3, ((26, 14), (14, 7), (7, 7), (7, 7))):
        with pytest.raises(ScheduleError, match=r"merges (13 of 25|7 of 13) .* at most half"):
            ToMe.from_schedule(Schedule(26, 1, beyond))
    with pytest.raises(UnsupportedMethodError, match="operator='tome'"):
        RateLearning(backbone=build("no class"), target_speedup=1.3)
