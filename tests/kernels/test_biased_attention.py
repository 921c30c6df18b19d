"""Gradients, options and registration of biased attention against float64 autograd."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

from vistoken.kernels.attention import class_row, received
from vistoken.kernels.biased_attention import biased_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 17, 1, 32), (1, 50, 3, 64), (1, 197, 2, 32), (2, 33, 2, 80)]


@pytest.fixture
def kernels(monkeypatch):
    """Sends every tensor to the kernels, which the interpreter runs on the CPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vistoken.kernels") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda x, dtypes=None: True)


def problem(shape, sized=True, masked=False, dtype=torch.float32):
    """q, k, v as views of one projection, the bias and the mask, and a gradient of the output."""
    batch, tokens, heads, dim = shape
    g = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(batch, tokens, 3, heads, dim, generator=g)
    bias = torch.rand(batch, tokens, generator=g) * 2 if sized else None
    alive = None
    if masked:
        alive = (torch.rand(batch, tokens, generator=g) > 0.4).float()
        alive[0, : tokens * 2 // 3] = 0
    grad = torch.randn(batch, tokens, heads, dim, generator=g).transpose(1, 2)
    move = [None if t is None else t.to(DEVICE) for t in (bias, alive)]
    return qkv.to(DEVICE, dtype), *move, grad.to(DEVICE, dtype)


def naive(q, k, v, bias, alive, scale):
    """Output, attention and log-sum-exp with the whole matrix, alive weighing exponentials."""
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * scale
    if bias is not None:
        scores = scores + bias[:, None, None]
    weight = torch.ones_like(scores)
    if alive is not None:
        own = torch.eye(q.shape[2], device=q.device, dtype=q.dtype)
        weight = alive[:, None, None] * (1 - own) + own
    power = scores.exp() * weight
    total = power.sum(-1)
    attention = power / total[..., None]
    return attention @ v, attention, total.log()


def run(implementation, qkv, bias, alive, grad, rows=0, weigh_lse=False):
    """Outputs and gradients of all inputs."""
    inputs = [t for t in (qkv, bias, alive) if t is not None]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    given = iter(inputs)
    qkv = next(given)
    bias = None if bias is None else next(given)
    alive = None if alive is None else next(given)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out, row, lse = implementation(q, k, v, bias, alive, q.shape[-1] ** -0.5, rows)
    loss = (out * grad).sum()
    if weigh_lse:
        loss = loss + (lse * lse.detach().sin()).sum()
    if rows:
        loss = loss + (row * row.detach().cos() * 30).sum()
    return [out, lse], torch.autograd.grad(loss, inputs)


def ours(q, k, v, bias, alive, scale, rows):
    return biased_attention(q, k, v, bias, scale, rows, alive=alive, return_lse=True)


def reference(q, k, v, bias, alive, scale, rows):
    out, attention, lse = naive(q, k, v, bias, alive, scale)
    return out, attention[:, :, :rows].mean((1, 2)) if rows else None, lse


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("sized", [True, False])
def test_gradients(shape, masked, sized, kernels):
    args = problem(shape, sized, masked)
    more = {"rows": 2, "weigh_lse": True} if sized else {}
    got = run(ours, *args, **more)
    expected = run(reference, *double(*args), **more)
    for mine, exact in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_the_torch_path(masked):
    args = double(*problem((2, 70, 2, 16), True, masked))
    got, expected = (run(f, *args, rows=1, weigh_lse=True) for f in (ours, reference))
    for mine, exact in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(mine, exact)


def test_gradients_that_are_not_contiguous(kernels):
    """A sum hands back one number for all, a transposed loss a transposed gradient."""
    qkv, bias, *_ = problem((2, 33, 2, 32))
    weights = torch.rand(33, 2, 2, device=DEVICE)

    def losses(out, lse):
        return lse.sum(), (lse.permute(2, 1, 0) * weights.to(lse)).sum(), out.sum() + lse.sum()

    leaf, exact = (x.clone().requires_grad_() for x in (qkv, qkv.double()))
    out, _, lse = ours(*leaf.permute(2, 0, 3, 1, 4).unbind(0), bias, None, 0.2, 0)
    want, _, norm = reference(*exact.permute(2, 0, 3, 1, 4).unbind(0), bias, None, 0.2, 0)
    for loss, other in zip(losses(out, lse), losses(want, norm), strict=True):
        (got,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (expected,) = torch.autograd.grad(other, exact, retain_graph=True)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-5)


# The interpreter multiplies bf16 matrices wrongly.
HALF = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_in_half_precision(dtype, kernels):
    args = problem((1, 50, 3, 64), True, True, dtype)
    got = run(ours, *args)
    expected = run(reference, *double(*args))
    for mine, exact in zip(got[1], expected[1], strict=True):
        assert (mine.double() - exact).norm() / exact.norm() < 1e-2


def test_a_boolean_mask_is_a_float_mask_without_gradient(kernels):
    qkv, bias, alive, grad = problem((2, 33, 2, 80), True, True)
    for way in (ours, reference):
        hidden = run(lambda *a, way=way: way(*a), *double(qkv, bias, alive, grad))
        assert hidden[1][2].abs().max() > 0
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    got = biased_attention(q, k, v, bias, 0.1, 1, alive=alive.bool())
    expected = biased_attention(q, k, v, bias, 0.1, 1, alive=alive)
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)


def test_dead_tokens_get_gradients_from_themselves_alone(kernels):
    qkv, bias, alive, grad = problem((1, 50, 3, 64), True, True)
    living = grad * alive[:, None, :, None]
    _, (dqkv, dbias, _) = run(ours, qkv, bias, alive, living)
    dead = alive == 0
    assert dqkv[dead].abs().max() == 0 and dbias[dead].abs().max() == 0
    assert dqkv[~dead].abs().min() > 0


def test_dead_keys_with_huge_scores_do_no_harm(kernels):
    qkv, bias, alive, grad = problem((1, 50, 3, 64), True, True)
    qkv[:, 0, 1] *= 500
    assert alive[0, 0] == 0
    outs, grads = run(ours, qkv, bias, alive, grad)
    assert all(t.isfinite().all() for t in (*outs, *grads))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_column_means_reuse_the_normalizer(masked, shape, kernels):
    qkv, bias, alive, _ = problem(shape, True, masked)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    _, row, lse = biased_attention(q, k, v, bias, 0.2, 1, alive=alive, return_lse=True)
    attention = naive(*double(q, k, v, bias, alive), 0.2)[1]
    columns = received(q, k, bias, 0.2, lse, alive)
    torch.testing.assert_close(columns.double(), attention.mean((1, 2)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(row.double(), attention[:, :, 0].mean(1), rtol=1e-4, atol=1e-6)
    plain = class_row(q[:, :, :1], k, bias, 0.2, alive)
    torch.testing.assert_close(row, plain, rtol=1e-4, atol=1e-6)


def test_column_means_with_a_mask_need_its_normalizer():
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="alive is given without lse"):
        received(x, x, None, 1.0, alive=torch.ones(1, 3))
