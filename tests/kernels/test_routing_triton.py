"""The routed attention kernels in the interpreter (or on a GPU) against the float64 reference."""

import math
import os
import random

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

from vistoken.kernels import routing_ops as ops
from vistoken.kernels import routing_reference as reference
from vistoken.kernels import triton_routing as kernels
from vistoken.kernels import triton_routing_gradients as gradients
from vistoken.kernels import triton_routing_launch as launch
from vistoken.kernels.routing import routed_attention
from vistoken.kernels.routing_regions import Routing, count_regions
from vistoken.kernels.routing_tiles import Tile, choose, parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def double(*tensors):
    return [None if x is None else x.double() for x in tensors]


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def compare(
    grid, q_size, listed, heads=1, key_heads=1, dim=16, *, k_grid=None, k_size=None, extra=0,
    batch=1, per_head=False, shared=False, counts=False, pads=False, causal=False, tile=None,
    scale=0.3,
):  # fmt: skip
    """All passes of one problem; q, k and v are slices of wider tensors."""
    torch.manual_seed(0)
    rng = random.Random(0)
    k_grid, k_size = k_grid or grid, k_size or q_size
    q = draw(batch, *grid, heads + 1, dim)[..., 1:, :]
    k, v = draw(batch, *k_grid, 2 * key_heads, dim).chunk(2, -2)
    regions, total = (math.prod(count_regions(*x)) for x in ((grid, q_size), (k_grid, k_size)))
    shape = (1 if shared else batch), (heads if per_head else 1)
    index = torch.tensor(
        [[[rng.sample(range(total), listed) for _ in range(regions)] for _ in range(shape[1])]
         for _ in range(shape[0])], dtype=torch.int32, device=DEVICE,
    )  # fmt: skip
    many = None
    if counts:
        index[..., -1] = -1
        many = torch.randint(0, listed + 1, (*shape, regions), dtype=torch.int32, device=DEVICE)
    more = [draw(batch, extra, key_heads, dim) if extra else None for _ in range(2)]
    routing = Routing(q_size, k_size, pads, causal)
    tail = index, many
    out, lse = kernels.forward(q, k, v, *tail, *more, routing, scale, tile=tile and tile[0])
    wide = double(q, k, v)
    exact, exact_lse = reference.forward(*wide, *tail, *double(*more), routing, scale)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=2e-5)
    up, up_lse = torch.randn_like(out), torch.randn_like(lse)
    up_lse = torch.where(torch.isfinite(lse), up_lse, 0.0)
    got = gradients.backward(
        up, up_lse, q, k, v, out, lse, *tail, *more, routing, scale, tiles=tile or (None, None)
    )
    want = reference.backward(
        *double(up, up_lse), *wide, exact, exact_lse, *tail, *double(*more), routing, scale
    )
    for mine, other in zip(got, want, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), other, rtol=1e-3, atol=1e-4)


PARTS = Tile((2, 3), (2, 2), 0, 16, 16, 1, 2), Tile((3, 2), (1, 4), 0, 16, 16, 1, 2)
CASES = {
    "small regions": ((4, 4), (2, 2), 3, {"batch": 2}),
    "ragged": ((5, 4), (2, 3), 3, {}),
    "ragged, zeros attended": ((5, 4), (2, 3), 3, {"pads": True}),
    "large regions": ((9, 8), (5, 8), 2, {}),
    "parts of a region": ((5, 4), (3, 4), 2, {"tile": PARTS}),
    "parts, zeros attended": ((4, 3), (3, 4), 1, {"tile": PARTS, "pads": True}),
    "one token": ((2, 3), (1, 1), 4, {}),
    "the whole map": ((5, 6), (5, 6), 1, {}),
    "groups, lists per head": ((4, 2), (2, 2), 1, {"heads": 4, "key_heads": 2, "per_head": True}),
    "groups, extra": ((4, 3), (2, 3), 2, {"heads": 2, "extra": 3, "batch": 2}),
    "extra, zeros attended": ((3, 4), (2, 3), 2, {"extra": 2, "pads": True}),
    "one list for all images": ((4, 4), (2, 2), 3, {"shared": True, "batch": 2}),
    "odd width": ((4, 3), (2, 3), 2, {"dim": 24}),
    "blocks": ((1, 19), (1, 8), 3, {"k_grid": (1, 40), "k_size": (1, 12), "counts": True}),
    "blocks, causal": ((1, 19), (1, 8), 3, {"k_grid": (1, 40), "k_size": (1, 12), "causal": True}),
    "blocks, causal, long": (
        (1, 20), (1, 20), 2, {"k_grid": (1, 80), "k_size": (1, 45), "causal": True},
    ),
    "blocks, counts, per head": (
        (1, 11), (1, 6), 2, {"counts": True, "heads": 2, "per_head": True, "causal": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernels(name):
    grid, size, listed, options = CASES[name]
    compare(grid, size, listed, **options)


@pytest.mark.parametrize("dim", [16, 24])
@pytest.mark.parametrize("size", [(7, 7), (3, 14), (4, 10)])
def test_tiles_of_narrow_heads_in_half_precision(size, dim, monkeypatch):
    ran = []

    def plan(own, walked, listed, q, kind, tile=None):
        # Values stay in float32, whose error is small: only the tiles are those of two bytes.
        ran.append(launch.constants_of(own, walked, listed, q.shape[-1], 2, kind))
        return ran[-1][0], {**ran[-1][1], "PRECISION": "tf32x3"}

    for module in (kernels, gradients):
        monkeypatch.setattr(module, "plan", plan)
    compare((9, 15), size, 2, heads=2, dim=dim, per_head=True)
    forward, query, key = (tile for tile, _ in ran)
    # Two rows of a region at a time, or as many as fit.
    assert forward.walk == query.walk == {(7, 7): (2, 7), (3, 14): (2, 14), (4, 10): (2, 10)}[size]
    assert math.prod(key.walk) > 32
    for tile, rows in ((forward, 64), (query, 64), (key, 32)):
        assert tile.warps == max(1, tile.rows // rows)


def test_the_operator_runs_the_kernels_and_its_gradients(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (draw(1, 3, 6, 1, 16).requires_grad_() for _ in range(3))
    index = torch.randint(0, 4, (1, 4, 2), device=DEVICE)
    expected = routed_attention(*(x.double() for x in (q, k, v)), index, (2, 3))
    up = torch.randn_like(expected)
    want = torch.autograd.grad(expected, (q, k, v), up)
    monkeypatch.setattr(ops, "triton_runs", lambda q, v: True)
    ran = []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: ran.append(1) or forward(*args))
    out = routed_attention(q, k, v, index, (2, 3))
    got = torch.autograd.grad(out, (q, k, v), up.float())
    assert ran
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 300.0])
def test_scores_of_any_size(size):
    torch.manual_seed(0)
    q, k, v = draw(1, 4, 4, 1, 16) * size, draw(1, 4, 4, 1, 16) + 2, draw(1, 4, 4, 1, 16)
    index = torch.tensor([[[[0, 3], [1, 2], [2, 0], [3, 1]]]], dtype=torch.int32, device=DEVICE)
    routing = Routing((2, 2), (2, 2))
    out, lse = kernels.forward(q, k, v, index, None, None, None, routing, 0.3)
    exact, exact_lse = reference.forward(*double(q, k, v), index, None, None, None, routing, 0.3)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-3)


def test_offsets_of_64_bits_agree(monkeypatch):
    for module in (kernels, gradients):
        monkeypatch.setattr(module, "wide", lambda *tensors: True)
    compare((4, 3), (2, 3), 2)
    compare((3, 4), (3, 4), 1, tile=PARTS)


def test_gradients_repeat_bit_for_bit():
    torch.manual_seed(0)
    q, k, v, up = (draw(1, 4, 4, 1, 16) for _ in range(4))
    index = torch.randint(0, 4, (1, 1, 4, 3), dtype=torch.int32, device=DEVICE)
    tail = index, None, None, None, Routing((2, 2), (2, 2)), 0.3
    out, lse = kernels.forward(q, k, v, *tail)
    first, second = (gradients.backward(up, None, q, k, v, out, lse, *tail) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_every_chosen_tile_is_legal(seed):
    rng = random.Random(seed)
    own, walked = ((rng.randint(1, 30), rng.randint(1, 150)) for _ in range(2))
    listed = rng.randint(1, 40)
    dim, bytes_ = rng.choice([24, 64, 128, 256]), rng.choice([2, 4])
    tile = choose(own, walked, listed, dim, bytes_, rng.choice(["forward", "query", "key"]))
    assert math.prod(tile.own) <= tile.rows <= 64
    assert tile.rows in (16, 32, 64) and tile.columns in (16, 32, 64)
    if tile.per:
        assert tile.walk == walked and tile.per * math.prod(walked) <= tile.columns
        assert 1 <= tile.per <= listed
    else:
        assert math.prod(tile.walk) <= tile.columns
    for size, side in ((own, tile.own), (walked, tile.walk)):
        count = parts(size, side)
        covered = [n * s for n, s in zip(count, side, strict=True)]
        assert all(n <= c < n + s for n, c, s in zip(size, covered, side, strict=True))
