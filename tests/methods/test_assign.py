"""Every method's choice of tokens against a naive loop, and the invariants of its paper."""

import math

import pytest
import torch

from vistoken.methods import (
    MCTF,
    DiffRate,
    EViT,
    Features,
    Pool,
    RandomDrop,
    ToFu,
    ToMe,
    ZeroTPrune,
)
from vistoken.schedule import Schedule, Step
from vistoken.state import TokenState

PREFIXES = [0, 1, 2, 5]


def features(batch=2, heads=3, tokens=26, dim=8, channels=12, seed=0, **extra):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, tokens, dim, generator=g, dtype=torch.float64) for _ in "qk")
    x = torch.randn(batch, tokens, channels, generator=g, dtype=torch.float64)
    attention = (q @ k.transpose(-1, -2) * dim**-0.5).softmax(-1)
    return Features(
        x=x,
        class_row=attention[:, :, 0].mean(1),
        received=attention.mean((1, 2)),
        query=q,
        keys=k,
        scale=dim**-0.5,
        **extra,
    )


def state(tokens, prefix, size=None):
    return TokenState(tokens, prefix, (1, tokens - prefix), size)


def sizes(batch, tokens, prefix, seed=1):
    g = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 5, (batch, tokens), generator=g).float()
    size[:, :prefix] = 1
    return size


def step(tokens, merged, pruned=None, block=0, depth=12):
    return Step(block, depth, tokens, merged if pruned is None else pruned, merged)


def groups(assignment, image):
    """Members of every slot of one image, representative first."""
    slots = [[int(t)] for t in assignment.keep[image]]
    if assignment.src is not None:
        for token, slot in zip(assignment.src[image], assignment.dst[image], strict=True):
            slots[int(slot)].append(int(token))
    return slots


def naive_tome(metric, prefix, r):
    """ToMe of one image by sorting all pairs: slots in the paper's order."""
    unit = [row / row.norm() for row in metric]
    even = [i for i in range(0, len(unit), 2) if i >= prefix]
    odd = [j for j in range(1, len(unit), 2) if j >= prefix]
    best = {i: max(odd, key=lambda j: float(unit[i] @ unit[j])) for i in even}
    ranked = sorted(even, key=lambda i: -float(unit[i] @ unit[best[i]]))
    merged = ranked[:r]
    slots = [[p] for p in range(prefix)]
    slots += [[i] for i in even if i not in merged]
    slots += [[j] + [i for i in merged if best[i] == j] for j in odd]
    return slots


def as_sets(slots):
    return [(slot[0], frozenset(slot)) for slot in slots]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tokens", [12, 25, 26])
@pytest.mark.parametrize("r", [1, 3])
def test_tome_merges_the_best_pairs(prefix, tokens, r):
    f = features(tokens=tokens, seed=tokens + r)
    got = ToMe(r=r).assign(f, state(tokens, prefix), step(tokens, tokens - r))
    for image in range(2):
        assert as_sets(groups(got, image)) == as_sets(naive_tome(f.keys[image].mean(0), prefix, r))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_tome_reduces_to_the_mean_weighted_by_size(prefix):
    tokens, r = 25, 6
    f, size = features(tokens=tokens), sizes(2, tokens, prefix)
    got = ToMe(r=r).assign(f, state(tokens, prefix, size), step(tokens, tokens - r))
    out, after = got.reduce(f.x), got.sizes(size)
    for image in range(2):
        for slot, members in enumerate(groups(got, image)):
            weight = size[image, members].double()
            mean = (weight[:, None] * f.x[image, members]).sum(0) / weight.sum()
            torch.testing.assert_close(out[image, slot], mean, rtol=1e-12, atol=1e-12)
            assert after[image, slot] == weight.sum()
    torch.testing.assert_close((out * after[..., None]).sum(1), (f.x * size[..., None]).sum(1))


def test_tome_does_not_care_for_the_metric_s_scale():
    f = features()
    other = Features(x=f.x, keys=f.keys * 37.0)
    plans = [ToMe().assign(g, state(26, 1), step(26, 20)) for g in (f, other)]
    assert torch.equal(plans[0].keep, plans[1].keep)
    assert torch.equal(plans[0].src, plans[1].src)


def test_tome_survives_zero_and_equal_keys():
    for keys in (torch.zeros(1, 2, 9, 4), torch.ones(1, 2, 9, 4)):
        f = Features(x=torch.randn(1, 9, 4), keys=keys)
        got = ToMe().assign(f, state(9, 1), step(9, 5))
        assert sorted(token for slot in groups(got, 0) for token in slot) == list(range(9))
        assert got.reduce(f.x).isfinite().all()


def test_tofu_prunes_first_and_keeps_norms_later():
    f, size = features(), sizes(2, 26, 1)
    method = ToFu(r=6, prune_blocks=2)
    early = method.assign(f, state(26, 1, size), step(26, 20, block=1))
    late = method.assign(f, state(26, 1, size), step(26, 20, block=2))
    assert early.src is None
    torch.testing.assert_close(
        early.reduce(f.x), f.x.gather(1, early.keep[..., None].expand(-1, -1, 12))
    )
    out = late.reduce(f.x)
    for image in range(2):
        for slot, members in enumerate(groups(late, image)):
            weight = size[image, members].double()
            mean = (weight[:, None] * f.x[image, members]).sum(0) / weight.sum()
            longest = max(f.x[image, m].norm() for m in members)
            expected = mean / mean.norm() * longest if len(members) > 1 else mean
            torch.testing.assert_close(out[image, slot], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperatures", [(1.0, 20.0, 40.0), (2.0, 3.0, 5.0)])
def test_mctf_score(temperatures):
    tokens, prefix, r = 17, 1, 4
    f, size = features(tokens=tokens), sizes(2, tokens, prefix)
    method = MCTF(r=r, temperatures=temperatures)
    got = method.assign(f, state(tokens, prefix, size), step(tokens, tokens - r))
    t1, t2, t3 = temperatures
    for image in range(2):
        x, a, s = f.x[image], f.received[image], size[image].double()

        def score(i, j, x=x, a=a, s=s):
            cosine = float(x[i] @ x[j] / x[i].norm() / x[j].norm())
            information = float(1 / (a[i] * a[j])) ** (1 / t2)
            return (
                ((cosine + 1) / 2) ** (1 / t1) * information * float(1 / (s[i] * s[j])) ** (1 / t3)
            )

        even, odd = range(2, tokens, 2), range(1, tokens, 2)
        best = {i: max(odd, key=lambda j, i=i: score(i, j)) for i in even}
        merged = sorted(even, key=lambda i: -score(i, best[i]))[:r]
        slots = [[0]] + [[i] for i in even if i not in merged]
        slots += [[j] + [i for i in merged if best[i] == j] for j in odd]
        assert as_sets(groups(got, image)) == as_sets(slots)
        out = got.reduce(f.x)[image]
        for slot, members in enumerate(slots):
            weight = a[members] * s[members]
            mean = (weight[:, None] * x[members]).sum(0) / weight.sum()
            torch.testing.assert_close(out[slot], mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("fuse", [True, False])
def test_evit_keeps_the_most_attended_and_fuses_the_rest(prefix, fuse):
    f = features(tokens=26)
    method = EViT(keep_rate=0.5, at=(0,), fuse=fuse)
    kept = math.ceil(0.5 * (26 - prefix))
    got = method.assign(f, state(26, prefix), step(26, prefix + kept + fuse))
    out = got.reduce(f.x)
    for image in range(2):
        row = f.class_row[image]
        ranked = sorted(range(prefix, 26), key=lambda j: -float(row[j]))
        expected = [f.x[image, p] for p in [*range(prefix), *ranked[:kept]]]
        if fuse:
            expected.append(sum(row[j] * f.x[image, j] for j in ranked[kept:]))
        torch.testing.assert_close(out[image], torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_diffrate_sorts_prunes_and_merges(prefix):
    f, size = features(tokens=26), sizes(2, 26, prefix)
    method = DiffRate(schedule=Schedule(26, prefix, ((19, 13),)))
    got = method.assign(f, state(26, prefix, size), step(26, 13, pruned=19))
    out, after = got.reduce(f.x), got.sizes(size)
    for image in range(2):
        x = f.x[image]
        ranked = sorted(range(prefix, 26), key=lambda j: -float(f.class_row[image, j]))
        kept, merged = ranked[: 13 - prefix], ranked[13 - prefix : 19 - prefix]
        slots, grown = [[p] for p in range(prefix)] + [[j] for j in kept], size[image].clone()
        for i in merged:
            cosines = [float(x[i] @ x[j] / x[i].norm() / x[j].norm()) for j in kept]
            best = max(range(len(kept)), key=cosines.__getitem__)
            slots[prefix + best].append(i)
            grown[kept[best]] += size[image, i] * max(cosines[best], 0.0)
        assert as_sets(groups(got, image)) == as_sets(slots)
        for slot, members in enumerate(slots):
            torch.testing.assert_close(out[image, slot], x[members].mean(0))
            torch.testing.assert_close(after[image, slot], grown[members[0]])
    assert (after >= 1).all(), "log sizes never fall below 0"


def test_diffrate_without_merging_keeps_exactly_the_top():
    f = features(tokens=26)
    method = DiffRate(schedule=Schedule(26, 1, ((9, 9),)))
    got = method.assign(f, state(26, 1), step(26, 9))
    assert got.src is None
    top = f.class_row[:, 1:].topk(8).indices + 1
    assert torch.equal(got.keep[:, 1:].sort().values, top.sort().values)


def naive_rank(attention, start, steps):
    """Power iteration `s <- A^T s` of one head by loops."""
    score = list(start)
    for _ in range(steps):
        score = [
            sum(attention[i][j] * score[i] for i in range(len(score))) for j in range(len(score))
        ]
    return torch.tensor(score, dtype=torch.float64)


def naive_importance(q, k, scale, steps, method, prefix):
    tokens = q.shape[1]
    start = torch.ones(tokens, dtype=torch.float64)
    if method.class_weight and prefix:
        start[0] = tokens**0.5
    start = (start / start.sum()).tolist()
    heads = []
    for h in range(q.shape[0]):
        attention = (q[h] @ k[h].T * scale).softmax(-1).tolist()
        heads.append(naive_rank(attention, start, steps))
    low, high = method.variance
    passed = [s for s in heads if low <= float((s * tokens).var(unbiased=False)) <= high]
    passed = passed or heads
    return torch.stack([s**2 for s in passed]).mean(0).sqrt()


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("block", [0, 5, 11])
def test_zero_tprune_against_loops(prefix, block):
    tokens, merged = 15, 8
    f = features(tokens=tokens, seed=3)
    method = ZeroTPrune(iterations=(7, 3, 1))
    got = method.assign(f, state(tokens, prefix), step(tokens, merged, block=block))
    steps = {0: 7, 5: 3, 11: 1}[block]
    for image in range(2):
        q, k = f.query[image], f.keys[image]
        first = naive_importance(q, k, f.scale, 1, method, prefix)
        ranked = sorted(range(prefix, tokens), key=lambda j: -float(first[j]))
        half = -(-len(ranked) // 2)
        important, other = ranked[:half], ranked[half:]
        mean = k.mean(0)

        def closeness(i, mean=mean, important=important):
            return max(
                float(mean[i] @ mean[j] / mean[i].norm() / mean[j].norm()) for j in important
            )

        dropped = sorted(other, key=lambda i: -closeness(i))[
            : int((tokens - merged) * method.similar)
        ]
        left = [*range(prefix), *[t for t in ranked if t not in dropped]]
        again = naive_importance(q[:, left], k[:, left], f.scale, steps, method, prefix)
        order = sorted(range(prefix, len(left)), key=lambda n: -float(again[n]))
        expected = {left[n] for n in order[: merged - prefix]} | set(range(prefix))
        assert {int(t) for t in got.keep[image]} == expected


def test_zero_tprune_head_filter_and_root_mean_square():
    score = torch.rand(1, 3, 10, dtype=torch.float64)
    everyone = ZeroTPrune(variance=(0.0, 1e9)).join_heads(score)
    torch.testing.assert_close(everyone, score.square().mean(1).sqrt())
    none = ZeroTPrune(variance=(1e8, 1e9)).join_heads(score)
    torch.testing.assert_close(none, everyone)
    flat = score.clone()
    flat[:, 1] = 0.1
    some = ZeroTPrune(variance=(1e-6, 1e9)).join_heads(flat)
    torch.testing.assert_close(some, flat[:, [0, 2]].square().mean(1).sqrt())
    torch.testing.assert_close(ZeroTPrune().join_heads(score[:, :1]), score[:, 0].abs())


def test_zero_tprune_drops_the_duplicate_first():
    f = features(batch=1, tokens=13, seed=5)
    weak, strong = 4, 9
    key, query = f.keys.clone(), f.query.clone()
    key[:, :, strong] *= 3
    key[:, :, weak] = key[:, :, strong] / 3 * 0.5
    same = Features(x=f.x, query=query, keys=key, scale=f.scale)
    method = ZeroTPrune(similar=1.0)
    score = method.importance(query, key, f.scale, 1, 1)[0, 1:]
    assert not score.argsort(descending=True)[:6].eq(weak - 1).any(), "the draw must rank it low"
    got = method.assign(same, state(13, 1), step(13, 12))
    assert weak not in got.keep[0].tolist()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_random_drop_keeps_a_fair_subset(prefix):
    torch.manual_seed(0)
    f = features(batch=400, heads=1, tokens=26, dim=2, channels=1)
    got = RandomDrop().assign(f, state(26, prefix), step(26, 16))
    assert torch.equal(got.keep[:, :prefix], torch.arange(prefix).expand(400, -1))
    assert (got.keep.diff(dim=1) > 0).all(), "distinct, in raster order"
    counts = torch.bincount(got.keep[:, prefix:].flatten(), minlength=26)[prefix:].float()
    share = (16 - prefix) / (26 - prefix)
    assert (counts / 400 - share).abs().max() < 5 * math.sqrt(share * (1 - share) / 400)
    torch.manual_seed(0)
    features(batch=400, heads=1, tokens=26, dim=2, channels=1)
    assert torch.equal(RandomDrop().assign(f, state(26, prefix), step(26, 16)).keep, got.keep)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (13, 17)])
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_pool_averages_grid_cells(grid, stride, prefix):
    rows, cols = grid
    tokens = prefix + rows * cols
    x = torch.randn(2, tokens, 3, dtype=torch.float64)
    method = Pool(stride=stride, at=(0,))
    cells = [
        [
            r * cols + c
            for r in range(i, min(i + stride, rows))
            for c in range(j, min(j + stride, cols))
        ]
        for i in range(0, rows, stride)
        for j in range(0, cols, stride)
    ]
    now = TokenState(tokens, prefix, grid)
    got = method.assign(Features(x=x), now, step(tokens, prefix + len(cells)))
    patches = x[:, prefix:]
    expected = torch.stack([patches[:, cell].mean(1) for cell in cells], 1)
    torch.testing.assert_close(got.reduce(x), torch.cat([x[:, :prefix], expected], 1))
    assert got.sizes(torch.ones(2, tokens))[0, prefix:].tolist() == [len(cell) for cell in cells]


ORDERLESS = [
    (DiffRate(schedule=Schedule(26, 1, ((19, 13),))), step(26, 13, pruned=19)),
    (EViT(keep_rate=0.5, at=(0,)), step(26, 14)),
    (ZeroTPrune(), step(26, 14)),
]


@pytest.mark.parametrize(("method", "work"), ORDERLESS, ids=lambda v: getattr(v, "name", ""))
def test_methods_that_do_not_care_for_the_order_of_patches(method, work):
    f = features(tokens=26, seed=11)
    order = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(25) + 1])
    moved = Features(
        x=f.x[:, order],
        class_row=f.class_row[:, order],
        query=f.query[:, :, order],
        keys=f.keys[:, :, order],
        scale=f.scale,
    )
    plain = method.assign(f, state(26, 1), work)
    other = method.assign(moved, state(26, 1), work)
    for image in range(2):
        names = [frozenset(slot) for slot in groups(plain, image)]
        moved_names = [frozenset(int(order[t]) for t in slot) for slot in groups(other, image)]
        assert set(names) == set(moved_names)


ALL = [
    *ORDERLESS,
    (ToMe(), step(26, 17)),
    (ToFu(prune_blocks=0), step(26, 17)),
    (MCTF(), step(26, 17)),
    (Pool(stride=2, at=(0,)), step(26, 14)),
]


@pytest.mark.parametrize(("method", "work"), ALL, ids=lambda v: getattr(v, "name", ""))
def test_images_do_not_influence_each_other(method, work):
    f = features(batch=3, tokens=26, seed=2)
    both = method.assign(f, state(26, 1), work)

    def pick(value):
        return value[1:2] if isinstance(value, torch.Tensor) else value

    alone = method.assign(
        Features(**{name: pick(value) for name, value in vars(f).items()}), state(26, 1), work
    )
    assert groups(both, 1) == groups(alone, 0)


@pytest.mark.parametrize(("method", "work"), ALL, ids=lambda v: getattr(v, "name", ""))
def test_prefix_tokens_are_fixed_points(method, work):
    f = features(tokens=26, seed=4)
    got = method.assign(f, state(26, 1), work)
    assert (got.keep[:, 0] == 0).all()
    if got.src is not None:
        assert (got.dst != 0).all()
        assert (got.src != 0).all()
    torch.testing.assert_close(got.reduce(f.x)[:, 0], f.x[:, 0], rtol=1e-14, atol=0)
