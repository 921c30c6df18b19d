"""Passes between the products of a prompt, in torch and in Triton, against loops in float64."""

import os

import pytest
import torch

from vistoken.kernels import prefill
from vistoken.kernels.prefill import rotate_and_store, silu_times

KERNELS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def path(request, monkeypatch):
    if request.param == "triton":
        if not KERNELS:
            pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU")
        pytest.importorskip("triton")
    monkeypatch.setattr(prefill, "use_triton", lambda x: request.param == "triton")


def naive(x, cos, sin):
    """Pairs (i, i + D/2) turned by the angle of each position, one head after the other."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    out, half = torch.empty_like(x), x.shape[-1] // 2
    for head in range(x.shape[2]):
        for i in range(half):
            a, b = x[:, :, head, i], x[:, :, head, i + half]
            out[:, :, head, i] = a * cos[..., i] - b * sin[..., i]
            out[:, :, head, i + half] = b * cos[..., i + half] + a * sin[..., i + half]
    return out


@pytest.mark.parametrize("sizes", [(2, 37, 4, 2, 16), (1, 5, 3, 3, 40), (3, 64, 2, 1, 64)], ids=str)
def test_rotation_and_caches(sizes, path):
    batch, length, heads, groups, dim = sizes
    torch.manual_seed(0)
    q = torch.randn(batch, length, heads, dim, device=DEVICE)
    k, v = torch.randn(2, batch, length, groups, dim, device=DEVICE)
    cos, sin = torch.randn(2, batch, length, dim // 2, device=DEVICE).repeat(1, 1, 1, 2)
    keys, values = torch.full((2, batch, groups, length + 7, dim), 9.0, device=DEVICE)
    wanted = naive(q, cos, sin), naive(k, cos, sin)
    rotate_and_store(q, k.clone(), v, cos, sin, keys, values)
    torch.testing.assert_close(q.double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        keys[:, :, :length].double(), wanted[1].transpose(1, 2), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(values[:, :, :length], v.transpose(1, 2))
    assert (keys[:, :, length:] == 9).all() and (values[:, :, length:] == 9).all()


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 40, 96)], ids=str)
def test_gate(shape, path):
    torch.manual_seed(0)
    gate, up = 4 * torch.randn(2, *shape, device=DEVICE)
    wanted = gate.double() * torch.sigmoid(gate.double()) * up.double()
    torch.testing.assert_close(silu_times(gate, up).double(), wanted, rtol=1e-5, atol=1e-6)
