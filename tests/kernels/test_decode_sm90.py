"""The decoding kernels compile for an H100 without a GPU: wide loads, early launch, no spills."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vistoken.kernels import triton_decode_attention, triton_decode_linear

KERNELS = {
    "vector": triton_decode_linear._vector,
    "matrix": triton_decode_linear._matrix,
    "attend": triton_decode_attention._decode_attention,
}
TYPES = {"length_ptr": "*i64", "part_ptr": "*fp32", "peak_ptr": "*fp32", "sum_ptr": "*fp32",
         "count_ptr": "*i32", "eps": "fp32", "scale2": "fp32"}
EVEN = ("width", "n0", "n1", "total", "capacity")
TOOL = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
for name, constants, options in json.loads(sys.argv[1]):
    kernel = KERNELS[name]
    names = kernel.arg_names
    signature = {
        a: "constexpr" if a in constants else TYPES.get(a, "*bf16" if a.endswith("_ptr") else "i32")
        for a in names
    }
    even = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names)
            if a.endswith("_ptr") or a in EVEN}
    values = {(names.index(a),): v for a, v in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=even)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                           options={**options, "launch_pdl": True})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "--dump-resource-usage", file.name],
                               capture_output=True, text=True).stdout
    ptx = built.asm["ptx"]
    print(json.dumps({
        "name": name,
        "stack": int((re.findall(r"STACK:(\\d+)", usage) or [-1])[0]),
        "shared": built.metadata.shared,
        "wide": len(re.findall(r"ld\\.global\\S*v4\\.b32|cp\\.async\\.cg\\S* .*0x10", ptx)),
        "early": "griddepcontrol.wait" in ptx,
    }))
"""


def linear(name, tile, gated, parts, norm, bias):
    flags = {
        "NORM": norm, "BIAS": bias, "RESIDUAL": not norm, "GATED": gated, "PARTS": parts,
        "BLOCK_N": tile.rows, "BLOCK_K": tile.columns, "PDL": True,
    }  # fmt: skip
    options = {"num_warps": tile.warps}
    if name == "matrix":
        return name, {**flags, "ROWS": 16}, {**options, "num_stages": tile.stages}
    return name, flags, options


def cases():
    from vistoken.kernels import decode_linear as kernels

    for name, batch in (("vector", 1), ("matrix", 8)):
        for tile in kernels.tiles(batch, "qkv"):
            yield linear(name, tile, False, 3, True, False)
        for product in ("back", "head"):
            for tile in kernels.tiles(batch, product):
                yield linear(name, tile, False, 1, product == "head", False)
        for tile in kernels.tiles(batch, "gate"):
            yield linear(name, tile, True, 1, True, False)
        yield linear(name, kernels.tiles(batch, "qkv")[0], False, 3, True, True)
    for share, groups, dim in ((1, 32, 128), (7, 4, 64)):
        flags = {
            "GROUPS": groups, "SHARE": share, "D": dim, "BLOCK_D": dim, "SPLITS": 16, "BLOCK": 64,
            "ROWS": 16, "PDL": True,
        }  # fmt: skip
        yield "attend", flags, {"num_warps": 4, "num_stages": 2}


@pytest.mark.slow
def test_decoding_kernels_compile():
    # A process of its own: under the interpreter's switch a kernel cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    wanted = list(cases())
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(wanted)],
        capture_output=True,
        text=True,
        env=environment,
    )
    built = [json.loads(line) for line in out.stdout.splitlines()]
    assert [row["name"] for row in built] == [name for name, _, _ in wanted], out.stderr[-3000:]
    for row in built:
        assert row["early"] and row["stack"] <= 64 and row["shared"] < 227 * 1024, row
        assert row["wide"] >= 4, row
