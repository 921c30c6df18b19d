"""Assignments and source maps against loops."""

import pytest
import torch

from vistoken.kernels.match import best_match
from vistoken.kernels.reduce import merge, rescale, take
from vistoken.state import Assignment, SourceMap, TokenState


def random_assignment(batch, tokens, slots, sources, prefix, seed):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        rest = torch.randperm(tokens - prefix, generator=g) + prefix
        keep = torch.cat([torch.arange(prefix), rest[: slots - prefix]])
        src = rest[slots - prefix : slots - prefix + sources]
        dst = torch.randint(prefix, slots, (sources,), generator=g)
        rows.append((keep, src, dst))
    return Assignment(*(torch.stack(part) for part in zip(*rows, strict=True)))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge(weighted, normalize, dtype):
    a = random_assignment(3, 21, 9, 7, 2, seed=1)
    x = torch.randn(3, 21, 5, dtype=torch.float64).to(dtype)
    weight = torch.rand(3, 21) + 0.5 if weighted else None
    out = merge(x, a.keep, a.src, a.dst, weight, normalize)
    assert out.dtype == dtype
    for image in range(3):
        for slot in range(9):
            members = [int(a.keep[image, slot])]
            members += [
                int(s) for s, d in zip(a.src[image], a.dst[image], strict=True) if d == slot
            ]
            w = torch.ones(len(members)) if weight is None else weight[image, members]
            expected = (w.double()[:, None] * x[image, members].double()).sum(0)
            if normalize:
                expected = expected / w.double().sum()
            tolerance = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(
                out[image, slot].double(), expected, rtol=tolerance, atol=tolerance
            )


def test_gradient_of_the_weighted_mean():
    a = random_assignment(2, 11, 5, 4, 1, seed=2)
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 11, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda t: merge(t, a.keep, a.src, a.dst, weight), (x,))


@pytest.mark.parametrize("seed", range(10))
def test_source_map_composes_like_a_walk(seed):
    start = TokenState(30, 2, (4, 7))
    first = random_assignment(2, 30, 18, 8, 2, seed)
    second = random_assignment(2, 18, 9, 5, 2, seed + 100)
    whole = SourceMap.compose([first, second], start, torch.zeros(2, 0))
    for image in range(2):
        for token in range(30):
            now = token
            for a in (first, second):
                parent = {int(t): slot for slot, t in enumerate(a.keep[image])}
                parent |= {int(s): int(d) for s, d in zip(a.src[image], a.dst[image], strict=True)}
                now = parent.get(now, -1)
                if now < 0:
                    break
            assert int(whole.parent[image, token]) == now
    y = torch.randn(2, 9, 3)
    zeros, nearest = whole.expand(y, "zeros"), whole.expand(y, "nearest")
    for image in range(2):
        for token in range(30):
            slot = int(whole.parent[image, token])
            if slot >= 0:
                assert torch.equal(zeros[image, token], y[image, slot])
                assert torch.equal(nearest[image, token], y[image, slot])
                continue
            assert not zeros[image, token].any()
            cell = divmod(token - 2, 7)
            distance = {}
            for s in range(2, 9):
                r, c = divmod(int(whole.origin[image, s]) - 2, 7)
                distance[s] = (r - cell[0]) ** 2 + (c - cell[1]) ** 2
            best = min(distance.values())
            choices = [y[image, s] for s, d in distance.items() if d == best]
            assert any(torch.equal(nearest[image, token], c) for c in choices)


@pytest.mark.parametrize("seed", range(5))
def test_sizes_are_the_histogram_of_the_map_when_nothing_is_pruned(seed):
    start = TokenState(30, 1, (1, 29))
    first = random_assignment(2, 30, 18, 12, 1, seed)
    second = random_assignment(2, 18, 9, 9, 1, seed + 50)
    state = start.after(first).after(second)
    parent = SourceMap.compose([first, second], start, torch.zeros(2, 0)).parent
    for image in range(2):
        assert torch.equal(torch.bincount(parent[image], minlength=9).float(), state.size[image])
    assert state.size.sum(1).tolist() == [30, 30]


def test_expand_then_reduce_is_the_identity():
    a = random_assignment(2, 20, 8, 12, 1, seed=3)
    y = torch.randn(2, 8, 4, dtype=torch.float64)
    full = SourceMap.compose([a], TokenState(20, 1, (1, 19)), y).expand(y)
    torch.testing.assert_close(a.reduce(full), y)


def test_sizes_stay_exact_beyond_bf16():
    tokens = 400
    a = Assignment(
        keep=torch.zeros(1, 1, dtype=torch.long),
        src=torch.arange(1, tokens)[None],
        dst=torch.zeros(1, tokens - 1, dtype=torch.long),
    )
    assert a.sizes(torch.ones(1, tokens)).item() == 400


def test_best_match_against_loops():
    a, b = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(2, 9, 5, dtype=torch.float64)
    value, index = best_match(a, b)
    for n in range(2):
        for i in range(7):
            cosines = [float(a[n, i] @ r / a[n, i].norm() / r.norm()) for r in b[n]]
            assert index[n, i] == max(range(9), key=cosines.__getitem__)
            assert value[n, i].item() == pytest.approx(max(cosines), abs=1e-12)


def test_rescale_and_take():
    x = torch.randn(2, 6, 3)
    length = torch.rand(2, 6) + 0.1
    torch.testing.assert_close(rescale(x, length).norm(dim=-1), length)
    assert not rescale(torch.zeros(1, 1, 3), torch.ones(1, 1)).any()
    index = torch.tensor([[3, 0], [5, 5]])
    assert torch.equal(take(x, index)[1, 0], x[1, 5])
    assert torch.equal(take(length, index), length.gather(1, index))
