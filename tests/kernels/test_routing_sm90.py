"""The routed attention kernels compile for an H100 without a GPU, with few spilled registers."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import os, re, subprocess, tempfile
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
import triton
from vistoken.kernels import triton_routing as forward
from vistoken.kernels import triton_routing_backward as backward
from vistoken.kernels import triton_routing_bands as bands
from vistoken.kernels import triton_routing_launch as launch
from vistoken.kernels import triton_routing_lists as lists
from vistoken.kernels.routing_bands import choose_bands

FLOAT = {"lse_ptr", "delta_ptr", "grad_lse_ptr", "scale", "scale2", "mean_q_ptr", "mean_k_ptr"}
WHOLE = {"list_ptr", "count_ptr", "start_ptr", "ids_ptr"}


def build_pass(name, kernel, own, walked, listed, dim, **more):
    constants = launch.constants_of(own, walked, listed, dim, 2, name)[1]
    build(f"{name} {own} {dim}", kernel, {**constants, **more})


def build(name, kernel, constants):
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")
               if name in constants}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature, exact = {}, {}
    for at, arg in enumerate(kernel.arg_names):
        type = "fp32" if arg in FLOAT else "i32" if arg in WHOLE or not arg.endswith("_ptr") else (
            "bf16")
        signature[arg] = "constexpr" if arg in constants else (
            "*" + type if arg.endswith("_ptr") else type)
        stride = arg[0] == "s" and len(arg) == 3 and arg not in kernel.do_not_specialize
        # As a launch finds it: from head to head there are D values.
        odd = arg[-1] == "h" and constants.get("D", 16) % 16 != 0
        if arg.endswith("_ptr") or (stride and not odd):
            exact[(at,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=exact)
    try:
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as error:
        print("failed", name, repr(error)[:300])
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = get_ptxas(90)
        tool = os.path.join(os.path.dirname(getattr(tool, "path", tool)), "cuobjdump")
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True,
                               text=True).stdout
    registers, stack = (int(re.search(key + r":(\\d+)", usage)[1]) for key in ("REG", "STACK"))
    # Wide tiles of narrow heads spill a little, and were measured faster than smaller ones.
    few = 160 if constants.get("D", 64) <= 32 and "bands" not in name else 0
    word = "built" if built.metadata.shared < 227 * 1024 and stack <= few else "spills"
    print(word, name, registers, stack, built.metadata.shared)


PROBLEMS = [
    ((8, 8), (8, 8), 1, 32, {}),
    ((4, 4), (4, 4), 4, 32, {}),
    ((2, 2), (2, 2), 16, 32, {"PADS": True}),
    ((13, 21), (13, 21), 1, 32, {"WIDE": True}),
    ((7, 7), (7, 7), 4, 24, {}),
    ((6, 6), (6, 6), 3, 64, {"EXTRA": 16}),
    ((1, 128), (1, 64), 8, 128, {"CAUSAL": True, "GROUPED": True, "COUNTED": True}),
]
for own, walked, listed, dim, options in PROBLEMS:
    both = {"COUNTED": False, "PADS": False, "CAUSAL": False, "EXTRA": 0, "GRAD_LSE": False,
            "GROUPED": False, "WIDE": False, **options}
    build_pass("forward", forward._forward, own, walked, listed, dim, **both)
    build_pass("query", backward._query, own, walked, listed, dim, **both)
    build_pass("key", backward._key, walked, own, listed, dim, **both)

for grid, size, listed, dim, options in (
    ((14, 14), (2, 2), 16, 32, {}),
    ((16, 16), (2, 2), 9, 64, {"EXTRA": 16}),
):
    both = {"EXTRA": 0, "GRAD_LSE": False, "WIDE": False, **options}
    for kind, kernel in (("forward", bands._forward), ("backward", bands._backward)):
        tile = choose_bands(grid, size, dim, kind)
        build(f"bands {kind} {dim}", kernel, {**bands.constants_of(tile, listed, dim, 2), **both})
for heads, tokens, dim in ((3, 64, 32), (6, 16, 32), (12, 4, 32), (6, 49, 24)):
    blocks = dict(zip(("BR", "BT", "BC"), lists.share(heads * dim, tokens, 49)))
    build(f"means {heads}", lists._means, {"D": dim, **blocks, "WIDE": False, "num_warps": 1})
for block, channels, dim in ((16, 64, 24), (64, 64, 32), (128, 16, 80), (256, 16, 32)):
    build(f"best {block}", lists._best, {
        "PER_HEAD": dim != 32, "D": dim, "BR": lists.ROWS, "BN": block, "BC": channels,
        "PRECISION": "tf32x3"})
for channels, tokens, dim, heads in ((384, 4, 32, 1), (192, 16, 32, 1), (24, 49, 24, 6)):
    build(f"choose {channels}", lists._choose, {
        "PER_HEAD": heads > 1, "D": dim, "WIDE": False, "PRECISION": "tf32x3",
        **lists.blocks(channels, tokens, 49, 2)})
build("invert", lists._invert, {"COUNTED": True, "BLOCK": 1024, "num_warps": 1})
"""


@pytest.mark.slow
def test_routing_kernels_compile():
    # A process of its own: under the interpreter's switch a kernel cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    lines = out.stdout.splitlines()
    assert len(lines) == 37, out.stderr[-3000:]
    assert all(line.startswith("built") for line in lines), lines
