"""Tiles of routed attention for GPUs with less shared memory than the one they were measured on."""

import json
import math
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

from vistoken.kernels import routing_ops as ops
from vistoken.kernels import routing_reference as reference
from vistoken.kernels import routing_tiles as module
from vistoken.kernels import triton_routing as forward
from vistoken.kernels import triton_routing_gradients as gradients
from vistoken.kernels import triton_routing_launch as launch
from vistoken.kernels.routing_bands import bands_have_room
from vistoken.kernels.routing_regions import Routing
from vistoken.kernels.routing_tiles import Tile, choose, parts, shared, shared_limit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {"H100": 227 * 1024, "A100": 163 * 1024, "L4": 99 * 1024}
KINDS = ("forward", "query", "key")
# Grid, heads' width, regions along each axis and length of the lists, as in benchmarks/routing.py.
PROBLEMS = [
    (56, 32, 7, 1), (28, 32, 7, 4), (14, 32, 7, 16), (128, 32, 8, 1), (64, 32, 8, 4),
    (32, 32, 8, 16), ((200, 336), 32, 16, 1), ((100, 168), 32, 16, 4), ((50, 84), 32, 16, 16),
    (37, 64, 7, 25), (64, 64, 8, 16), (14, 64, 7, 25), (16, 64, 8, 8), (14, 64, 7, 4),
]  # fmt: skip
WIDE = [((8, 8), 128, 4), ((8, 8), 256, 2), ((8, 8), 256, 4)]


def region(grid, count):
    sides = (grid, grid) if isinstance(grid, int) else grid
    return tuple(-(-side // count) for side in sides)


def test_choices_are_those_that_were_measured():
    for grid, dim, count, listed in PROBLEMS:
        size = region(grid, count)
        for kind in KINDS:
            free = choose(size, size, listed, dim, 2, kind)
            assert {choose(size, size, listed, dim, 2, kind, n) for n in LIMITS.values()} == {free}
    for size, dim, bytes_ in WIDE:
        for kind in KINDS:
            free = choose(size, size, 4, dim, bytes_, kind)
            assert choose(size, size, 4, dim, bytes_, kind, LIMITS["H100"]) == free
    assert choose((8, 8), (8, 8), 4, 32, 2, "forward") == Tile((8, 8), (2, 8), 0, 64, 16, 1, 3)
    assert choose((2, 2), (2, 2), 16, 32, 2, "key") == Tile((2, 2), (2, 2), 8, 16, 32, 1, 3)
    assert choose((8, 8), (8, 8), 4, 256, 4, "query") == Tile((4, 8), (2, 8), 0, 32, 16, 4, 2)


@pytest.mark.parametrize("seed", range(40))
def test_tiles_of_less_memory_fit_and_cover_their_regions(seed):
    rng = random.Random(seed)
    own, walked = ((rng.randint(1, 30), rng.randint(1, 90)) for _ in range(2))
    listed, kind = rng.randint(1, 40), rng.choice(KINDS)
    dim, bytes_ = rng.choice([24, 64, 80, 128, 256]), rng.choice([2, 4])
    limit = rng.choice(list(LIMITS.values())[1:])
    tile = choose(own, walked, listed, dim, bytes_, kind, limit)
    assert shared(tile, tile.columns, dim, bytes_, kind) <= limit
    assert math.prod(tile.own) <= tile.rows <= 64 and tile.columns in (16, 32, 64)
    assert tile.warps >= 1 and tile.stages >= 1
    walk = tile.per * math.prod(walked) if tile.per else math.prod(tile.walk)
    assert 0 < walk <= tile.columns and (not tile.per or tile.walk == walked)
    for size, side in ((own, tile.own), (walked, tile.walk)):
        covered = [n * s for n, s in zip(parts(size, side), side, strict=True)]
        assert all(n <= c < n + s for n, c, s in zip(size, covered, side, strict=True))


def test_kernels_run_with_less_memory(monkeypatch):
    torch.manual_seed(0)
    q, k, v, up = (torch.randn(1, 7, 9, 1, 32, device=DEVICE) for _ in range(4))
    extra = list(torch.randn(2, 1, 40, 1, 32, device=DEVICE))
    index = torch.tensor([[[[0, 2], [3, 1], [2, 0], [1, 3]]]], dtype=torch.int32, device=DEVICE)
    tail = index, None, *extra, Routing((4, 5), (4, 5)), 0.3
    wide = [x.double() for x in (q, k, v)]
    double = index, None, *(x.double() for x in extra), *tail[4:]
    exact, lse = reference.forward(*wide, *double)
    want = reference.backward(up.double(), None, *wide, exact, lse, *double)
    asked = [(kind, choose((4, 5), (4, 5), 2, 32, 4, kind)) for kind in KINDS[:2]]
    before = [launch.extra_rows(40, q, tile, kind) for kind, tile in asked]
    monkeypatch.setattr(launch, "shared_limit", lambda device: 14 * 1024)
    tiles = [launch.plan((4, 5), (4, 5), 2, q, kind)[0] for kind in KINDS]
    assert all(tile.rows == tile.columns == 16 for tile in tiles[1:])
    after = [launch.extra_rows(40, q, tiles[nth], kind) for nth, kind in enumerate(KINDS[:2])]
    assert before == [64, 64] and after == [16, 16]
    out, norm = forward.forward(q, k, v, *tail)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=2e-5)
    got = gradients.backward(up, None, q, k, v, out, norm, *tail)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-3, atol=1e-4)


def test_small_maps_are_walked_in_bands_where_these_have_room(monkeypatch):
    for dim, kind, limit, room in [
        (32, "backward", "L4", True), (64, "forward", "L4", True), (64, "backward", "A100", True),
        (64, "backward", "L4", False), (64, "backward", "H100", True),
    ]:  # fmt: skip
        assert bands_have_room((14, 14), (2, 2), dim, kind, LIMITS[limit]) == room
        monkeypatch.setattr(ops, "shared_limit", lambda device, n=LIMITS[limit]: n)
        q = torch.empty(1, 14, 14, 1, dim, dtype=torch.bfloat16)
        assert ops.walks_bands(q, q, 16, Routing((2, 2), (2, 2)), True, kind) == room
    assert bands_have_room((14, 14), (2, 2), 64, "backward", None)


def test_the_limit_is_looked_up_safely(monkeypatch):
    assert shared_limit(torch.device("cpu")) is None
    told = SimpleNamespace(shared_memory_per_block_optin=101376), SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: told[index])
    module._limit.cache_clear()
    try:
        assert shared_limit(torch.device("cuda", 0)) == 99 * 1024
        assert shared_limit(torch.device("cuda", 1)) is None
    finally:
        module._limit.cache_clear()


PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from vistoken.kernels import triton_routing as forward
from vistoken.kernels import triton_routing_backward as backward
from vistoken.kernels import triton_routing_bands as bands
from vistoken.kernels import triton_routing_launch as launch
from vistoken.kernels.routing_bands import choose_bands
from vistoken.kernels.routing_tiles import Tile

KERNELS = {"forward": forward._forward, "query": backward._query, "key": backward._key,
           "bands backward": bands._backward}
FLAGS = {"COUNTED": False, "PADS": False, "CAUSAL": False, "GRAD_LSE": False, "GROUPED": False,
         "WIDE": False}


class Known(Exception):
    pass


def stop(self, src, metadata, *rest):
    raise Known(metadata["shared"])


CUDABackend.make_ptx = stop  # Shared memory is known before.


def shared(kernel, constants, bytes_):
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature, exact = {}, {}
    for at, arg in enumerate(kernel.arg_names):
        single = arg.startswith(("lse", "grad_lse", "delta", "scale")) or bytes_ == 4
        type = "fp32" if single else "bf16"
        if arg.startswith(("list", "count", "start")):
            type = "i32"
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg.endswith("_ptr"):
            signature[arg] = "*" + type
        else:
            signature[arg] = "fp32" if arg.startswith("scale") else "i32"
        stride = arg[0] == "s" and len(arg) == 3 and arg not in kernel.do_not_specialize
        if arg.endswith("_ptr") or stride:
            exact[(at,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=exact)
    try:
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        return built.metadata.shared  # out of the cache
    except Known as known:
        return known.args[0]


for kind, dim, bytes_, extra, tile, grid, size in json.loads(sys.argv[1]):
    if kind == "bands backward":
        constants = bands.constants_of(choose_bands(tuple(grid), tuple(size), dim, "backward"), 16,
                                       dim, bytes_)
    else:
        constants = launch.constants_of((1, 1), (1, 1), 1, dim, bytes_, kind, Tile(*tile))[1]
    print(shared(KERNELS[kind], {**constants, **FLAGS, "EXTRA": extra}, bytes_))
"""


def cases():
    """Kernels to compile, each with the limit that it is chosen for."""
    found = {}
    for grid, dim, count, listed in PROBLEMS:
        size = region(grid, count)
        for kind in KINDS:
            tile = choose(size, size, listed, dim, 2, kind, LIMITS["L4"])
            need = shared(tile, tile.columns, dim, 2, kind)
            assert need <= LIMITS["L4"]
            # Of each width and pass the one that needs most.
            if need > found.get((kind, dim), (0,))[0]:
                found[kind, dim] = need, (kind, dim, 2, 0, tile, None, None)
    for name in ("A100", "L4"):
        for size, dim, bytes_ in WIDE[name == "A100" :]:
            for kind in KINDS:
                tile = choose(size, size, 4, dim, bytes_, kind, LIMITS[name])
                extra = 0 if kind == "key" else widest_extra(dim, bytes_, tile, kind, LIMITS[name])
                kernel = kind, dim, bytes_, extra, tile, None, None
                found[kernel] = LIMITS[name], kernel
    for dim, limit in ((32, "L4"), (64, "A100")):
        given = "bands backward", dim, 2, 0, None, (14, 14), (2, 2)
        found[given] = LIMITS[limit], given
    return list(found.values())


def widest_extra(dim, bytes_, tile, kind, limit):
    """Rows of a block of many extra tokens on a GPU with so much shared memory."""
    q = torch.empty(1, 1, 1, 1, dim, dtype=torch.float32 if bytes_ == 4 else torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "shared_limit", lambda device: limit)
        return launch.extra_rows(99, q, tile, kind)


@pytest.mark.slow
def test_compiled_tiles_fit():
    limits, kernels = zip(*cases(), strict=True)
    text = json.dumps([
        (*kernel[:4], kernel[4] and list(vars(kernel[4]).values()), *kernel[5:])
        for kernel in kernels
    ])  # fmt: skip
    # A process of its own: under the interpreter's switch a kernel cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, text], capture_output=True, text=True, env=environment
    )
    sizes = [int(line) for line in out.stdout.splitlines()]
    assert len(sizes) == len(kernels), out.stderr[-3000:]
    wrong = [x for x in zip(sizes, limits, kernels, strict=True) if not 0 < x[0] <= x[1]]
    assert not wrong, wrong
