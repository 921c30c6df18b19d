"""Triton kernels that choose regions and invert lists, against torch operators."""

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

from vistoken.kernels import routing_regions as regions
from vistoken.kernels import triton_routing_lists as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
def test_chosen_regions(grid, size, heads, key_heads, dim, topk, per_head):
    torch.manual_seed(0)
    q = torch.randn(2, *grid, heads + 1, dim, device=DEVICE)[..., 1:, :]
    k = torch.randn(2, *grid, key_heads, dim, device=DEVICE)
    found = kernels.route(q, k, size, topk, per_head)
    wanted = regions._route(q.double(), k.double(), size, topk, per_head)
    assert found.dtype == torch.int32 and torch.equal(found, wanted)


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
def test_no_region_twice_whatever_the_scores(value):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 6, 6, 2, 8, device=DEVICE)
    q[0, 0, 0, 0, 0] = k[0, 3, 3, 0, 1] = value
    k[0, 5, 5, 1, 2] = -value
    for topk in (4, 9):
        for row in kernels.route(q, k, (2, 2), topk, False).flatten(0, 2).tolist():
            assert len(set(row)) == topk and set(row) <= set(range(9))


@pytest.mark.parametrize("first", [0, 3])
def test_parts_of_a_packed_projection_are_read_where_they_lie(first):
    torch.manual_seed(0)
    packed = torch.randn(2, 6, 5, first + 3 * 2 * 24, device=DEVICE)[..., first:]
    q, k, _ = packed.unflatten(-1, (3, 2, 24)).unbind(-3)
    found = kernels.route(q, k, (2, 2), 4, True)
    assert torch.equal(found, kernels.route(q.contiguous(), k.contiguous(), (2, 2), 4, True))


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
