"""Schedules: rounding, caps, lists, targets and the errors they raise."""

import random

import pytest

from vistoken.errors import ConfigError, ScheduleError
from vistoken.methods import METHODS, DiffRate, EViT, Pool, RandomDrop, ToMe, ZeroTPrune, parse
from vistoken.methods.diffrate import closed_form
from vistoken.schedule import Schedule, solve
from vistoken.shape import ModelShape

SMALL = ModelShape.plain(384, 12)


def test_decreasing_is_the_published_row():
    row = "16 15 14 13 13 12 11 11 10 9 9 8 7 6 6 5 4 4 3 2 2 1 0 0"
    assert ToMe(r=8, schedule="decreasing").removals(24) == tuple(map(int, row.split()))


def test_at_most_half_goes_per_block():
    shape = ModelShape.plain(192, 3)
    assert ToMe(r=100).plan(shape).kept == (99, 50, 26)


def test_list_is_padded_with_zeros_and_too_long_a_list_is_refused():
    assert ToMe(r=[5, 3]).plan(SMALL).kept == (192, *(189,) * 11)
    with pytest.raises(ScheduleError, match="13 entries, the model has 12 blocks"):
        ToMe(r=[1] * 13).plan(SMALL)


@pytest.mark.parametrize("multiple", [2, 8, 16])
@pytest.mark.parametrize("text", ["tome:r=13", "diffrate:gflops=2.9", "evit", "zero_tprune"])
def test_round_to(text, multiple):
    plain = parse(text).plan(SMALL)
    glue = "," if ":" in text else ":"
    rounded = parse(f"{text}{glue}round_to={multiple}").plan(SMALL)
    before = SMALL.tokens
    for exact, count in zip(plain.kept, rounded.kept, strict=True):
        assert exact <= count < exact + multiple
        assert count % multiple == 0 or count == before
        before = count


def test_pool_counts_odd_grids_up():
    shape = ModelShape.plain(192, 4, (13, 17))
    assert Pool(at=(1, 2)).plan(shape).kept == (222, 1 + 7 * 9, 1 + 4 * 5, 1 + 4 * 5)


def test_schedule_refuses_rising_counts_and_empty_ends():
    with pytest.raises(ScheduleError, match="block 1: 10 tokens enter, 12 after pruning"):
        Schedule(20, 1, ((20, 10), (12, 12)))
    with pytest.raises(ScheduleError, match="at least one patch token"):
        Schedule(20, 1, ((20, 1),))
    with pytest.raises(ScheduleError, match="keep up to 300 tokens, the model has 197"):
        Schedule.from_lists(197, 1, [300], [200])
    with pytest.raises(ScheduleError, match="2 prune counts but 1"):
        Schedule.from_lists(197, 1, [100, 90], [80])


def test_file_round_trip(tmp_path):
    schedule = DiffRate(gflops=2.9).plan(SMALL)
    schedule.save(tmp_path / "counts.json")
    assert Schedule.load(tmp_path / "counts.json") == schedule
    again = DiffRate(schedule=str(tmp_path / "counts.json"))
    assert again.plan(SMALL) == schedule == DiffRate(schedule=schedule).plan(SMALL)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ScheduleError, match="lacks"):
        Schedule.load(tmp_path / "bad.json")


def test_diffrate_lists_of_another_size_need_rescale():
    schedule = DiffRate(gflops=2.9).plan(SMALL)
    large = SMALL.at((24, 24))
    with pytest.raises(ScheduleError, match="made for 197 tokens, the model has 577"):
        DiffRate(schedule=schedule).plan(large)
    stretched = DiffRate(schedule=schedule, rescale=True).plan(large)
    for small, big in zip(schedule.kept, stretched.kept, strict=True):
        assert big - 1 == pytest.approx((small - 1) * 576 / 196, abs=1)


@pytest.mark.parametrize("seed", range(20))
def test_closed_form_meets_its_target(seed):
    rng = random.Random(seed)
    grid = (rng.randint(5, 30), rng.randint(5, 30))
    shape = ModelShape.plain(64 * rng.randint(2, 16), rng.randint(3, 30), grid)
    dense = DiffRate(gflops=1e9).cost(shape)
    target = dense * rng.uniform(0.45, 1.0)
    schedule = closed_form(shape, target)
    assert schedule.gflops(shape) <= target
    assert schedule.gflops(shape) >= 0.9 * target or shape.patches < 60
    assert schedule.counts[0] == (shape.tokens, shape.tokens), "block 0 never compresses"


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("share", [0.9, 0.75, 0.62])
def test_at_gflops_meets_the_budget_closely(name, share):
    shape = ModelShape.plain(192, 12, classes=10)
    target = share * ToMe(r=0).cost(shape)
    method = METHODS[name].at_gflops(shape, target)
    assert method.cost(shape) <= target
    assert method.cost(shape) >= target * (0.85 if name == "pool" else 0.94)


@pytest.mark.parametrize("name", list(METHODS))
def test_at_gflops_says_what_is_possible(name):
    with pytest.raises(ScheduleError, match="out of reach"):
        METHODS[name].at_gflops(SMALL, 0.1)


def test_solve_finds_the_edge():
    assert solve(2.0, 0.0, 10.0, lambda x: 5 - x) == pytest.approx(3.0)
    assert solve(9.0, 0.0, 10.0, lambda x: 5 - x) == 0.0


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("tome:r=13", ToMe(r=13)),
        ("tome:r=[8,8,4],proportional=false", ToMe(r=(8, 8, 4), proportional=False)),
        ("diffrate:gflops=2.9", DiffRate(gflops=2.9)),
        ("evit:keep_rate=0.7,at=[3,6]", EViT(keep_rate=0.7, at=(3, 6))),
        ("random", RandomDrop()),
        ("zero_tprune:keep_rate=0.8,round_to=8", ZeroTPrune(keep_rate=0.8, round_to=8)),
    ],
)
def test_parse(text, method):
    assert parse(text) == method
    assert parse(method.to_string()) == method


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tomee", "unknown method 'tomee'; there are tome,"),
        ("tome:q=3", "'q=3' is no setting of tome; allowed: proportional, r"),
        ("tome:r=-1", "ToMe.r=-1.: must be an integer >= 0, or a list"),
        ("tome:r=1.5", "must be an integer"),
        ("tome:schedule=rising", "must be one of"),
        ("tome:round_to=0", "round_to=0.: must be an integer >= 1"),
        ("evit:keep_rate=0", "must be in .0, 1."),
        ("evit:keep_rate=1.2", "must be in .0, 1."),
        ("evit:at=[6,3]", "rising block indices"),
        ("evit:at=[]", "rising block indices"),
        ("diffrate", "gflops=... or schedule=...; 0"),
        ("diffrate:gflops=-1", "larger than 0"),
        ("diffrate:gflops=2.9,model=resnet", "must be one of"),
        ("zero_tprune:similar=2", "in .0, 1."),
        ("zero_tprune:iterations=[1,2]", "three integers"),
        ("mctf:temperatures=[1,2]", "three positive numbers"),
        ("mctf:temperatures=[1e999,20,40]", "three positive numbers"),
        ("pool:stride=1", "an integer >= 2"),
        ("pool:round_to=8", "grid cells cannot be rounded"),
        ("tofu:prune_blocks=-1", ">= 0"),
    ],
)
def test_bad_settings_name_the_argument(text, words):
    with pytest.raises(ConfigError, match=words):
        parse(text)


def test_unknown_label_lists_the_known_ones():
    with pytest.raises(ScheduleError, match=r"there are \['2.3', '2.5'"):
        DiffRate(gflops=2.2, model="vit_small_deit").plan(SMALL)


def test_pool_beyond_the_depth_is_refused():
    with pytest.raises(ScheduleError, match="blocks 0 to 3"):
        Pool(at=(4,)).plan(ModelShape.plain(64, 4))
