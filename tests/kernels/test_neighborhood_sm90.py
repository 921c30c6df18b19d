"""The neighborhood kernels compile for an H100 without a GPU; the interpreter hides type errors."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vistoken.kernels import triton_neighborhood as forward
from vistoken.kernels import triton_neighborhood_backward as backward
from vistoken.kernels import triton_neighborhood_bias as bias
from vistoken.kernels import triton_neighborhood_extra as extras
from vistoken.kernels import triton_neighborhood_launch as launch
from vistoken.kernels.neighborhood_windows import Neighborhood

FLOAT = {"lse_ptr", "delta_ptr", "grad_lse_ptr", "rpb_ptr", "part_ptr", "scale", "scale2"}


def build(name, kernel, kind, grid, hood, dim, **more):
    constants = dict(launch.plan_of(grid, hood, dim, 2, kind).constants, **more)
    options = {"maxnreg": constants.pop("maxnreg", None)}
    options |= {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature, exact = {}, {}
    for at, arg in enumerate(kernel.arg_names):
        type = "fp32" if arg in FLOAT else "bf16" if arg.endswith("_ptr") else "i32"
        signature[arg] = "constexpr" if arg in constants else (
            "*" + type if arg.endswith("_ptr") else type)
        if arg.endswith("_ptr") or (arg[0] == "s" and len(arg) == 3):
            exact[(at,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=exact)
    try:
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        fits = built.metadata.shared < 227 * 1024
        print("built" if fits else "too large", name, grid)
    except Exception as error:
        print("failed", name, grid, repr(error)[:300])


PROBLEMS = [
    ((56, 56), Neighborhood((7, 7), (1, 1), (1, 1), (False, False)), 32, 0, False),
    ((28, 30), Neighborhood((5, 4), (2, 1), (2, 3), (True, False)), 80, 16, False),
    ((28, 28), Neighborhood((7, 7), (1, 1), (2, 2), (False, False)), 32, 0, True),
    ((500,), Neighborhood((63,), (1,), (1,), (False,)), 64, 0, False),
    ((8, 14, 14), Neighborhood((3, 5, 5), (1,) * 3, (1,) * 3, (False,) * 3), 64, 0, False),
]
for grid, hood, dim, extra, rpb in PROBLEMS:
    both = {"RPB": rpb, "WIDE": bool(extra)}
    build("forward", forward._forward, "forward", grid, hood, dim, EXTRA=extra, BOUNDED=True,
          **both)
    build("query", backward._query, "query", grid, hood, dim, EXTRA=extra,
          GRAD_LSE=rpb, **both)
    build("key", backward._key, "key", grid, hood, dim, GROUPED=bool(extra), **both)
    if extra:
        build("extra", extras._extra, "query", grid, hood, dim, WIDE=True)
    if rpb:
        build("bias", bias._bias, "query", grid, hood, dim, WIDE=True)
"""


@pytest.mark.slow
def test_neighborhood_kernels_compile():
    # A process of its own: under the interpreter's switch a kernel cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    lines = out.stdout.splitlines()
    assert len(lines) == 17, out.stderr[-3000:]
    assert all(line.startswith("built") for line in lines), lines
