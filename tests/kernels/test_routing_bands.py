"""Routed attention of small maps in the interpreter (or on a GPU) against the float64 reference."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

from vistoken.kernels import routing_ops as ops
from vistoken.kernels import routing_reference as reference
from vistoken.kernels import triton_routing_bands as kernels
from vistoken.kernels.routing import routed_attention
from vistoken.kernels.routing_bands import (
    MAX_TOKENS,
    band_tile,
    bands_fit,
    bands_win,
    choose_bands,
)
from vistoken.kernels.routing_regions import Routing, count_regions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def double(*tensors):
    return [None if x is None else x.double() for x in tensors]


def draw_lists(batch, heads, regions, listed):
    """Distinct regions in random order; the last of every second list is no region."""
    rows = [torch.randperm(regions)[:listed] for _ in range(batch * heads * regions)]
    index = torch.stack(rows).view(batch, heads, regions, listed).int().to(DEVICE)
    index[..., ::2, -1] = -1
    return index


def compare(
    grid, size, listed, heads=1, dim=16, *, batch=1, group=1, extra=0, per_head=False,
    shared=False, up_lse=True, tile=None, back=None,
):  # fmt: skip
    """Both passes of one problem; q, k and v are slices of wider tensors."""
    torch.manual_seed(0)
    key_heads = heads // group
    q = draw(batch, *grid, heads + 1, dim)[..., 1:, :]
    k, v = draw(batch, *grid, 2 * key_heads, dim).chunk(2, -2)
    regions = math.prod(count_regions(grid, size))
    index = draw_lists(1 if shared else batch, heads if per_head else 1, regions, listed)
    more = [draw(batch, extra, key_heads, dim) if extra else None for _ in range(2)]
    routing = Routing(size, size)
    out, lse = kernels.forward(q, k, v, index, *more, size, 0.3, tile=tile)
    exact, exact_lse = reference.forward(
        *double(q, k, v), index, None, *double(*more), routing, 0.3
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=2e-5)
    if group > 1:
        return
    up = torch.randn_like(out)
    ups = torch.where(torch.isfinite(lse), torch.randn_like(lse), 0.0) if up_lse else None
    got = kernels.backward(up, ups, q, k, v, out, lse, index, *more, size, 0.3, tile=back)
    want = reference.backward(
        *double(up, ups, q, k, v), exact, exact_lse, index, None, *double(*more), routing, 0.3
    )
    for mine, other in zip(got, want, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), other, rtol=1e-3, atol=1e-4)


CASES = {
    "divided": ((4, 4), (2, 2), 3, {"batch": 2}),
    "ragged": ((5, 7), (2, 3), 4, {"heads": 2}),
    "lists per head, extra": ((5, 7), (2, 2), 5, {"heads": 2, "per_head": True, "extra": 3}),
    "one list for all images": ((6, 4), (2, 2), 3, {"batch": 2, "shared": True, "up_lse": False}),
    "one token, odd width": ((7, 5), (1, 1), 9, {"dim": 24}),
    "nothing listed": ((4, 4), (2, 2), 1, {}),
    "64 regions": ((16, 16), (2, 2), 9, {}),
    "shared keys": ((6, 6), (2, 2), 4, {"heads": 4, "group": 2, "extra": 2}),
    "several steps and programs": (
        (9, 7), (2, 3), 6,
        {"tile": band_tile((9, 7), (2, 3), 32, 16, 1, 2),
         "back": band_tile((9, 7), (2, 3), 64, 32, 1, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernels(name):
    grid, size, listed, options = CASES[name]
    compare(grid, size, listed, **options)


def test_offsets_of_64_bits_agree(monkeypatch):
    monkeypatch.setattr(kernels, "wide", lambda *tensors: True)
    compare((5, 7), (2, 3), 4, heads=2)


def test_the_operator_takes_them_where_lists_are_distinct(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (draw(1, 6, 6, 1, 16).requires_grad_() for _ in range(3))
    index = draw_lists(1, 1, 9, 4)[:, 0]
    expected = routed_attention(*(x.double() for x in (q, k, v)), index, 2)
    up = torch.randn_like(expected)
    want = torch.autograd.grad(expected, (q, k, v), up)
    monkeypatch.setattr(ops, "triton_runs", lambda q, v: True)
    monkeypatch.setattr(ops, "bands_fit", lambda *args: True)
    ran = []
    for name in ("forward", "backward"):
        kept = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *args, name=name, kept=kept: ran.append(name) or kept(*args)
        )
    out = routed_attention(q, k, v, index, 2, distinct=True)
    got = torch.autograd.grad(out, (q, k, v), up.float())
    assert ran == ["forward", "backward"]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    routed_attention(q, k, v, index, 2)
    assert len(ran) == 2


def test_gradients_repeat_bit_for_bit():
    torch.manual_seed(0)
    q, k, v, up = (draw(1, 6, 6, 1, 16) for _ in range(4))
    index = draw_lists(1, 1, 9, 4)
    out, lse = kernels.forward(q, k, v, index, None, None, (2, 2), 0.3)
    given = up, None, q, k, v, out, lse, index, None, None, (2, 2), 0.3
    first, second = kernels.backward(*given), kernels.backward(*given)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def test_which_problems_are_walked_in_bands():
    plain = Routing((2, 2), (2, 2))
    assert bands_fit((14, 14), plain, 32, 2, 1) and bands_win((14, 14), (2, 2), 16, 32)
    assert not bands_win((14, 14), (2, 2), 1, 32)
    assert bands_fit((13, 14), plain, 32, 2, 1)
    for grid, routing, dim, bytes_, group in (
        ((18, 14), plain, 32, 2, 1),  # 63 regions, 252 tokens: fits, see below
        ((18, 16), plain, 32, 2, 1),
        ((14, 14), plain, 128, 2, 1),
        ((14, 14), plain, 32, 4, 1),
        ((14, 14), plain, 32, 2, 2),
        ((13, 14), Routing((2, 2), (2, 2), pads=True), 32, 2, 1),
        ((1, 64), Routing((1, 4), (1, 4), causal=True), 32, 2, 1),
        ((1, 64), Routing((1, 4), (1, 8)), 32, 2, 1),
        ((14, 14), Routing((14, 14), (14, 14)), 32, 2, 1),
    ):
        assert bands_fit(grid, routing, dim, bytes_, group) == (grid == (18, 14))


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (7, 9), (3, 40), (1, 64), (12, 20)])
def test_every_chosen_tile_covers_the_map(grid):
    for size in ((2, 2), (3, 4), (1, 2), (4, 4)):
        if size[0] > grid[0] or not bands_fit(grid, Routing(size, size), 32, 2, 1):
            continue
        across = count_regions(grid, size)[1]
        for kind in ("forward", "backward"):
            tile = choose_bands(grid, size, 32, kind)
            assert tile.own <= tile.rows <= MAX_TOKENS and tile.bands * across <= 32
            assert tile.bands * size[0] * grid[1] <= tile.columns
            assert kind == "forward" or tile.own == math.prod(grid)
