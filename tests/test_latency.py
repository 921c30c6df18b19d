"""Latency tables: exact arithmetic on made-up times, real times of tiny models, files, errors."""

import copy
import dataclasses
import json
import math
import random
from itertools import pairwise

import pytest
import timm
import torch

import vistoken
from vistoken import LatencyTable, Schedule
from vistoken.errors import ConfigError, ScheduleError, UnsupportedMethodError
from vistoken.latency import table_path
from vistoken.methods import METHODS, DiffRate, EViT, ToMe
from vistoken.probe import Case, Probe, fit, wrapped_blocks
from vistoken.schedule import weakest
from vistoken.shape import ModelShape

CASE = Case(
    host="host", block="block", width=64, heads=2, hidden=256, depth=4, parameters=1, tokens=0,
    prefix=0, dtype="float32", batch=1, device="CPU", mode="eager", method="tome",
    proportional=True, step=8,
)  # fmt: skip


def made_up(seed=0, grid=(14, 14), prefix=1, depth=4, rising=True, where="mlp", reduce=0.2):
    """A table with random times; dense_ms is what its own columns give."""
    rng = random.Random(seed)
    shape = ModelShape.plain(64, depth, grid, prefix=prefix)
    tokens = (*range(8, shape.tokens, 8), shape.tokens)
    slope = [n * 0.01 for n in tokens]
    attn, mlp = ([s * (1 if rising else rng.uniform(0.7, 1.3)) for s in slope] for _ in range(2))
    adds = [reduce * rng.uniform(0.5, 1.5) for _ in tokens]
    rest = rng.uniform(0.1, 1.0)
    return LatencyTable(
        case=dataclasses.replace(CASE, tokens=shape.tokens, prefix=prefix, depth=depth),
        shape=shape, where=where, tokens=tokens,
        block_ms=tuple(a + m for a, m in zip(attn, mlp, strict=True)), attn_ms=tuple(attn),
        mlp_ms=tuple(mlp), reduce_ms=tuple(adds), dense_ms=rest + depth * (attn[-1] + mlp[-1]),
        rest_ms=rest, wrapped_rest_ms=rest, execution="made up", versions={"torch": "1"},
        seconds=0.0,
    )  # fmt: skip


def looked_up(table, column, n):
    """Linear interpolation, walked by hand."""
    knots = table.tokens
    n = max(n, knots[0])
    for left, right, low, high in zip(knots, knots[1:], column, column[1:], strict=False):
        if left <= n <= right:
            return low + (high - low) * (n - left) / (right - left)
    raise AssertionError(n)


def naive(table, kept):
    """Milliseconds of a schedule, block by block."""
    total, before = table.wrapped_rest_ms, table.shape.tokens
    for after in kept:
        total += looked_up(table, table.attn_ms, before)
        if after < before:
            total += looked_up(table, table.reduce_ms, before)
        total += looked_up(table, table.mlp_ms, after if table.where == "mlp" else before)
        before = after
    return total


@pytest.mark.parametrize("where", ["mlp", "block"])
@pytest.mark.parametrize("seed", range(6))
def test_predictions_equal_a_walk_by_hand(seed, where):
    rng = random.Random(seed)
    grid, prefix = (rng.randint(4, 15), rng.randint(4, 15)), rng.randint(0, 5)
    table = made_up(seed, grid, prefix, depth=5, rising=seed % 2 == 0, where=where)
    kept = sorted((rng.randint(prefix + 1, table.shape.tokens) for _ in range(5)), reverse=True)
    kept[0] = table.shape.tokens
    assert table.predict(kept) == pytest.approx(naive(table, kept), rel=1e-12)
    schedule = Schedule.from_lists(table.shape.tokens, prefix, kept, kept)
    assert table.predict(schedule) == table.predict(kept)
    assert table.speedup(kept) == pytest.approx(table.dense_ms / naive(table, kept))
    idle = [table.shape.tokens] * 5
    assert table.predict(idle) == pytest.approx(table.dense_ms), "without a reduction it is dense"


def test_cost_has_the_gradient_of_finite_differences():
    table = made_up(3, rising=False)
    rows = [[150.3, 121.9, 60.2, 20.7], [190.1, 100.0 + 1 / 3, 99.9, 9.5]]
    kept = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(table.cost, (kept,), eps=1e-6)
    assert table.cost(kept).shape == (2,)
    whole = table.cost(kept)[1].item()
    assert whole == pytest.approx(naive(table, rows[1]), rel=1e-12)
    (gradient,) = torch.autograd.grad(table.cost(kept).sum(), kept)
    assert (gradient != 0).all()
    assert table.cost(kept.detach().float()).dtype == torch.float32


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("grid", [(14, 14), (9, 11)])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "pool"])
def test_every_method_meets_a_speedup_and_wastes_little(name, grid, rising):
    table = made_up(1, grid, depth=12, rising=rising)
    method = METHODS[name].at_speedup(table, 1.4)
    reached = table.speedup(method.plan(table.shape))
    assert reached >= 1.4
    coarse = name in ("evit", "random", "zero_tprune")
    assert reached <= (1.6 if coarse else 1.5)
    counts = method.plan(table.shape).kept
    assert all(a >= b for a, b in pairwise(counts))


def test_weakest_walks_over_bumps():
    bumpy = {1.0: 9.0, 0.75: 5.0, 0.5: 7.0, 0.25: 2.0}
    assert weakest(6.0, bumpy.get, parts=4, halvings=0) == (0.75, 5.0)
    assert weakest(4.0, bumpy.get, parts=4, halvings=0) == (0.25, 2.0)
    assert weakest(1.0, bumpy.get, parts=4, halvings=0) == (None, 2.0)
    assert weakest(9.0, bumpy.get, parts=4) == (1.0, 9.0)
    share, _ = weakest(0.3, lambda share: share**2, parts=8, halvings=20)
    assert share == pytest.approx(math.sqrt(0.3), abs=1e-5)


@pytest.mark.parametrize("name", ["tome", "diffrate", "evit"])
def test_counts_are_rounded(name):
    table = made_up(2, depth=12)
    method = METHODS[name].at_speedup(table, 1.5, round_to=8)
    assert method.round_to == 8
    kept = method.plan(table.shape).kept
    assert all(n % 8 == 0 or n == table.shape.tokens for n in kept)
    assert table.speedup(kept) >= 1.5
    schedule = Schedule.for_speedup(None, 1.5, table, method=name, round_to=8)
    assert schedule == method.plan(table.shape)


def test_no_speedup_is_no_reduction():
    table = made_up(0)
    assert ToMe.at_speedup(table, 1.0) == ToMe(r=0)


def test_out_of_reach_says_what_is_possible():
    table = made_up(0, depth=12)
    with pytest.raises(ScheduleError, match=r"speed-up of 40 is out of reach.*tome runs at most"):
        ToMe.at_speedup(table, 40)
    with pytest.raises(ScheduleError) as caught:
        EViT.at_speedup(table, 40)
    most = float(str(caught.value).split("at most ")[1].split(" times")[0])
    assert table.speedup(EViT.at_speedup(table, most * 0.99).plan(table.shape)) >= most * 0.99
    dear = made_up(0, depth=12, reduce=9.0)
    with pytest.raises(ScheduleError, match="out of reach"):
        ToMe.at_speedup(dear, 1.2)


def test_wrong_requests():
    table = made_up(0)
    with pytest.raises(ConfigError, match=r"speedup=0.5: must be 1 or larger"):
        Schedule.for_speedup(None, 0.5, table)
    with pytest.raises(ConfigError, match="must be 1 or larger"):
        ToMe.at_speedup(table, float("nan"))
    with pytest.raises(ConfigError, match="batch=4: the table was measured at 1"):
        Schedule.for_speedup(None, 1.5, table, batch=4)
    with pytest.raises(ConfigError, match="method='nope': must be one of tome"):
        Schedule.for_speedup(None, 1.5, table, method="nope")
    with pytest.raises(ConfigError, match="round_to=0"):
        Schedule.for_speedup(None, 1.5, table, round_to=0)
    with pytest.raises(ScheduleError, match=r"3 counts were given, .* 4 blocks"):
        table.predict([197, 100, 50])
    with pytest.raises(ScheduleError, match="starts with 50 tokens, the table's model with 197"):
        table.predict(Schedule(50, 1, ((50, 50),) * 4))
    with pytest.raises(ConfigError, match="columns"):
        dataclasses.replace(table, attn_ms=(1.0,))
    with pytest.raises(ConfigError, match="must rise and end with"):
        dataclasses.replace(table, tokens=table.tokens[::-1])


def test_file_round_trip(tmp_path):
    table = made_up(5, (9, 11), prefix=5)
    path = table.save(tmp_path / "deep" / "table.json")
    assert LatencyTable.load(path) == table
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is no latency table"):
        LatencyTable.load(path)


def tiny(name="deit3_small_patch16_224", **extra):
    torch.manual_seed(0)
    return timm.create_model(
        name, img_size=48, embed_dim=32, num_heads=2, depth=3, num_classes=5, **extra
    ).eval()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pool"])
def test_measures_a_real_model(method):
    model = tiny()
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    torch.manual_seed(7)
    table = LatencyTable.measure(model, batch=2, method=method, repeats=1)
    after = torch.rand(1)
    torch.manual_seed(7)
    if method != "random":
        assert torch.equal(after, torch.rand(1)), "the user's random numbers are left alone"
    assert {name: dict(m.__dict__) for name, m in model.named_modules()}.keys() == before.keys()
    assert all(set(m.__dict__) == set(before[name]) for name, m in model.named_modules())
    assert table.tokens == (4, 6, 8, 10)
    times = (*table.block_ms, *table.attn_ms, table.rest_ms, table.dense_ms)
    assert all(0 < ms < 1e4 for ms in times)
    assert all(ms >= 0 for ms in (*table.mlp_ms, *table.reduce_ms))
    whole = table.rest_ms + 3 * table.block_ms[-1]
    assert whole == pytest.approx(table.dense_ms), "the blocks make up the model"
    assert (table.case.batch, table.case.width, table.case.heads) == (2, 32, 2)
    assert (table.case.method, table.case.mode, table.case.dtype) == (method, "eager", "float32")


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_base_patch16_siglip_224"])
def test_other_families_are_measured_too(name):
    extra = {} if "siglip" in name else {"mlp_ratio": 4 * 2 / 3}
    model = timm.create_model(
        name, img_size=56 if "eva" in name else 48, embed_dim=48, num_heads=2, depth=2, **extra
    ).eval()
    table = LatencyTable.measure(model, method="tome", repeats=1)
    assert all(ms > 0 for ms in table.attn_ms)


def test_transformers_are_measured_too():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=48, patch_size=16,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    table = LatencyTable.measure(model, method="tome", repeats=1)
    assert table.tokens[-1] == 10 and table.case.hidden == 64


def test_blocks_really_do_what_is_timed():
    model = tiny()
    probe = Probe(model, torch.zeros(2, 3, 48, 48), None, "tome:r=2", None, 2)
    wrapped = vistoken.wrap(copy.deepcopy(model), probe.method)
    attachment = vistoken.api.attachment_of(wrapped)
    dense = vistoken.models.detect.find(model)
    with torch.no_grad():
        calls = probe.calls(dense, attachment)
        out = {name: [call() for call in several] for name, several in calls.items()}
        assert all(len(several) == 1 for several in out.values())
        shapes = {name: tuple(several[0].shape) for name, several in out.items()}
        assert shapes["block", 8] == shapes["idle", 8] == (2, 8, 32)
        assert shapes["step", 8] == (2, 8 - probe.removal(8), 32)
        assert shapes["cut", 8] == (2, 2, 32)
        assert shapes["dense", 0] == (2, 5)
        fired = []
        handle = model.blocks[2].mlp.register_forward_hook(lambda *_: fired.append(1))
        assert calls["rest", 0][0]().shape == (2, 5) and not fired
        assert calls["dense", 0][0]().shape == (2, 5) and fired
        handle.remove()
    assert "forward" not in model.blocks[0].__dict__


def test_the_fused_chain_is_timed_where_it_runs(monkeypatch):
    """Only the chain's own dispatch is changed: its kernels stay on their torch references."""
    monkeypatch.setattr(vistoken.fast, "use_triton", lambda x: True)
    ran = []
    own = vistoken.fast.FusedBlock.run
    monkeypatch.setattr(
        vistoken.fast.FusedBlock, "run", lambda self, x: ran.append(x.shape[1]) or own(self, x)
    )
    norms = []
    layer_norm = torch.nn.functional.layer_norm
    for method in ("tome", "diffrate", "zero_tprune"):
        LatencyTable.measure(tiny(), method=method, repeats=1)
        assert {4, 6, 8, 10} <= set(ran), method
        ran.clear()
    probe = Probe(tiny(), None, 1, "tome:r=2", None, 2)
    wrapped = vistoken.wrap(tiny(), probe.method)
    attachment, x = vistoken.api.attachment_of(wrapped), torch.randn(1, 8, 32)
    call, last = wrapped_blocks(attachment, [1, 2], x, (), {}, probe.step(8, 2))
    with torch.no_grad():
        assert call().shape == last().shape == (1, 6, 32)
        monkeypatch.setattr(
            torch.nn.functional, "layer_norm", lambda *a: norms.append(1) or layer_norm(*a)
        )
        assert call().shape == (1, 6, 32)
    assert len(norms) == 2, "norm2 and the next block's norm1; its own norm1 came along"


def test_the_steps_timed_prune_and_merge_as_the_method_does():
    model = tiny()
    probe = Probe(model, None, 1, DiffRate(schedule=[[10, 9, 6], [10, 7, 5]]), None, 2)
    step = probe.step(10, 4)
    assert (step.tokens, step.merged) == (10, 6)
    assert step.pruned == 8, "half of what goes is pruned, as in the last block of the lists"
    tome = Probe(model, None, 1, "tome:r=2", None, 2)
    assert tome.step(10, 4).pruned == 10, "ToMe prunes nothing"
    assert tome.removal(10) == round(9 * 2 / 7), "2 of the 7 patches of its middle step"


def test_tables_are_cut_for_fewer_tokens():
    rope, mask = torch.rand(9, 8), torch.rand(1, 1, 10, 10)
    args, kwargs = fit(((rope, None), {"mask": mask, "row": mask[:, :, :1]}), 10, 1, 6)
    assert torch.equal(args[0], rope[:5]) and args[1] is None
    assert torch.equal(kwargs["mask"], mask[..., :6, :6])
    assert torch.equal(kwargs["row"], mask[:, :, :1, :6])


def test_cache_is_used_and_rebuilt(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny()
    first = LatencyTable.cached(model, batch=2, repeats=1)
    path = table_path(first.case)
    assert path.parent == tmp_path / "vistoken" and path.is_file()
    assert first.case.method == "diffrate", "the default"
    assert LatencyTable.cached(model, batch=2, repeats=1) == first
    slow = dataclasses.replace(first, dense_ms=1e6)
    slow.save(path)
    found = Schedule.for_speedup(model, 100, batch=2)
    assert found == DiffRate.at_speedup(slow, 100).plan(first.shape), "read from the cache"
    assert LatencyTable.cached(model, batch=2, repeats=1, refresh=True) != first
    data = json.loads(path.read_text())
    for change in ({"versions": {"torch": "0"}}, {"tokens": "no"}, {"dense_ms": None, "case": 3}):
        path.write_text(json.dumps({**data, "dense_ms": -1.0, **change}))
        assert LatencyTable.cached(model, batch=2, repeats=1).dense_ms > 0, change
    other = LatencyTable.cached(model, batch=1, repeats=1)
    assert table_path(other.case) != path
    wrapped = vistoken.wrap(model, "tome:r=2")
    assert LatencyTable.cached(wrapped, repeats=1).case.method == "tome"
    assert len(list(path.parent.iterdir())) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert table_path(first.case).is_absolute()


def cases(*probed):
    """Cases of models with a method each; a table of one serves no other."""
    found = [Probe(model, None, 1, method, None, 2).case for model, method in probed]
    assert len({table_path(case) for case in found}) == len(set(found))
    return set(found)


def test_models_and_settings_that_take_other_times_share_no_table():
    def model(**more):
        return timm.create_model(
            "vit_tiny_patch16_224", embed_dim=32, num_heads=2, depth=2, num_classes=5, **more
        ).eval()

    assert len(cases(*((tiny(), f"tome:r={r}") for r in (1, 2)))) == 1, "of any budget"
    sizes = ((64, 16), (256, 64), (128, 32))
    assert len(cases(*((model(img_size=n, patch_size=p), "tome:r=2") for n, p in sizes))) == 3
    image = torch.zeros(1, 3, 48, 48)
    overlap = [model(img_size=48) for _ in range(2)]
    overlap[1].patch_embed.proj = torch.nn.Conv2d(3, 32, 18, 16, padding=1)
    assert len({Probe(m, image, None, "tome:r=2", None, 2).case for m in overlap}) == 2
    heads = [model(img_size=48) for _ in range(2)]
    heads[1].reset_classifier(1000)
    assert len(cases(*((m, "tome:r=2") for m in heads))) == 2
    fused = (EViT(0.5, (1,), fuse=fuse) for fuse in (True, False))
    assert len(cases(*((tiny(), method) for method in fused))) == 2


@pytest.mark.parametrize("count", [999, 0, -3, 198])
def test_counts_that_no_block_can_leave_are_refused(count):
    table = made_up()
    with pytest.raises(ScheduleError, match=f"^{count} tokens cannot leave .* between 1 and the 1"):
        table.predict([150, 100, count, 60])


def test_cost_takes_integers():
    table, counts = made_up(), [150, 100, 80, 60]
    cost = table.cost(torch.tensor(counts))
    assert cost.dtype == torch.float64
    assert cost.item() == table.predict(counts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "pool"}, "method='pool': its counts cannot be chosen freely"),
        ({"method": "nope"}, "unknown method"),
        ({"mode": "graph"}, "mode='graph': CUDA graphs need CUDA"),
        ({"mode": "fast"}, "mode='fast': must be one of"),
        ({"batch": 0}, "batch=0: must be a whole number >= 1"),
        ({"step": 0}, "step=0"),
        ({"step": 20}, "step=20: must be below the model's 10 tokens"),
        ({"repeats": 0}, "repeats=0"),
        ({"images": torch.zeros(1, 3, 48, 48), "batch": 1}, "images were given"),
    ],
)
def test_measuring_names_what_is_wrong(options, words):
    with pytest.raises(ConfigError, match=words):
        LatencyTable.measure(tiny(), **options)


def test_models_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"model\.eval"):
        LatencyTable.measure(tiny().train())
    with pytest.raises(UnsupportedMethodError, match="no class token"):
        LatencyTable.measure(
            timm.create_model("vit_base_patch16_siglip_224", embed_dim=32, num_heads=2, depth=2)
            .eval(), method="evit",
        )  # fmt: skip


def test_a_faster_patch_embedding_counts_for_the_wrapped_model_alone():
    table = made_up()
    faster = dataclasses.replace(table, wrapped_rest_ms=table.rest_ms / 2)
    kept = [150, 100, 80, 60]
    assert faster.predict(kept) == pytest.approx(table.predict(kept) - table.rest_ms / 2)
    assert faster.dense_ms == table.dense_ms
