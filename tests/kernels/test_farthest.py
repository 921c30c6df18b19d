"""Farthest-first order: torch operators and the kernel against the definition in float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vistoken.kernels.farthest import farthest_first, farthest_first_op, farthest_first_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 3, 2), (9, 5, 9), (37, 40, 12), (64, 513, 20), (300, 24, 7)]


def naive(x, count):
    """The definition, with all pairs."""
    x = F.normalize(x.double(), dim=-1)
    gap = 1 - x @ x.T
    gap.fill_diagonal_(float("inf"))
    picks = [int(gap.amin(1).argmax())]
    while len(picks) < count:
        rest = [i for i in range(len(x)) if i not in picks]
        picks.append(max(rest, key=lambda i: float(gap[i, picks].min())))
    return picks


def vectors(tokens, width, dtype=torch.float32, seed=0):
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return (x * torch.linspace(0.1, 9, tokens)[:, None]).to(DEVICE, dtype)


def kernel(x, count):
    pytest.importorskip("triton")
    from vistoken.kernels.farthest import loneliest
    from vistoken.kernels.triton_farthest import farthest_first_triton

    return farthest_first_triton(x, loneliest(F.normalize(x.float(), dim=-1)), count)


@pytest.mark.parametrize("run", [farthest_first, kernel])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_is_the_definitions(run, shape, dtype):
    tokens, width, count = shape
    x = vectors(tokens, width, dtype)
    assert run(x, count).tolist() == naive(x, count)


@pytest.mark.parametrize("run", [farthest_first, kernel])
def test_copies_zeros_and_gaps_in_memory(run):
    x = vectors(12, 8)[:, ::2]
    assert run(x, 5).tolist() == naive(x, 5)
    same = vectors(1, 8).expand(20, 8)
    assert sorted(run(same, 20).tolist()) == list(range(20))
    x = vectors(10, 6)
    x[4] = 0
    assert sorted(run(x, 10).tolist()) == list(range(10))
    turned = vectors(6, 10).T
    assert run(turned, 4).tolist() == naive(turned, 4)


def test_five_launches_per_step():
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view and "split" not in str(func):
                called.append(str(func))
            return func(*args, **(kwargs or {}))

    x, first = vectors(50, 8), torch.tensor([3], device=DEVICE)
    counts = []
    for steps in (10, 30):
        called.clear()
        with Watch():
            farthest_first_reference(x, first, steps)
        counts.append(len(called))
    assert counts[1] - counts[0] == 5 * 20


def test_operator():
    x = vectors(20, 6)
    torch.library.opcheck(farthest_first_op, (x, 7))
    assert torch.equal(farthest_first_op(x, 7), farthest_first(x, 7))


PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vistoken.kernels.triton_farthest import _step
for dtype in ("bf16", "fp16", "fp32"):
    types = {"x_ptr": "*" + dtype, "inverse_ptr": "*fp32", "nearest_ptr": "*fp32",
             "worth_ptr": "*fp32", "place_ptr": "*i64", "pick_ptr": "*i64"}
    constants = {"ROWS": 8, "COLUMNS": 512, "BLOCKS": 360, "PARTS": 512}
    names = _step.arg_names
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in names}
    even = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names)
            if a.endswith("_ptr") or a in ("width", "stride")}
    values = {(names.index(a),): v for a, v in constants.items()}
    source = ASTSource(_step, signature=signature, constexprs=values, attrs=even)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    wide = "v4.b32" in built.asm["ptx"]
    print(dtype, len(built.asm["cubin"]) > 1000, built.metadata.shared < 48 * 1024, wide)
"""


@pytest.mark.slow
def test_kernel_compiles_for_an_h100():
    pytest.importorskip("triton")
    # A process of its own: under the interpreter's switch a kernel cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    lines = [f"{dtype} True True True" for dtype in ("bf16", "fp16", "fp32")]
    assert out.stdout.splitlines() == lines, out.stdout + out.stderr[-3000:]
