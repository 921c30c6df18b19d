"""Class row, column mean and page rank against the whole attention matrix in float64."""

import math

import pytest
import torch

from vistoken.kernels.attention import CHUNK, class_row, log_normalizer, page_rank, received

CASES = [(1, 1, 5, 4), (2, 3, CHUNK, 8), (2, 2, CHUNK + 1, 16), (1, 4, 197, 64)]


def problem(batch, heads, tokens, dim, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, tokens, dim, generator=g, dtype=torch.float64) for _ in "qk")
    bias = torch.randint(1, 9, (batch, tokens), generator=g).double().log()
    return q.to(dtype), k.to(dtype), bias, dim**-0.5


def matrix(q, k, bias, scale):
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) * scale
    if bias is not None:
        scores = scores + bias[:, None, None]
    return scores.softmax(-1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sized", [True, False])
def test_class_row(case, sized):
    q, k, bias, scale = problem(*case)
    bias = bias if sized else None
    for prefix in (1, 2):
        expected = matrix(q, k, bias, scale)[:, :, :prefix].mean((1, 2))
        torch.testing.assert_close(class_row(q[:, :, :prefix], k, bias, scale), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sized", [True, False])
def test_received_is_the_column_mean(case, sized):
    q, k, bias, scale = problem(*case)
    bias = bias if sized else None
    expected = matrix(q, k, bias, scale).mean((1, 2))
    torch.testing.assert_close(received(q, k, bias, scale), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sized", [True, False])
def test_page_rank_is_the_power_iteration(case, steps, sized):
    q, k, bias, scale = problem(*case)
    bias = bias if sized else None
    start = torch.rand(case[0], case[2], dtype=torch.float64) + 0.1
    expected = start[:, None].expand(-1, case[1], -1)
    a = matrix(q, k, bias, scale)
    for _ in range(steps):
        expected = torch.einsum("bhnm,bhn->bhm", a, expected)
    got = page_rank(q, k, bias, scale, start, steps)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got.sum(-1), start.sum(-1)[:, None].expand(-1, case[1]))


def test_page_rank_converges_to_the_stationary_distribution():
    q, k, _, scale = problem(1, 2, 23, 8, seed=7)
    a = matrix(q, k, None, scale)
    start = torch.full((1, 23), 1 / 23, dtype=torch.float64)
    rank = page_rank(q, k, None, scale, start, 200)
    torch.testing.assert_close(torch.einsum("bhnm,bhn->bhm", a, rank), rank, rtol=1e-9, atol=1e-12)


def test_a_star_ranks_its_centre_first():
    q = torch.ones(1, 1, 9, 2, dtype=torch.float64)
    k = torch.zeros(1, 1, 9, 2, dtype=torch.float64)
    k[0, 0, 4] = 50
    rank = page_rank(q, k, None, 1.0, torch.full((1, 9), 1 / 9), 1)
    assert rank[0, 0].argmax() == 4
    assert rank[0, 0, 4] > 0.999


def test_equal_keys_rank_uniformly():
    q, k, _, scale = problem(1, 2, 12, 4)
    k = k[:, :, :1].expand_as(k)
    rank = page_rank(q, k, None, scale, torch.full((1, 12), 1 / 12, dtype=torch.float64), 3)
    torch.testing.assert_close(rank, torch.full_like(rank, 1 / 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_loses_little(dtype):
    q, k, bias, scale = problem(2, 3, 70, 32, dtype)
    assert received(q, k, bias, scale).dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    expected = matrix(q, k, bias, scale)
    error = (received(q, k, bias, scale) - expected.mean((1, 2))).norm() / expected.mean(
        (1, 2)
    ).norm()
    assert error < tolerance
    row = class_row(q[:, :, :1], k, bias, scale)
    assert (row - expected[:, :, 0].mean(1)).norm() / expected[:, :, 0].mean(1).norm() < tolerance


def test_no_call_sees_a_whole_matrix(monkeypatch):
    largest = 0
    plain = torch.Tensor.logsumexp

    def watch(self, *args, **kwargs):
        nonlocal largest
        largest = max(largest, self.shape[-2])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "logsumexp", watch)
    q, k, bias, scale = problem(1, 2, 197, 8)
    log_normalizer(q, k, bias, scale)
    received(q, k, bias, scale)
    assert 0 < largest <= CHUNK


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("auto", [False, True])
def test_scores_are_formed_in_float32(dtype, auto):
    """A product of 64 values of 40 each is 102,400, beyond fp16; bf16 would round every score."""
    x = torch.full((1, 1, 3, 64), 40.0, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=auto):
        assert torch.equal(class_row(x[:, :, :1], x, None, 0.125), torch.full((1, 3), 1 / 3))
        norm = log_normalizer(x, x, None, 0.125)
        torch.testing.assert_close(norm, torch.full_like(norm, 12800 + math.log(3)))
        q, k, _, scale = problem(1, 2, 30, 64)
        q, k = (q * 6).to(dtype), k.to(dtype)
        row = class_row(q[:, :, :1], k, None, scale)
    exact = matrix(q, k, None, scale)[:, :, 0].mean(1)
    torch.testing.assert_close(row.double(), exact, rtol=1e-4, atol=1e-6)
