"""Learned counts by one call, counts that meet a cost, and what the rates refuse to hold."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

from lightning.pytorch import Trainer

import vistoken
from vistoken.api import shape_of
from vistoken.errors import AlreadyWrappedError, ConfigError, ScheduleError
from vistoken.latency import LatencyTable
from vistoken.methods import DiffRate
from vistoken.probe import Case
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape
from vistoken.train import judge, search
from vistoken.train.costs import FlopsCost, LatencyCost
from vistoken.train.learn import RateLearning
from vistoken.train.masked import twin
from vistoken.train.operators import OPERATORS
from vistoken.train.rates import Rates
from vistoken.train.search import learn_schedule

TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", num_classes=5, **TINY).eval()


@pytest.fixture
def loader() -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(12, 3, 48, 48), torch.arange(12) % 5), 4)


def table_of(model: torch.nn.Module, method: str = "diffrate") -> LatencyTable:
    """Made-up times: a block costs its tokens, and reducing in it as much as eight more."""
    shape = shape_of(model)
    case = Case("h", "b", 24, 2, 96, 3, 1, 37, 1, "float32", 2, "cpu", "eager", method, True, 8)
    counts = (1, 13, 25, 37)
    half = tuple(n / 20 for n in counts)
    return LatencyTable(case, shape, "mlp", counts, tuple(n / 10 for n in counts), half, half,
                        (0.4,) * 4, 3 * 3.7 + 1.0, 1.0, 1.0, "x", {}, 0.0)  # fmt: skip


@pytest.mark.parametrize("cost", ["flops", "latency"])
def test_counts_meet_the_target_and_leave_the_model_alone(model, loader, cost, tmp_path) -> None:
    table = table_of(model) if cost == "latency" else None
    measure = FlopsCost(shape_of(model)) if table is None else LatencyCost(table)
    speedup = 1.25
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, 48, 48)
    before = model(images)
    schedule = learn_schedule(
        model, loader, target_speedup=speedup, cost=cost, table=table, steps=5, folder=tmp_path
    )
    target = measure.dense / speedup
    assert measure.exactly(schedule) <= target
    assert schedule == Schedule.load(tmp_path / "schedule.json")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(images), before)
    vistoken.wrap(model, DiffRate(schedule=schedule))(images)


def test_flops_are_used_up(model, loader) -> None:
    shape = shape_of(model)
    wanted = 0.75 * FlopsCost(shape).dense
    spent = learn_schedule(model, loader, target_gflops=wanted, steps=3).gflops(shape)
    token = (FlopsCost(shape).dense - FlopsCost(shape).exactly(
        Schedule(37, 1, ((37, 37), (36, 36), (36, 36)))))  # fmt: skip
    assert wanted - 2 * token < spent <= wanted


def test_learning_moves_the_counts_the_way_the_data_says(model) -> None:
    """Where labels are read off one corner of the picture alone, what is attended to matters."""
    torch.manual_seed(2)
    images, labels = torch.randn(32, 3, 48, 48), torch.arange(32) % 5
    loader = DataLoader(TensorDataset(images, labels), 8)
    shape = shape_of(model)
    start = FlopsCost(shape).closest(0.7 * FlopsCost(shape).dense)
    learned = learn_schedule(model, loader, target_gflops=0.7 * FlopsCost(shape).dense, steps=60,
                             lr=0.3)  # fmt: skip
    assert learned != start
    with torch.no_grad():
        dense = model(images).log_softmax(-1)

        def divergence(schedule: Schedule) -> float:
            vistoken.wrap(model, DiffRate(schedule=schedule))
            found = model(images).log_softmax(-1)
            vistoken.unwrap(model)
            return float(F.kl_div(found, dense, log_target=True, reduction="batchmean"))

        assert divergence(learned) < divergence(start)


WHOLE = "must be a whole number, 1 or larger"
POSITIVE, SHARE = "must be a finite number, larger than 0", "must be a finite number, 0 or larger"


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("steps", (2.5, 2.0, 0, -1, True, "3", None, float("nan"), float("inf")), WHOLE),
        ("lr", (0, -0.1, True, "3", None, float("nan"), float("inf")), POSITIVE),
        ("labels", (-0.1, True, "3", None, float("nan"), float("inf")), SHARE),
        ("distill", (-0.1, True, "3", None, float("nan"), float("inf")), SHARE),
        ("target_gflops", (0, -1.0, True, "3", float("nan"), float("inf")), POSITIVE),
        ("target_speedup", (1, 0.5, True, "3", float("nan"), float("inf")), "larger than 1"),
        ("blocks", (1, "1", [1.5], [True], [None]), "must be rising whole numbers, or None"),
    ],
)
def test_numbers_of_another_kind_or_range_are_refused(name, values, allowed) -> None:
    target = {} if name.startswith("target") else {"target_speedup": 1.2}
    for value in values:
        with pytest.raises(ConfigError, match=f"^{re.escape(f'{name}={value!r}')}: .*{allowed}"):
            # Neither is looked at before the numbers are.
            learn_schedule(None, None, **{**target, name: value})


def test_numbers_of_numpy_are_numbers(model, loader) -> None:
    measure = FlopsCost(shape_of(model))
    target = np.float64(0.8 * measure.dense)
    given = {"steps": np.int64(2), "lr": np.float32(0.25), "blocks": np.array([1, 2])}
    assert measure.exactly(learn_schedule(model, loader, target_gflops=target, **given)) <= target


def test_learning_turns_gradients_on_for_itself_alone(model, loader) -> None:
    wanted = learn_schedule(model, loader, target_speedup=1.25, steps=3, lr=0.3)
    with torch.no_grad():
        assert learn_schedule(model, loader, target_speedup=1.25, steps=3, lr=0.3) == wanted
        assert not torch.is_grad_enabled()
        with pytest.raises(ConfigError, match="gave no batch"):
            learn_schedule(model, [], target_speedup=1.25, steps=3)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_inference_mode_is_refused_by_name(model, loader, tmp_path: Path) -> None:
    def learn(net: torch.nn.Module) -> None:
        learn_schedule(net, loader, target_speedup=1.25, steps=2, folder=tmp_path / "out")

    with torch.inference_mode():
        with pytest.raises(ConfigError, match=r"under torch\.inference_mode\(\).*no_grad"):
            learn(model)
        made = timm.create_model("deit_tiny_patch16_224", num_classes=5, **TINY).eval()
    with pytest.raises(ConfigError, match=r"model: cls_token was made under .*inference_mode"):
        learn(made)
    assert not (tmp_path / "out").exists()


def test_wrong_calls_are_refused_before_anything_changes(model, loader) -> None:
    with pytest.raises(ConfigError, match="table"):
        learn_schedule(model, loader, target_speedup=1.2, table=table_of(model))
    with pytest.raises(ConfigError, match="target"):
        learn_schedule(model, loader, steps=1)
    with pytest.raises(ScheduleError, match="reached"):
        learn_schedule(model, loader, target_speedup=400.0, steps=1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    vistoken.wrap(model, "tome:r=1")
    with pytest.raises(AlreadyWrappedError):
        learn_schedule(model, loader, target_speedup=1.2, steps=1)


def test_meeting_a_cost_keeps_the_form() -> None:
    shape = ModelShape.plain(64, 4, (5, 5))
    cost = FlopsCost(shape)
    given = Schedule(26, 1, ((26, 26), (20, 18), (18, 18), (10, 6)))
    for share in (0.98, 0.9, 0.8, 0.6):
        met = cost.meet(given, share * cost.dense)
        assert share * cost.dense * 0.93 < cost.exactly(met) <= share * cost.dense
        assert met.steps[0].idle and met.steps[2].idle, "blocks that rest go on resting"
    with pytest.raises(ScheduleError, match="reach"):
        cost.meet(given, 0.01 * cost.dense)


# What rates hold ----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 2, 3, 4, 8])
def test_every_schedule_that_candidates_can_hold_is_held(granularity: int) -> None:
    shape = ModelShape.plain(64, 3, (7, 3))
    rates = Rates(shape, granularity=granularity)
    smallest = 21 - 20 // granularity * granularity
    assert rates.fewest == smallest + 1
    for count in range(smallest, 22):
        schedule = Schedule(22, 1, ((22, 22), (count + 1, count + 1), (smallest + 1,) * 2))
        rates.load(schedule)
        assert rates.schedule() == schedule


def test_counts_below_the_smallest_candidate_are_refused_and_starts_raised() -> None:
    rates = Rates(ModelShape.plain(64, 3, (7, 3)), granularity=8)
    before = rates.logits.detach().clone()
    low = Schedule(22, 1, ((22, 22), (9, 8), (7, 3)))
    with pytest.raises(ScheduleError, match=r"block 2 keeps 3 tokens.* 6; .*divides 20"):
        rates.load(low)
    assert torch.equal(rates.logits, before)
    rates.load(rates.allowed(low))
    assert rates.schedule().counts == ((22, 22), (9, 8), (7, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rates_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="bf16-mixed"):
        Rates(ModelShape.plain(64, 3, (7, 3))).to(dtype)()


def test_trainers_in_half_precision_are_refused_before_the_first_step(model, loader) -> None:
    module = RateLearning(backbone=model, target_speedup=1.2)
    trainer = Trainer(accelerator="cpu", precision="bf16-true", max_steps=1, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    with pytest.raises(ConfigError, match=r"precision='bf16-true'.*bf16-mixed"):
        trainer.fit(module, loader)


def test_a_model_without_a_number_of_classes_is_learned(model, loader, tmp_path: Path) -> None:
    class Plain(torch.nn.Module):
        def __init__(self, net: torch.nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    assert learn_schedule(Plain(model), loader, target_speedup=1.2, steps=2).depth == 3


@pytest.mark.parametrize("operator", ["diffrate", "tome"])
@pytest.mark.parametrize("cost", ["flops", "latency"])
def test_a_step_asks_the_device_for_no_value(model, operator, cost, tmp_path) -> None:
    """It would wait for the device, and a CUDA graph could not hold it."""
    table = table_of(model, operator).save(tmp_path / "t.json") if cost == "latency" else None
    learning = RateLearning(
        backbone=model, operator=operator, cost=cost, target_speedup=1.2, distill=1.0,
        latency_table=None if table is None else str(table),
    )  # fmt: skip
    learning.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    learning.setup("fit")
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        losses = learning.losses(torch.randn(3, 3, 48, 48), torch.tensor([0, 4, 2]), torch.ones(()))
        # A product's gradient counts zeros on the host, though not under a watch like this.
        assert not [name for name in gradients(losses["loss"]) if name.startswith("Prod")]
        losses["loss"].backward()
    assert learning.rates.logits.grad is not None
    assert any("backward" in op for op in called)
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    assert not [op for op in called if any(word in op for word in waits)]


def gradients(loss: torch.Tensor) -> set[str]:
    """Names of all functions that the backward pass calls."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        function = todo.pop()
        if function is not None and function not in seen:
            seen.add(function)
            todo += [before for before, _ in function.next_functions]
    return {function.name() for function in seen}


def test_plain_iterables_of_batches_are_one_loader(model, loader) -> None:
    batches = [tuple(batch) for batch in loader]
    wanted = learn_schedule(model, loader, target_speedup=1.25, steps=5)
    assert learn_schedule(model, batches, target_speedup=1.25, steps=5) == wanted


def test_a_loader_that_runs_out_is_an_error(model, loader) -> None:
    for spent in ([], (tuple(batch) for batch in loader)):
        with pytest.raises(ConfigError, match="loader: a pass gave no batch"):
            learn_schedule(model, spent, target_speedup=1.25, steps=5)


@pytest.mark.parametrize("operator", ["diffrate", "tome"])
def test_counts_clearly_worse_than_unlearned_ones_are_given_up(
    model: torch.nn.Module, loader: DataLoader, operator: str
) -> None:
    for tensor in model.parameters():  # So that what is dropped matters.
        tensor.data.mul_(3)
    shape, kind = shape_of(model), OPERATORS[operator]
    module = RateLearning(
        backbone=twin(model, shared=False), operator=operator, labels=0.0, distill=1.0,
        target_gflops=0.8 * FlopsCost(shape).dense,
    )  # fmt: skip
    module.setup("fit")
    assert module.cost is not None
    plain = module.rates.allowed(module.cost.closest(module.target, kind.method))
    plain = module.cost.meet(plain, module.target, module.rates.allowed)
    early = {"diffrate": ((37, 37), (5, 3), (3, 2)), "tome": ((37, 19), (19, 10), (10, 6))}
    poor = Schedule(37, 1, early[operator])
    images = torch.cat([batch[0] for batch in loader])
    with torch.no_grad():
        dense = model(images).log_softmax(-1)

    def divergence(schedule: Schedule) -> torch.Tensor:
        with torch.no_grad():
            own = vistoken.wrap(twin(model), kind.build(schedule))(images).log_softmax(-1)
        return F.kl_div(own, dense, log_target=True, reduction="none").sum(1).double()

    found = judge.losses(module, poor, list(loader))
    assert torch.allclose(found, divergence(poor), atol=1e-6), "each image's own loss"
    gap = divergence(poor) - divergence(plain)
    assert gap.mean() > 2 * gap.std() / len(gap) ** 0.5
    with pytest.warns(UserWarning, match=f"{operator} without learning .* taking these"):
        assert judge.better(module, poor, loader) == plain
    assert judge.better(module, plain, loader) == plain
    noisy = [(images[:2], torch.zeros(2, dtype=torch.long))]
    noisy_gap = gap[:2]
    kept = judge.better(module, poor, noisy)
    assert (kept == poor) == bool(noisy_gap.mean() <= 2 * noisy_gap.std() / 2**0.5)
    assert judge.better(module, poor, []) == poor, "nothing speaks against them"


def test_the_judge_has_the_last_word(model, loader, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FlopsCost(shape_of(model)).closest(0.8 * FlopsCost(shape_of(model)).dense)
    monkeypatch.setattr(search, "better", lambda module, learned, batches: plain)
    target = 0.8 * FlopsCost(shape_of(model)).dense
    assert learn_schedule(model, loader, target_gflops=target, steps=2) == plain
