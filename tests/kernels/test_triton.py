"""The Triton kernels in the interpreter against float64 loops and the torch reference."""

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

import vistoken.kernels.biased_attention as module
import vistoken.kernels.chain as chain_module
import vistoken.kernels.reduce as reduce_module
from vistoken.kernels import triton_chain
from vistoken.kernels.biased_attention import biased_attention
from vistoken.kernels.bipartite import bipartite_reference, cosine_scores, head_mean, pair_up
from vistoken.kernels.chain import Slots, add_reduce_norm_reference
from vistoken.kernels.match import best_match
from vistoken.kernels.ranking import rank_tokens_reference
from vistoken.kernels.reduce import reduce_tokens, take
from vistoken.kernels.triton_biased_attention import biased_attention_triton
from vistoken.kernels.triton_bipartite import bipartite_triton
from vistoken.kernels.triton_chain import add_reduce_norm_triton
from vistoken.kernels.triton_ranking import rank_tokens_triton
from vistoken.kernels.triton_signals import (
    best_match_at_triton,
    column_sums_triton,
    join_heads_triton,
    log_normalizer_triton,
)
from vistoken.state import Assignment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def heads(batch, tokens, count, dim, seed=0):
    """q, k, v as the strided views that a fused projection gives."""
    return draw(batch, tokens, 3, count, dim, seed=seed).permute(2, 0, 3, 1, 4).unbind(0)


SHAPES = [(2, 197, 3, 64), (1, 33, 2, 48), (2, 64, 1, 32), (1, 5, 2, 24), (1, 80, 1, 80),
          (1, 272, 1, 64), (1, 321, 1, 64)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_attention(shape, sized, rows):
    q, k, v = heads(*shape)
    batch, tokens, _, dim = shape
    bias = draw(batch, tokens).abs() if sized else None
    out, row = biased_attention_triton(q, k, v, bias, dim**-0.5, rows)
    score = q.double() @ k.double().transpose(-1, -2) * dim**-0.5
    if bias is not None:
        score = score + bias[:, None, None].double()
    attention = score.softmax(-1)
    torch.testing.assert_close(out.double(), attention @ v.double(), rtol=1e-4, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()
    if rows:
        expected = attention[:, :, :rows].mean(2)
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-6)


def test_attention_takes_sizes_too():
    q, k, v = heads(2, 70, 2, 32)
    size = torch.randint(1, 9, (2, 70), device=DEVICE).float()
    by_size, row = biased_attention_triton(q, k, v, size, 0.2, 1, sizes=True)
    by_log, other = biased_attention_triton(q, k, v, size.log(), 0.2, 1)
    torch.testing.assert_close(by_size, by_log)
    torch.testing.assert_close(row, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [True, False])
def test_attention_gives_the_normalizer_and_hides_dead_keys(shape, masked):
    q, k, v = heads(*shape)
    batch, tokens, _, dim = shape
    bias = draw(batch, tokens).abs()
    alive = draw(batch, tokens, seed=9) > 0.5 if masked else None
    if masked:
        alive[0, : tokens * 3 // 4] = False  # whole blocks of dead keys
    lse = torch.empty(q.shape[:3], device=DEVICE)
    out, row = biased_attention_triton(q, k, v, bias, dim**-0.5, 2, alive, lse)
    score = q.double() @ k.double().transpose(-1, -2) * dim**-0.5 + bias[:, None, None].double()
    if masked:
        own = torch.eye(tokens, dtype=torch.bool, device=DEVICE)
        score = score.masked_fill(~(alive[:, None, None] | own), float("-inf"))
    attention = score.softmax(-1)
    torch.testing.assert_close(out.double(), attention @ v.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(row.double(), attention[:, :, :2].mean(2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lse.double(), score.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [12, 41, 130, 197, 300])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("r", [1, 3])
def test_bipartite(tokens, prefix, r, dtype):
    _, keys, _ = heads(2, tokens, 3, 24, seed=tokens)
    keys = keys.to(dtype)
    got = bipartite_triton(keys, prefix, r)
    expected = pair_up(cosine_scores(head_mean(keys.double())), prefix, r)
    for mine, reference in zip(got, expected, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(12, 1, 24), (41, 1, 150), (131, 3, 24), (270, 1, 72)])
@pytest.mark.parametrize(("prefix", "exponent"), [(0, 1), (1, 0.4), (5, 3.0)])
def test_bipartite_with_a_factor(shape, prefix, exponent, dtype):
    tokens, count, width = shape
    keys = draw(2, tokens, count, width, seed=tokens).to(dtype).transpose(1, 2)
    factor = (0.4 * draw(2, tokens, seed=7)).exp()
    got = bipartite_triton(keys, prefix, 3, factor, exponent)
    expected = bipartite_reference(keys.double(), prefix, 3, factor.double(), exponent)
    for mine, reference in zip(got, expected, strict=True):
        assert torch.equal(mine, reference)
    plain = bipartite_triton(keys, prefix, 3)
    for mine, reference in zip(plain, bipartite_reference(keys.double(), prefix, 3), strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("count", [1, 2])
def test_bipartite_of_wide_keys(count):
    keys = draw(2, count, 70, 200)
    for mine, other in zip(
        bipartite_triton(keys, 1, 9), bipartite_reference(keys.double(), 1, 9), strict=True
    ):
        assert torch.equal(mine, other)


def test_bipartite_with_a_factor_keeps_the_order_of_equal_scores():
    keys, factor = torch.ones(1, 1, 21, 8, device=DEVICE), torch.full((1, 21), 0.5, device=DEVICE)
    keys[:, :, 3:9] = 0
    keys[:, :, 12] = -1
    got = bipartite_triton(keys, 1, 8, factor, 2.0)
    for mine, other in zip(got, bipartite_reference(keys, 1, 8, factor, 2.0), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("where", ["keys", "factor", "one factor"])
def test_nan_beside_a_factor_leaves_valid_indices_and_batch_mates_alone(where):
    keys, factor = draw(3, 1, 41, 16), draw(3, 41).abs()
    clean = bipartite_triton(keys, 1, 5, factor)
    (keys if where == "keys" else factor)[1, ..., 8 if where == "one factor" else slice(None)] = (
        float("nan")
    )
    for mine, other in zip(bipartite_triton(keys, 1, 5, factor), clean, strict=True):
        assert torch.equal(mine[[0, 2]], other[[0, 2]])
        assert int(mine[1].min()) >= 0 and int(mine[1].max()) < 41
    members = torch.cat([bipartite_triton(keys, 1, 5, factor)[i][1] for i in (0, 1)])
    assert torch.equal(members.sort().values, torch.arange(41, device=DEVICE))


def test_bipartite_with_equal_scores_keeps_the_order():
    keys = torch.ones(1, 2, 20, 8, device=DEVICE)
    got = bipartite_triton(keys, 1, 4)
    for mine, reference in zip(got, pair_up(cosine_scores(head_mean(keys)), 1, 4), strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("tokens", [20, 300])
def test_nan_in_one_image_leaves_valid_indices_and_its_batch_mates_alone(tokens):
    _, keys, _ = heads(3, tokens, 2, 16)
    clean = bipartite_triton(keys, 1, 5)
    keys[1] = float("nan")
    for mine, other in zip(bipartite_triton(keys, 1, 5), clean, strict=True):
        assert torch.equal(mine[[0, 2]], other[[0, 2]])
        assert int(mine[1].min()) >= 0 and int(mine[1].max()) < tokens
    score = draw(2, tokens)
    score[0, 3::2] = float("nan")
    order = rank_tokens_triton(score, 1)
    assert torch.equal(order[0].sort().values, torch.arange(tokens, device=DEVICE))


@pytest.mark.parametrize("tokens", [3, 64, 197, 300])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rank(tokens, prefix):
    if tokens <= prefix:
        return
    score = draw(2, tokens).round(decimals=1)
    expected = rank_tokens_reference(score, prefix)
    assert torch.equal(rank_tokens_triton(score, prefix), expected)
    assert torch.equal(rank_tokens_triton(score.expand(2, -1)[:, :], prefix), expected)


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("branch", ["none", "plain", "scaled"])
@pytest.mark.parametrize("kind", ["all", "prune", "mean", "sum", "mlerp"])
@pytest.mark.parametrize("sized", [True, False])
def test_chain(gain, weighted, branch, kind, sized):
    batch, tokens, width, slots, sources = 2, 29, 40, 9, 17
    x, y, gamma = draw(batch, tokens, width), draw(batch, tokens, width, seed=1), draw(width)
    norm = (draw(width, seed=2), draw(width, seed=3), 1e-5)
    order = torch.stack([torch.randperm(tokens) for _ in range(batch)]).to(DEVICE)
    size = draw(batch, tokens).abs() + 1 if sized else None
    where = None
    if kind == "prune":
        where = Slots(order[:, :slots])
    elif kind != "all":
        where = Slots(
            order[:, :slots],
            order[:, slots : slots + sources],
            torch.randint(0, slots, (batch, sources), device=DEVICE),
            draw(batch, tokens, seed=4).abs() + 0.1 if weighted else None,
            draw(batch, sources, seed=5).abs() if gain else None,
            kind,
        )
    adds = None if branch == "none" else y
    scale = gamma if branch == "scaled" else None
    got = add_reduce_norm_triton(x, adds, scale, where, size, norm)
    wide = [None if t is None else t.double() for t in (x, adds, scale)]
    double_norm = (norm[0].double(), norm[1].double(), norm[2])
    expected = add_reduce_norm_reference(*wide, where, size, double_norm)
    for mine, reference in zip(got, expected, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), reference.double(), rtol=1e-4, atol=1e-4)


def test_lengths_of_the_longest_member():
    """Slots of one, of zeros, of members that cancel, and of very short ones."""
    x = draw(1, 9, 20)
    x[0, [2, 5]] = 0
    x[0, 6] = -x[0, 3]
    x[0, [4, 7]] *= 1e-16
    keep, src, dst = (
        torch.tensor([index], device=DEVICE)
        for index in ([0, 1, 2, 3, 4], [8, 5, 6, 7], [1, 2, 3, 4])
    )
    slots = Slots(keep, src, dst, rule="mlerp")
    norm = (torch.ones(20, device=DEVICE), torch.zeros(20, device=DEVICE), 1e-5)
    y, h, size = add_reduce_norm_triton(x, None, None, slots, None, norm)
    z = x[0].double()
    mean = (z[1] + z[8]) / 2
    torch.testing.assert_close(y[0, 0].double(), z[0], rtol=1e-6, atol=1e-7)
    expected = mean / mean.norm() * max(z[1].norm(), z[8].norm())
    torch.testing.assert_close(y[0, 1].double(), expected, rtol=1e-5, atol=1e-6)
    assert not y[0, 2].any() and not y[0, 3].any(), "no direction, no length"
    short = (z[4] + z[7]) / 2
    expected = short / 1e-12 * max(z[4].norm(), z[7].norm())
    torch.testing.assert_close(y[0, 4].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(h, torch.nn.functional.layer_norm(y, (20,)))
    assert size.tolist() == [[1, 2, 2, 2, 2]]


@pytest.mark.parametrize("bias", ["none", "token", "head"])
def test_log_normalizer(bias):
    q, k = draw(2, 3, 70, 24), draw(2, 3, 91, 24, seed=1)
    added = {"none": None, "token": draw(2, 91), "head": draw(2, 3, 91)}[bias]
    score = q.double() @ k.double().transpose(-1, -2) * 0.3
    if added is not None:
        score = score + (added[:, None, None] if added.dim() == 2 else added[:, :, None]).double()
    got = log_normalizer_triton(q, k, added, 0.3)
    torch.testing.assert_close(got.double(), score.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 70, 24), (1, 2, 5, 16), (2, 1, 129, 64)])
def test_column_sums(shape, biased):
    batch, count, tokens, _ = shape
    q, k = 2 * draw(*shape), draw(*shape, seed=1)
    added = 3 * draw(batch, tokens, seed=2) if biased else None
    score = q.double() @ k.double().transpose(-1, -2) * 0.3
    score = score if added is None else score + added[:, None, None].double()
    weight = draw(batch, 1, tokens, seed=3).abs().expand(-1, count, -1)
    got = column_sums_triton(q, k, added, 0.3, score.logsumexp(-1).float(), weight)
    expected = torch.einsum("bhnm,bhn->bhm", score.softmax(-1), weight.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("count", "tokens"), [(3, 70), (1, 5), (12, 130)])
@pytest.mark.parametrize("limits", [(0.5, 1.1), (0, 1e9), (1e8, 1e9)])
def test_joined_heads(count, tokens, limits):
    score = draw(3, count, tokens).abs()
    score[1] *= 5  # another filter than its batch mates
    score *= torch.linspace(0.4, 2, count, device=DEVICE)[:, None] / tokens
    got = join_heads_triton(score, *limits)
    for image in range(3):
        heads = score[image].double()
        spread = [float((h * tokens).var(unbiased=False)) for h in heads]
        passed = [h for h, s in zip(heads, spread, strict=True) if limits[0] <= s <= limits[1]]
        expected = torch.stack(passed or list(heads)).square().mean(0).sqrt()
        torch.testing.assert_close(got[image].double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("sources", "targets"), [(1, 5), (16, 64), (40, 49)])
def test_best_match_at(sources, targets):
    x = draw(2, 90, 100)
    order = torch.stack([torch.randperm(90) for _ in range(2)]).to(DEVICE)
    src, dst = order[:, :sources], order[:, sources : sources + targets]
    value, index = best_match_at_triton(x, src, dst)
    expected = best_match(take(x.double(), src), take(x.double(), dst))
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(index, expected[1])


def test_sizes_in_place_of_a_bias_go_every_way(monkeypatch):
    q, k, v = heads(2, 37, 2, 32)
    size = torch.randint(1, 9, (2, 37), device=DEVICE).float()
    out, row = biased_attention(q, k, v, size.log(), 0.2, 1)
    plain, plain_row = biased_attention(q, k, v, None, 0.2, 1, size=size)
    torch.testing.assert_close(plain, out)
    torch.testing.assert_close(plain_row, row)
    monkeypatch.setattr(module, "use_triton", lambda x, dtypes=None: True)
    kernel, kernel_row = biased_attention(q, k, v, None, 0.2, 1, size=size)
    torch.testing.assert_close(kernel, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kernel_row, row, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="bias and size"):
        biased_attention(q, k, v, size, 0.2, size=size)


@pytest.mark.parametrize("kind", ["prune", "merge", "weighted", "sum"])
def test_reduce_tokens(kind, monkeypatch):
    batch, tokens, width, slots, sources = 2, 23, 40, 8, 11
    x = draw(batch, width, tokens).mT  # not contiguous
    order = torch.stack([torch.randperm(tokens) for _ in range(batch)]).to(DEVICE)
    keep, src = order[:, :slots], order[:, slots : slots + sources]
    dst = torch.randint(0, slots, (batch, sources), device=DEVICE)
    weight = draw(batch, tokens, seed=4).abs() + 0.1 if kind != "merge" else None
    args = (keep, None, None) if kind == "prune" else (keep, src, dst, weight, kind != "sum")
    expected = reduce_tokens(x.double(), *args)
    monkeypatch.setattr(reduce_module, "use_triton", lambda x, dtypes=None: True)
    torch.testing.assert_close(reduce_tokens(x, *args).double(), expected, rtol=1e-4, atol=1e-5)
    x = x.clone().requires_grad_()
    assert reduce_tokens(x, *args).requires_grad, "autograd sees the torch operators"


@pytest.mark.parametrize("weighted", [True, False])
def test_assignments_with_lengths_take_the_kernel(weighted, monkeypatch):
    x, order = draw(2, 23, 40), torch.stack([torch.randperm(23) for _ in range(2)]).to(DEVICE)
    weight = draw(2, 23, seed=4).abs() + 0.1 if weighted else None
    dst = torch.randint(0, 8, (2, 11), device=DEVICE)
    a = Assignment(order[:, :8], order[:, 8:19], dst, weight, rule="mlerp")
    expected = a.reduce(x.double())
    mean = Assignment(order[:, :8], order[:, 8:19], dst, weight).reduce(x.double())
    assert not torch.allclose(mean, expected)
    calls, launch = [], triton_chain.add_reduce_norm_triton
    monkeypatch.setattr(chain_module, "use_triton", lambda x, dtypes=None: True)
    monkeypatch.setattr(
        triton_chain, "add_reduce_norm_triton", lambda *args: calls.append(1) or launch(*args)
    )
    torch.testing.assert_close(a.reduce(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert calls
    x = x.clone().requires_grad_()
    assert a.reduce(x).requires_grad and len(calls) == 1, "autograd sees the torch operators"
