"""What every launcher takes: any strides, far rows, many heads, and any current device."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

from vistoken.kernels import neighborhood_reference as neighborhood
from vistoken.kernels import triton_biased_attention as forward
from vistoken.kernels import triton_biased_attention_backward as backward
from vistoken.kernels import triton_bipartite as bipartite
from vistoken.kernels import triton_chain as chain
from vistoken.kernels import triton_decode_attention as decode_attention
from vistoken.kernels import triton_decode_linear as decode_linear
from vistoken.kernels import triton_neighborhood as near
from vistoken.kernels import triton_neighborhood_bias as near_bias
from vistoken.kernels import triton_neighborhood_extra as near_extra
from vistoken.kernels import triton_neighborhood_gradients as near_gradients
from vistoken.kernels import triton_ranking as ranking
from vistoken.kernels import triton_signals as signals
from vistoken.kernels.attention import column_sums_reference, log_normalizer_reference
from vistoken.kernels.biased_attention import biased_attention_reference
from vistoken.kernels.biased_attention_backward import biased_attention_backward_reference
from vistoken.kernels.bipartite import bipartite_reference, cosine_scores, head_mean, pair_up
from vistoken.kernels.chain import Slots, add_reduce_norm_reference
from vistoken.kernels.dispatch import on_device
from vistoken.kernels.match import best_match
from vistoken.kernels.neighborhood_windows import Neighborhood
from vistoken.kernels.reduce import take

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAUNCHERS = [
    forward.biased_attention_triton, backward.biased_attention_backward_triton,
    bipartite.bipartite_triton, chain.add_reduce_norm_triton,
    decode_attention.decode_attention_triton, decode_linear.decode_linear_triton,
    near.forward, near_bias.bias_gradient, near_extra.extra_gradients, near_gradients.backward,
    ranking.rank_tokens_triton, signals.best_match_at_triton, signals.column_sums_triton,
    signals.join_heads_triton,    signals.log_normalizer_triton,
]  # fmt: skip
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def same(got, expected):
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), **CLOSE)


def every_other(x):
    """The values of x with a gap behind each."""
    return torch.stack([x, x.new_full(x.shape, 1e4)], -1).flatten(-2)[..., ::2]


def turned(x):
    """The values of x with the last two axes swapped in memory."""
    return x.mT.contiguous().mT


def attend(q, k, v, bias, alive, grad):
    """Outputs and gradients of the kernels, and those of the torch reference in float64."""
    lse = torch.empty(q.shape[:3], device=q.device)
    out, row = forward.biased_attention_triton(q, k, v, bias, 0.3, 1, alive, lse)
    got = backward.biased_attention_backward_triton(
        grad, q, k, v, bias, alive, out, lse, lse.sin(), 0.3, True, True
    )
    q, k, v, bias, alive, grad = (x.double() for x in (q, k, v, bias, alive, grad))
    want, class_row, norm = biased_attention_reference(q, k, v, bias, 0.3, 1, alive, True)
    grads = biased_attention_backward_reference(
        grad, q, k, v, bias, alive, want, norm, norm.sin(), 0.3, True, True
    )
    return (out, row.mean(1), lse, *got), (want, class_row, norm, *grads)


@pytest.mark.parametrize("layout", [every_other, turned])
def test_attention_takes_any_strides(layout):
    q, k, v, grad = (layout(draw(2, 2, 37, 16, seed=seed)) for seed in range(4))
    bias, alive = draw(2, 37, seed=4), (draw(2, 37, seed=5) > 0).float()
    same(*attend(q, k, v, layout(bias), layout(alive), grad))


@pytest.mark.parametrize("layout", [every_other, turned])
def test_signals_take_any_strides(layout):
    q, k, bias = layout(draw(2, 2, 70, 16)), layout(draw(2, 2, 37, 16, seed=1)), draw(2, 37, seed=2)
    want = log_normalizer_reference(q.double(), k.double(), bias.double(), 0.3)
    same([signals.log_normalizer_triton(q, k, layout(bias), 0.3)], [want])
    lse, weight = draw(2, 2, 70, seed=3) + 4, draw(2, 2, 70, seed=4).abs()
    got = signals.column_sums_triton(q, k, layout(bias), 0.3, layout(lse), layout(weight))
    wide = (q.double(), k.double(), bias.double(), 0.3, lse.double(), weight.double())
    same([got], [column_sums_reference(*wide)])
    order = torch.stack([torch.randperm(70) for _ in range(2)]).to(DEVICE)
    src, dst, x = order[:, :40], order[:, 40:], layout(draw(2, 70, 24))
    got = signals.best_match_at_triton(x, layout(src), layout(dst))
    same(got, best_match(take(x.double(), src), take(x.double(), dst)))


@pytest.mark.parametrize("tokens", [41, 300])
@pytest.mark.parametrize("layout", [every_other, turned])
def test_matching_takes_any_strides(layout, tokens):
    keys = layout(draw(2, 2, tokens, 16))
    want = pair_up(cosine_scores(head_mean(keys.double())), 1, 5)
    same(bipartite.bipartite_triton(keys, 1, 5), want)
    factor = layout(draw(2, tokens).exp())
    want = bipartite_reference(keys.double(), 1, 5, factor.double(), 0.7)
    same(bipartite.bipartite_triton(keys, 1, 5, factor, 0.7), want)


@pytest.mark.parametrize("layout", [every_other, turned])
def test_the_chain_takes_any_strides(layout):
    x, branch, size = draw(2, 19, 24), draw(2, 19, 24, seed=1), draw(2, 19, seed=2).abs() + 1
    order = torch.stack([torch.randperm(19) for _ in range(2)]).to(DEVICE)
    slots = Slots(layout(order[:, :7]), layout(order[:, 7:12]), layout(order[:, 12:17] % 7))
    norm = (draw(24, seed=3), draw(24, seed=4), 1e-5)
    args = (layout(x), layout(branch), None, slots, layout(size))
    got = chain.add_reduce_norm_triton(*args, norm)
    wide = (norm[0].double(), norm[1].double(), 1e-5)
    same(got, add_reduce_norm_reference(x.double(), branch.double(), *args[2:], wide))


# Far rows: a sparse file, of which only the pages of the rows exist -------------------------------

STEP = 2**30


@pytest.fixture
def far(tmp_path):
    """Makes tensors with one stride of 2**30, whose wrapped offsets would meet zeros."""
    if DEVICE != "cpu":
        pytest.skip("far rows need a file")
    memory = torch.from_file(str(tmp_path / "far"), shared=True, size=5 * STEP, dtype=torch.half)
    used = 2 * STEP

    def make(*shape, axis, seed=0):
        nonlocal used
        values = draw(*shape, seed=seed).half()
        strides = list(values.stride())
        strides[axis] = STEP
        x = memory.as_strided(shape, strides, used)
        used += values.numel()
        return x.copy_(values)

    return make


def test_tokens_far_apart(far):
    q, k, v, grad = (far(1, 1, 3, 16, axis=2, seed=seed) for seed in range(4))
    got, want = attend(q, k, v, draw(1, 3), torch.ones(1, 3), grad)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-2, atol=1e-2)
    want = log_normalizer_reference(q.double(), k.double(), None, 0.3)
    same([signals.log_normalizer_triton(q, k, None, 0.3)], [want])
    weight = draw(1, 1, 3).abs()
    got = signals.column_sums_triton(q, k, None, 0.3, want.float(), weight)
    wide = (q.double(), k.double(), None, 0.3, want, weight.double())
    same([got], [column_sums_reference(*wide)])


@pytest.mark.parametrize("axis", [1, 2])
def test_keys_far_apart(far, axis):
    keys = far(1, 3, 3, 16, axis=axis)
    # Token 2 merges by what the last head says; without it, or read as zeros, token 0 does.
    keys[:, :2, 0] = keys[:, :2, 1]
    keys[:, 2] *= 10
    keys[:, 2, 2] = keys[:, 2, 1]
    keys[:, 2, 0] += keys[:, 2, 1]
    want = pair_up(cosine_scores(head_mean(keys.double())), 0, 1)
    assert want[1] == 2
    same(bipartite.bipartite_triton(keys, 0, 1), want)
    same(bipartite.bipartite_triton(keys, 0, 1, torch.ones(1, 3)), want)


@pytest.mark.parametrize("axis", [1, 3])
def test_neighbors_far_apart(far, axis):
    grid, heads = (3, 3) if axis == 1 else (2, 2), 3
    hood = Neighborhood((2, 2), (1, 1), (1, 1), (False, False))
    q, k, v, up = (far(1, *grid, heads, 16, axis=axis, seed=seed) for seed in range(4))
    extra = [draw(1, 2, heads, 16, seed=seed).half() for seed in (4, 5)]
    rpb = draw(heads, 3, 3, seed=6)
    out, lse = near.forward(q, k, v, hood, 0.3, *extra, rpb)
    got = near_gradients.backward(up, None, q, k, v, out, lse, hood, 0.3, *extra, rpb)
    args, more = [x.double() for x in (q, k, v)], [x.double() for x in (*extra, rpb)]
    exact, norm = neighborhood.forward(*args, hood, 0.3, *more)
    want = neighborhood.backward(up.double(), None, *args, exact, norm, hood, 0.3, *more)
    for mine, other in zip((out, lse, *got), (exact, norm, *want), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-2, atol=1e-2)


# Grids and devices --------------------------------------------------------------------------------


class Recorded:
    """A kernel that notes its grids."""

    def __init__(self, kernel, grids):
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def test_any_number_of_heads_fits_a_launch(monkeypatch):
    """The second and third axis of a launch end at 65,535; the first one at 2**31 - 1."""
    grids = []
    for module, name in (
        (forward, "_attention"), (backward, "_query_gradient"), (backward, "_key_gradient"),
        (signals, "_normalizer"), (near_extra, "_extra"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Recorded(getattr(module, name), grids))
    q, k, v, grad = (draw(3, 2, 130, 16, seed=seed) for seed in range(4))
    same(*attend(q, k, v, draw(3, 130, seed=4), torch.ones(3, 130, device=DEVICE), grad))
    got = signals.log_normalizer_triton(q, k, None, 0.3)
    same([got], [log_normalizer_reference(q.double(), k.double(), None, 0.3)])
    hood = Neighborhood((3,), (1,), (1,), (False,))
    q, k, v, grad = (x.transpose(1, 2) for x in (q, k, v, grad))
    extra = [draw(3, 70, 2, 16, seed=seed) for seed in (5, 6)]
    out, lse = near.forward(q, k, v, hood, 0.3, *extra)
    got = near_gradients.backward(grad, None, q, k, v, out, lse, hood, 0.3, *extra)[3:5]
    args = [x.double() for x in (q, k, v, out, lse)]
    want = neighborhood.backward(
        grad.double(), None, *args, hood, 0.3, *(x.double() for x in extra), None
    )
    same(got, want[3:5])
    assert len(grids) == 5
    assert all(len(grid) == 1 for grid in grids), grids


@pytest.mark.parametrize(("own", "current"), [(0, 0), (1, 0), (0, 1), (None, 1)])
def test_launches_go_to_the_device_of_their_tensors(own, current, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda to: entered.append(to.index) or nullcontext())
    x = SimpleNamespace(is_cuda=own is not None, device=SimpleNamespace(index=own))
    assert on_device(lambda x, more, less=0: (x, more, less))(x, 2, less=3) == (x, 2, 3)
    assert entered == ([] if own in (current, None) else [own])


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_every_launcher_looks_at_the_device(launcher):
    assert launcher.__wrapped__ and launcher.__code__ is on_device(print).__code__
