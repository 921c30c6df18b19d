"""Gradients of the fused chain against float64 autograd of its torch reference."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

from vistoken.kernels.chain import (
    Slots,
    add_reduce_norm,
    add_reduce_norm_op,
    add_reduce_norm_reference,
)
from vistoken.kernels.reduce import merge, merge_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, SLOTS, SOURCES, WIDTH = 29, 9, 15, 24


@pytest.fixture
def kernels(monkeypatch):
    """Sends every tensor to the kernels, which the interpreter runs on the CPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vistoken") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda x, dtypes=None: True)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def indices():
    g = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(TOKENS, generator=g) for _ in range(2)]).to(DEVICE)
    dst = torch.randint(0, SLOTS, (2, SOURCES), generator=g).to(DEVICE)
    return order[:, :SLOTS], order[:, SLOTS : SLOTS + SOURCES], dst


def inputs(kind, sized, branch, weighted, gain):
    """The differentiable inputs by name."""
    tensors = {"x": draw(2, TOKENS, WIDTH), "scale": draw(WIDTH, seed=2), "shift": draw(WIDTH)}
    if branch:
        tensors |= {"branch": draw(2, TOKENS, WIDTH, seed=3), "gamma": draw(WIDTH, seed=4)}
    if sized:
        tensors["size"] = draw(2, TOKENS, seed=5).abs() + 1
    if weighted and kind in ("merge", "sum", "mlerp"):
        tensors["weight"] = draw(2, TOKENS, seed=6).abs() + 0.2
    if gain and kind in ("merge", "sum", "mlerp"):
        tensors["gain"] = draw(2, SOURCES, seed=7).abs() + 0.2
    return tensors


def run(function, kind, tensors, dtype):
    """Outputs, and gradients of every input under a random loss of all outputs."""
    single = ("size", "gain")  # sizes are fp32 whatever the tokens are
    t = {
        name: value.detach().clone().to(torch.float32 if name in single else dtype)
        for name, value in tensors.items()
    }
    for value in t.values():
        value.requires_grad_()
    keep, src, dst = indices()
    slots = None
    if kind == "prune":
        slots = Slots(keep)
    elif kind != "all":
        slots = Slots(
            keep, src, dst, t.get("weight"), t.get("gain"), "mean" if kind == "merge" else kind
        )
    norm = (t["scale"], t["shift"], 1e-5)
    outs = function(t["x"], t.get("branch"), t.get("gamma"), slots, t.get("size"), norm)
    outs = [o for o in outs if o is not None]
    loss = sum((o * draw(*o.shape, seed=8 + i)).sum() for i, o in enumerate(outs))
    return outs, torch.autograd.grad(loss, list(t.values()), allow_unused=True)


CASES = [
    ("all", False, True, False, False),
    ("all", True, False, False, False),
    ("prune", True, True, False, False),
    ("prune", False, False, False, False),
    ("merge", True, True, True, True),
    ("merge", False, True, True, False),
    ("merge", False, False, False, True),
    ("merge", True, True, False, False),
    ("sum", True, True, True, False),
    ("sum", False, True, False, True),
    ("mlerp", True, True, True, True),
    ("mlerp", False, False, False, False),
]


@pytest.mark.parametrize("case", CASES)
def test_gradients(case, kernels):
    tensors = inputs(*case)
    got = run(add_reduce_norm, case[0], tensors, torch.float32)
    expected = run(add_reduce_norm_reference, case[0], tensors, torch.float64)
    for mine, exact in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
        assert (mine is None) == (exact is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), exact.double(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("case", CASES[:5])
def test_registration(case):
    tensors = {k: v.requires_grad_() for k, v in inputs(*case).items()}
    keep, src, dst = indices() if case[0] != "all" else (None,) * 3
    src, dst = (src, dst) if case[0] == "merge" else (None, None)
    parts = [tensors.get(name) for name in ("x", "branch", "gamma")]
    weights = [tensors.get(name) for name in ("weight", "gain")]
    last = ("mean", tensors.get("size"), tensors["scale"], tensors["shift"], 1e-5)
    torch.library.opcheck(add_reduce_norm_op, (*parts, keep, src, dst, *weights, *last))


def test_lengths_have_the_operator_without_a_gradient(kernels):
    tensors = inputs("mlerp", True, True, True, True)
    args = [tensors[name] for name in ("x", "branch", "gamma")]
    args += [*indices(), tensors["weight"], tensors["gain"], "mlerp", tensors["size"]]
    args += [tensors["scale"], tensors["shift"], 1e-5]
    torch.library.opcheck(add_reduce_norm_op, args, test_utils=("test_schema", "test_faketensor"))
    got = add_reduce_norm_op(*args)
    slots = Slots(*args[3:9])
    norm = args[10:]
    expected = add_reduce_norm_reference(*args[:3], slots, args[9], norm)
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=2e-4, atol=2e-4)
    args[0] = args[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient of rule='mlerp'"):
        add_reduce_norm_op(*args)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_of_merge(weighted, normalize):
    x = draw(2, TOKENS, WIDTH).double().requires_grad_()
    weight = (draw(2, TOKENS, seed=6).abs() + 0.2).double().requires_grad_() if weighted else None
    y = merge(x, *indices(), weight, normalize)
    grad = draw(*y.shape, seed=9).double()
    leaves = [x] if weight is None else [x, weight]
    expected = torch.autograd.grad((y * grad).sum(), leaves)
    got = merge_gradient(grad, x, y, *indices(), weight, normalize)
    for mine, exact in zip(got, expected, strict=False):
        torch.testing.assert_close(mine, exact)


def test_compiled_with_gradients(kernels):
    tensors = inputs(*CASES[4])
    expected = run(add_reduce_norm_reference, "merge", tensors, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(add_reduce_norm, backend="aot_eager", fullgraph=True)
    got = run(compiled, "merge", tensors, torch.float32)
    for mine, exact in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(mine, exact, rtol=2e-4, atol=2e-4)
