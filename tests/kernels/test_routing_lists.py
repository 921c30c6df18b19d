"""Triton kernels that choose regions and invert lists, against torch operators."""

import math
import os
import random

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

from vistoken.kernels import routing_ops as ops
from vistoken.kernels import routing_regions as regions
from vistoken.kernels import triton_routing_gradients as gradients
from vistoken.kernels import triton_routing_lists as kernels
from vistoken.kernels.routing import routed_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["one launch", "two launches"])
def launches(request, monkeypatch):
    monkeypatch.setattr(kernels, "together", lambda *sizes: request.param == "one launch")


@pytest.mark.parametrize(
    ("grid", "size", "heads", "key_heads", "dim", "topk", "per_head"),
    [
        ((8, 6), (2, 3), 3, 3, 8, 3, False),
        ((7, 9), (3, 4), 4, 2, 24, 2, True),
        ((5, 5), (5, 2), 6, 2, 16, 99, False),
        ((6, 10), (1, 2), 1, 1, 40, 5, True),
        ((9, 8), (4, 4), 2, 1, 300, 2, False),
        ((9, 10), (1, 1), 1, 1, 8, 7, False),  # more than 64 regions
        ((9, 11), (5, 6), 4, 2, 32, 4, True),  # more tokens than one step of the means
    ],
)
@pytest.mark.usefixtures("launches")
def test_chosen_regions(grid, size, heads, key_heads, dim, topk, per_head):
    torch.manual_seed(0)
    q = torch.randn(2, *grid, heads + 1, dim, device=DEVICE)[..., 1:, :]
    k = torch.randn(2, *grid, key_heads, dim, device=DEVICE)
    found = kernels.route(q, k, size, topk, per_head)
    wanted = regions._route(q.double(), k.double(), size, topk, per_head)
    assert found.dtype == torch.int32 and torch.equal(found, wanted)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("seed", range(6))
def test_random_problems(seed):
    """Whole numbers, so that sums are exact: lists agree to the last place, ties included."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    size, grid = ((rng.randint(1, 4), rng.randint(1, 4)) for _ in range(2))
    grid = tuple(rng.randint(1, side * 5) for side in size)
    key_heads, dim, per_head = rng.randint(1, 2), rng.choice([8, 24, 40]), rng.random() < 0.5
    heads = key_heads * rng.randint(1, 3)
    tokens = math.lcm(*range(1, 5))  # every mean is a whole number
    q, k = (torch.randint(-1, 2, (2, *grid, h, dim)) * tokens**2 for h in (heads, key_heads))
    mean_q, mean_k = (regions.region_means(x.double(), size) for x in (q, k))
    mean_k = mean_k.repeat_interleave(heads // key_heads, 2)
    scores = torch.einsum("brhd,bshd->bhrs", mean_q, mean_k)
    scores = scores if per_head else scores.sum(1, keepdim=True)
    topk = rng.randint(1, scores.shape[-1])
    wanted = scores.sort(dim=-1, stable=True, descending=True).indices[..., :topk]
    q, k = q.float().to(DEVICE), k.float().to(DEVICE)
    assert torch.equal(kernels.route(q, k, size, topk, per_head).cpu(), wanted.int())


@pytest.mark.usefixtures("launches")
def test_in_ties_lower_numbers_come_first():
    torch.manual_seed(0)
    q, k = torch.randint(-1, 2, (2, 2, 6, 8, 1, 1), device=DEVICE).half()
    # Regions of four tokens: means and scores are exact, and a key has one of nine means.
    mean_q, mean_k = (regions.region_means(x, (2, 2)).flatten(2) for x in (q, k))
    scores = mean_q @ mean_k.mT
    assert all(len(row.unique()) < len(row) for row in scores.flatten(0, 1))
    wanted = scores.sort(stable=True, descending=True).indices[:, None, :, :8]
    assert torch.equal(kernels.route(q, k, (2, 2), 8, False), wanted.int())


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.usefixtures("launches")
def test_no_region_twice_whatever_the_scores(value):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 6, 6, 2, 8, device=DEVICE)
    q[0, 0, 0, 0, 0] = k[0, 3, 3, 0, 1] = value
    k[0, 5, 5, 1, 2] = -value
    for topk in (4, 9):
        for row in kernels.route(q, k, (2, 2), topk, False).flatten(0, 2).tolist():
            assert len(set(row)) == topk and set(row) <= set(range(9))


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.usefixtures("launches")
def test_parts_of_a_packed_projection_are_read_where_they_lie(first):
    torch.manual_seed(0)
    packed = torch.randn(2, 6, 5, first + 3 * 2 * 24, device=DEVICE)[..., first:]
    q, k, _ = packed.unflatten(-1, (3, 2, 24)).unbind(-3)
    found = kernels.route(q, k, (2, 2), 4, True)
    assert torch.equal(found, kernels.route(q.contiguous(), k.contiguous(), (2, 2), 4, True))


@pytest.mark.usefixtures("launches")
def test_offsets_of_64_bits_agree(monkeypatch):
    q, k = torch.randn(2, 2, 6, 6, 2, 8, device=DEVICE)
    narrow = kernels.route(q, k, (2, 2), 3, False)
    monkeypatch.setattr(kernels, "wide", lambda *tensors: True)
    assert torch.equal(narrow, kernels.route(q, k, (2, 2), 3, False))


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 7, 3), (1, 1, 1100, 1)])
def test_inverse_lists(shape, counted):
    torch.manual_seed(0)
    index = torch.randint(-1, 7, shape, dtype=torch.int32)
    index[0, 0, 0] = 3  # listed several times
    counts = torch.randint(0, shape[-1] + 1, shape[:3]) if counted else None
    wanted, starts = regions.inverse_lists(index, counts, 6)
    given = index.to(DEVICE), None if counts is None else counts.to(DEVICE)
    found, begins = (x.cpu() for x in kernels.inverse_lists(*given, 6))
    assert found.dtype == starts.dtype == begins.dtype == torch.int32
    assert torch.equal(begins, starts)
    for line, other, ends in zip(
        found.flatten(0, 1), wanted.flatten(0, 1), starts.flatten(0, 1), strict=True
    ):
        assert torch.equal(line[: ends[-1]], other[: ends[-1]])


@pytest.mark.parametrize(
    ("grid", "heads", "batch", "limit", "once"),
    [
        ((28, 28), 6, 64, None, True),
        ((28, 28), 6, 32, 227 * 1024, True),
        ((28, 28), 6, 64, 99 * 1024, False),  # too little shared memory
        ((28, 28), 6, 31, None, False),  # too few programs
        ((14, 14), 12, 64, None, False),  # too little to read
        ((128, 128), 3, 64, None, True),
    ],
)
def test_what_is_read_by_many_programs_takes_one_launch(
    monkeypatch, grid, heads, batch, limit, once
):
    ran = []
    monkeypatch.setattr(kernels, "shared_limit", lambda device: limit)
    for name in ("choose_at_once", "choose_by_means"):
        monkeypatch.setattr(kernels, name, lambda *args, name=name: ran.append(name))
    q, k = torch.empty(2, batch, *grid, heads, 32, device="meta", dtype=torch.float16)
    monkeypatch.setattr(kernels, "rows_packed", lambda x: x)
    kernels.route(q, k, (grid[0] // 7, grid[1] // 7), 4, False)
    kernels.route(q, k, (1, 1), 4, False)  # too many regions
    assert ran == ["choose_at_once" if once else "choose_by_means", "choose_by_means"]


def test_calls_without_gradients_invert_no_lists(monkeypatch):
    q, k, v = (torch.randn(1, 4, 4, 1, 16, device=DEVICE) for _ in range(3))
    ran = []
    kept = gradients.inverse_lists
    monkeypatch.setattr(ops, "triton_runs", lambda q, v: True)
    monkeypatch.setattr(ops, "walks_bands", lambda *args: False)
    monkeypatch.setattr(gradients, "inverse_lists", lambda *args: ran.append(1) or kept(*args))
    index = kernels.route(q, k, (2, 2), 2, False)
    with torch.no_grad():
        routed_attention(q, k, v, index, (2, 2))
    out = routed_attention(q, k, v.requires_grad_(), index, (2, 2))
    assert not ran
    out.sum().backward()
    assert ran == [1]


def test_the_operator_takes_the_kernels(monkeypatch):
    q, k = torch.randn(2, 1, 4, 4, 1, 8, device=DEVICE)
    wanted = regions.route(q, k, (2, 2), 2)
    ran = []
    monkeypatch.setattr(regions, "use_triton", lambda *args: True)
    for name in ("route", "inverse_lists"):
        kept = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *args, name=name, kept=kept: ran.append(name) or kept(*args)
        )
    assert torch.equal(regions.route(q, k, (2, 2), 2), wanted)
    regions.inverse_lists(wanted, None, 4)
    assert ran == ["route", "inverse_lists"]
    monkeypatch.setattr(regions, "MAX_RANKED", 3)
    monkeypatch.setattr(regions, "MAX_ENTRIES", 3)
    regions.inverse_lists(regions.route(q, k, (2, 2), 2), None, 4)
    assert len(ran) == 2
