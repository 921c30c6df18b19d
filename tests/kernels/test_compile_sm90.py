"""Every Triton kernel compiles for an H100 without a GPU; the interpreter hides type errors."""

import itertools
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
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from vistoken.kernels import (
    triton_biased_attention, triton_biased_attention_backward, triton_bipartite, triton_chain,
    triton_prefill, triton_ranking, triton_signals,
)
KERNELS = {
    "attention": triton_biased_attention._attention,
    "dq": triton_biased_attention_backward._query_gradient,
    "dkv": triton_biased_attention_backward._key_gradient,
    "match": triton_bipartite._match,
    "match_tiled": triton_bipartite._match_tiled,
    "place": triton_bipartite._place_all,
    "match_and_place": triton_bipartite._match_and_place,
    "normalizer": triton_signals._normalizer,
    "columns": triton_signals._columns,
    "join": triton_signals._join,
    "partner": triton_signals._partner,
    "chain": triton_chain._add_reduce_norm,
    "rank": triton_ranking._rank,
    "rotate": triton_prefill._rotate_and_store,
    "gate": triton_prefill._silu_times,
}
DRY = ("chain", "match_tiled", "columns", "join")
TOOL = get_ptxas(90)
TOOL = os.path.join(os.path.dirname(getattr(TOOL, "path", TOOL)), "cuobjdump")

def stack(built):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [TOOL, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\\d+)", usage)[1])

for name, types, constants in json.loads(sys.argv[1]):
    kernel = KERNELS[name]
    signature = {}
    for arg in kernel.arg_names:
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg.endswith("_ptr"):
            signature[arg] = "*" + types.get(arg, "bf16")
        else:
            signature[arg] = types.get(arg, "i32")
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    # Rows start at multiples of 16 bytes, as those of models do.
    even = [i for i, arg in enumerate(kernel.arg_names) if arg in ("sb", "sh", "sn", "key_ptr")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in even if name == "match_tiled"}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attrs)
    try:
        few = name == "match" or constants.get("BLOCK_D") == 32
        options = {"num_stages": 1 if few else 3 if name == "match_tiled" else 2}
        if name in ("place", "match_and_place"):
            options["num_warps"] = 8
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        shared = built.metadata.shared
        fits = len(built.asm["cubin"]) > 1000 and shared < 227 * 1024
        fits = fits and (name not in DRY or stack(built) == 0)
        print("built" if fits else "too large", name, constants)
    except Exception as error:
        print("failed", name, constants, error)
"""

INDEX = {p: "i64" for p in ("keep_ptr", "src_ptr", "dst_ptr", "order_ptr", "index_ptr")}
FLOAT = {"partner_ptr": "i32", "alive_ptr": "i1"} | {
    p: "fp32"
    for p in (
        "size_ptr",
        "size_out_ptr",
        "weight_ptr",
        "gain_ptr",
        "row_ptr",
        "score_ptr",
        "factor_ptr",
        "best_ptr",
        "bias_ptr",
        "value_ptr",
        "lse_ptr",
        "grad_lse_ptr",
        "row_sum_ptr",
        "dbias_ptr",
        "dalive_ptr",
    )
}
CASES = []
for sized, rows, extra in itertools.product((True, False), (0, 2), (True, False)):
    CASES.append(("attention", {"scale2": "fp32"}, {
        "BIASED": sized, "CLASS_TOKENS": rows, "LSE": extra, "ALIVE": extra, "BLOCK_M": 64,
        "BLOCK_N": 32, "PEEL": extra, "D": 64, "BLOCK_D": 64, "WIDE": not sized}))  # fmt: skip
for dim, extra in ((64, True), (64, False), (80, True)):
    tile = {"OUTER": 64, "INNER": 32, "D": dim, "BLOCK_D": 64 if dim == 64 else 128}
    flags = {"BIASED": True, "ALIVE": extra, "WIDE": dim > 64, **tile}
    CASES.append(("dq", {"scale": "fp32"}, {"LSE_GRAD": extra, **flags}))
    CASES.append(("dkv", {"scale": "fp32"}, {"BIAS_GRAD": extra, "ALIVE_GRAD": extra, **flags}))
TILE = {"ROWS": 64, "CHUNK": 64}
HALF = {"HEADS": 6, "D": 64, "BLOCK_D": 64, "WIDE": False}
WIDE = {"HEADS": 12, "D": 48, "BLOCK_D": 64, "WIDE": True}
CASES.append(("match", {}, {**TILE, **HALF}))
CASES.append(("match", {"key_ptr": "fp32"}, {**TILE, **WIDE}))
TILED = {"ROWS": 64, "CHUNK": 128, "HEADS": 1, "D": 384, "BLOCK_D": 64}
SINGLE = {"ROWS": 64, "CHUNK": 64, "D": 384, "BLOCK_D": 32}
for linear in (True, False):
    CASES.append(("match_tiled", {"exponent": "fp32"}, {
        **TILED, "SCORED": True, "LINEAR": linear, "WIDE": False}))  # fmt: skip
for heads, kind in ((1, "fp32"), (3, "bf16")):
    CASES.append(("match_tiled", {"exponent": "fp32", "key_ptr": kind}, {
        **SINGLE, "HEADS": heads, "SCORED": True, "LINEAR": False, "WIDE": True}))  # fmt: skip
CASES.append(("match_and_place", {}, {"BLOCK": 128, **HALF}))
CASES.append(("match_and_place", {"key_ptr": "fp32"}, {"BLOCK": 128, **WIDE}))
CASES.append(("place", {}, {"BLOCK": 512, "CHUNK": 32}))
CASES.append(("partner", {}, {"ROWS": 16, "CHUNK": 64, "BLOCK_C": 64}))
for biased in (True, False):
    CASES.append(
        (
            "normalizer",
            {"scale2": "fp32"},
            {
                "BIASED": biased,
                "BLOCK_M": 64,
                "BLOCK_N": 64,
                "D": 64,
                "BLOCK_D": 64,
                "WIDE": biased,
            },
        )
    )
    CASES.append(("columns", {"scale2": "fp32", "out_ptr": "fp32"}, {
        "BIASED": biased, "BLOCK_M": 64, "BLOCK_N": 64, "D": 64, "BLOCK_D": 64,
        "WIDE": biased}))  # fmt: skip
CASES.append(("join", {"out_ptr": "fp32", "low": "fp32", "high": "fp32"}, {"BLOCK": 512}))
CASES.append(("rank", {}, {"BLOCK": 256, "PART": 128}))
CASES.append(("rotate", {"value_ptr": "bf16"}, {
    "H": 32, "G": 8, "HALF": 40, "BLOCK_D": 64, "ROWS": 32}))  # fmt: skip
CASES.append(("gate", {"count": "i64"}, {"BLOCK": 2048}))
for merges, weighted, gain, sized, branch, gamma in [
    (True, True, False, True, True, True),
    (True, False, True, False, True, False),
    (True, False, False, False, True, True),
    (False, False, False, True, True, True),
    (False, False, False, False, False, False),
    (True, True, True, True, False, False),
]:
    CASES.append(("chain", {"eps": "fp32"}, {
        "BRANCH": branch, "GAMMA": gamma, "INDEXED": merges or sized, "MERGES": merges,
        "WEIGHTED": weighted, "GAIN": gain, "NORMALIZE": True, "LENGTHENS": merges and sized,
        "SIZED": sized,
        "NORM": not gain, "SIZE_OUT": merges or sized, "BLOCK_C": 512, "BLOCK_S": 16}))  # fmt: skip


@pytest.mark.slow
def test_every_kernel_compiles():
    text = json.dumps([(name, {**INDEX, **FLOAT, **types}, flags) for name, types, flags in CASES])
    # A process of its own: under the interpreter's switch a kernel cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, text], capture_output=True, text=True, env=environment
    )
    lines = out.stdout.splitlines()
    assert len(lines) == len(CASES), out.stderr[-3000:]
    assert not [line for line in lines if not line.startswith("built")]
