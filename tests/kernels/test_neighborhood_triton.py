"""The neighborhood kernels in the interpreter (or on a GPU) against the float64 reference."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

from vistoken.kernels import neighborhood_ops as ops
from vistoken.kernels import neighborhood_reference as reference
from vistoken.kernels import triton_neighborhood as kernels
from vistoken.kernels import triton_neighborhood_gradients as gradients
from vistoken.kernels.neighborhood import na2d
from vistoken.kernels.neighborhood_tiles import Tile, choose, shape_of
from vistoken.kernels.neighborhood_windows import Neighborhood

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def double(*tensors):
    return [None if x is None else x.double() for x in tensors]


def compare(grid, hood, heads, key_heads, dim, extra=0, bias=False, tile=None, scale=0.3):
    """All passes of one problem; q, k and v are slices of wider tensors."""
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device=DEVICE)

    q = draw(1, *grid, heads + 1, dim)[..., 1:, :]
    k, v = draw(1, *grid, 2 * key_heads, dim).chunk(2, -2)
    more = [draw(1, extra, key_heads, dim) if extra else None for _ in range(2)]
    rpb = draw(heads, *(2 * w - 1 for w in hood.window)) if bias else None
    args, wide = (q, k, v), double(q, k, v)
    out, lse = kernels.forward(*args, hood, scale, *more, rpb, tile=tile)
    wide_more = double(*more, rpb)
    exact, exact_lse = reference.forward(*wide, hood, scale, *wide_more)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=2e-5)
    up, up_lse = torch.randn_like(out), torch.randn_like(lse)
    got = gradients.backward(
        up, up_lse, *args, out, lse, hood, scale, *more, rpb, tiles=(tile, tile)
    )
    want = reference.backward(*double(up, up_lse), *wide, exact, exact_lse, hood, scale, *wide_more)
    for mine, other in zip(got, want, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), other, rtol=1e-3, atol=1e-4)


def hood(window, stride=1, dilation=1, causal=False):
    rank = len(window)
    wide = [x if isinstance(x, tuple) else (x,) * rank for x in (stride, dilation, causal)]
    return Neighborhood(window, *wide)


SMALL = Tile((1, 3, 4), (1, 2, 7))
CASES = {
    "square": ((7, 9), hood((3, 3)), 1, 1, 16, {"tile": SMALL}),
    "even, wide heads": ((6, 7), hood((4, 2)), 1, 1, 24, {}),
    "several bands": ((5, 12), hood((3, 7)), 1, 1, 16, {"tile": Tile((1, 4, 4), (1, 3, 5))}),
    "no bits": ((3, 34), hood((3, 20)), 1, 1, 16, {"tile": Tile((1, 3, 17), (1, 1, 32))}),
    "ragged dilation": ((7, 8), hood((3, 2), 1, (2, 3)), 1, 1, 16, {"tile": SMALL}),
    "stride": ((8, 9), hood((4, 3), (3, 2)), 1, 1, 16, {"tile": SMALL}),
    "causal": ((7, 8), hood((3, 4), (1, 2), 1, (True, False)), 1, 1, 16, {"tile": SMALL}),
    "causal both": ((7, 8), hood((3, 4), 1, 1, True), 1, 1, 16, {"tile": SMALL}),
    "groups and extra": ((5, 6), hood((3, 3)), 4, 2, 16, {"extra": 3}),
    "many extra": ((4, 5), hood((3, 3)), 2, 1, 16, {"extra": 70}),
    "bias": ((7, 8), hood((3, 4)), 2, 1, 16, {"bias": True, "tile": SMALL}),
    "bias, dilation, extra": ((7, 7), hood((3, 3), 1, 2), 1, 1, 16, {"bias": True, "extra": 2}),
    "bias, stride": ((7, 8), hood((4, 3), (2, 3)), 1, 1, 16, {"bias": True}),
    "heads first": ((7, 9), hood((3, 3)), 3, 3, 16,
                    {"tile": Tile((1, 4, 4), (1, 2, 6), head_first=True)}),
    "sequence": ((40,), hood((5,)), 1, 1, 16, {"tile": Tile((1, 1, 16), (1, 1, 9))}),
    "long sequence": ((90,), hood((50,), 3), 1, 1, 16, {"tile": Tile((1, 1, 32), (1, 1, 32))}),
    "sequence, causal, dilation": ((33,), hood((5,), 2, 3, True), 1, 1, 16, {}),
    "volume": ((4, 5, 6), hood((2, 3, 4)), 1, 1, 16, {"tile": Tile((2, 3, 3), (1, 3, 4))}),
    "volume, all": ((5, 4, 6), hood((2, 3, 2), (1, 2, 1), (2, 1, 2), (False, True, False)),
                    2, 1, 16, {"extra": 1}),
    "volume, bias": ((3, 4, 5), hood((2, 3, 3)), 1, 1, 16, {"bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernels(name):
    grid, around, heads, key_heads, dim, options = CASES[name]
    compare(grid, around, heads, key_heads, dim, **options)


def test_the_operator_runs_the_kernels_and_its_gradients(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 6, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 5, 5, device=DEVICE, requires_grad=True)
    expected = na2d(*(x.double() for x in (q, k, v)), 3, rpb=rpb.double())
    up = torch.randn_like(expected)
    want = torch.autograd.grad(expected, (q, k, v, rpb), up)
    monkeypatch.setattr(ops, "triton_runs", lambda q, v, dilation: True)
    ran = []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: ran.append(1) or forward(*args))
    out = na2d(q, k, v, 3, rpb=rpb)
    got = torch.autograd.grad(out, (q, k, v, rpb), up.float())
    assert ran
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 30.0, 300.0])
def test_scores_of_any_size(size):
    """Sums beyond the safe range take the walk with the running maximum."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 6, 1, 16, device=DEVICE) for _ in range(3))
    q, k = q * size, k + 2
    out, lse = kernels.forward(q, k, v, hood((3, 3)), 0.3, tile=SMALL)
    exact, exact_lse = reference.forward(*double(q, k, v), hood((3, 3)), 0.3, None, None, None)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-3)


def test_offsets_of_64_bits_agree(monkeypatch):
    for module in (kernels, gradients):
        monkeypatch.setattr(module, "wide", lambda *tensors: True)
    compare((5, 6), hood((3, 3)), 1, 1, 16, tile=SMALL)


def test_gradients_repeat_bit_for_bit():
    torch.manual_seed(0)
    q, k, v, up = (torch.randn(1, 5, 6, 1, 16, device=DEVICE) for _ in range(4))
    around = hood((3, 3))
    out, lse = kernels.forward(q, k, v, around, 0.3)
    first, second = (gradients.backward(up, None, q, k, v, out, lse, around, 0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_every_chosen_tile_is_legal(seed):
    rng = random.Random(seed)
    rank = 1 + seed % 3
    window = tuple(rng.randint(1, 40 if rank < 3 else 9) for _ in range(rank))
    dilation = tuple(rng.randint(1, 4) for _ in range(rank))
    grid = tuple(w * d + rng.randint(0, 60) for w, d in zip(window, dilation, strict=True))
    stride = tuple(rng.randint(1, w) for w in window)
    around = Neighborhood(window, stride, dilation, (False,) * rank)
    shape = shape_of(grid, around, rng.choice([24, 32, 64, 128]), 2)
    for kind in ("forward", "query", "key"):
        tile = choose(shape, kind, (9, 0))
        assert tile.rows <= 128
        assert tile.columns <= 128
        assert all(t <= n for t, n in zip(tile.own, shape.lengths, strict=True))
