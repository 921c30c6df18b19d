"""Tiles are compared with the reference before they are used."""

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

from vistoken.kernels import neighborhood_ops as ops
from vistoken.kernels import neighborhood_trust as trust
from vistoken.kernels import triton_neighborhood as forward
from vistoken.kernels import triton_neighborhood_gradients as gradients
from vistoken.kernels.neighborhood_tiles import choose, ranked, shape_of
from vistoken.kernels.neighborhood_windows import Neighborhood

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOOD = Neighborhood((3, 5), (1, 1), (1, 2), (False, False))
CALL = trust.Call((7, 12), HOOD, 2, 1, 16, torch.float32, 3, True)


@pytest.mark.parametrize("kind", ["forward", "query", "key"])
def test_the_chosen_tile_is_sound(kind):
    tile = choose(shape_of(CALL.grid, HOOD, 16, 4), kind)
    assert trust.difference(kind, CALL, tile, DEVICE) < 1e-3
    assert trust.first_sound(kind, CALL, DEVICE) == tile


@pytest.mark.parametrize("kind", ["forward", "query", "key"])
def test_a_wrong_result_is_seen_and_the_next_tile_is_taken(kind, monkeypatch, caplog):
    tiles = list(ranked(shape_of(CALL.grid, HOOD, 16, 4), kind))
    module, name = {
        "forward": (forward, "forward"),
        "query": (gradients, "query_gradient"),
        "key": (gradients, "key_gradients"),
    }[kind]
    right = getattr(module, name)

    def wrong(*args):
        results = right(*args)
        if args[-1] == tiles[0]:
            results[0][..., -1] += 1
        if args[-1] == tiles[1]:
            raise RuntimeError("out of shared memory")
        return results

    monkeypatch.setattr(module, name, wrong)
    assert trust.first_sound(kind, CALL, DEVICE) == tiles[2]
    assert "is off by" in caplog.text
    assert "out of shared memory" in caplog.text


def test_not_a_number_is_no_agreement():
    assert trust.relative(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_no_tile_is_tried_twice_and_all_are_different():
    hood = Neighborhood((7, 7), (1, 1), (1, 1), (False, False))
    tiles = list(ranked(shape_of((64, 64), hood, 64, 2), "forward", (9, 0)))
    assert len(tiles) == len(set(tiles)) > 4


def test_long_axes_are_cut_but_keep_window_and_remainder():
    call = trust.Call((1000, 129, 50), Neighborhood((63, 31, 5), (1,) * 3, (2, 3, 1), (False,) * 3),
                      1, 1, 32, torch.bfloat16, 0, False)  # fmt: skip
    assert call.small().grid == (136, 97, 50)
    for n, cut, w, d in zip(call.grid, call.small().grid, (63, 31, 5), (2, 3, 1), strict=True):
        assert cut % 16 == n % 16 or cut == n
        assert w * d <= cut


def test_the_reference_runs_where_nothing_is_sound(monkeypatch):
    def unsound(*args):
        raise trust.NoSoundTileError("none")

    monkeypatch.setattr(ops, "triton_runs", lambda *args: True)
    monkeypatch.setattr(forward, "sound_tile", unsound)
    monkeypatch.setattr(gradients, "sound_tile", unsound)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 7, 12, 2, 16, requires_grad=True) for _ in "qkv")
    tail = (None, None, None, (3, 5), (1, 1), (1, 2), (False, False), 0.25)
    out, _ = ops.neighborhood(q, k, v, *tail)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    exact, _ = ops.reference.forward(q, k, v, HOOD, 0.25, None, None, None)
    torch.testing.assert_close(out, exact.detach())
    assert all(g.abs().sum() > 0 for g in found)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_call_is_compared_once(monkeypatch):
    seen = []
    real = trust.first_sound
    monkeypatch.setattr(trust, "first_sound", lambda *args: seen.append(args) or real(*args))
    monkeypatch.setattr(trust, "_FOUND", {})
    q = torch.randn(1, 9, 9, 1, 32, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(2):
        ops.neighborhood(q, q, q, None, None, None, (3, 3), (1, 1), (1, 1), (False, False), 0.2)
    assert len(seen) == 1
