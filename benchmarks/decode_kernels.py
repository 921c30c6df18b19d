"""Bandwidth of the decoding kernels by tile, against torch: `python benchmarks/decode_kernels.py`.

Every number is one replay of a CUDA graph over many distinct weights, so nothing stays in cache.
"""

import argparse
import time
from dataclasses import replace
from functools import partial

import torch

from vistoken.kernels.decode_attention import decode_attention
from vistoken.kernels.decode_linear import Tile, decode_linear
from vistoken.vlm.decode_plan import least_time

SHAPES = {
    # name: columns, rows of each weight, norm, residual, gated
    "qkv": (4096, (4096, 4096, 4096), True, False, False),
    "o": (4096, (4096,), False, True, False),
    "gate_up": (4096, (11008, 11008), True, False, True),
    "down": (11008, (4096,), False, True, False),
    "head": (4096, (32064,), True, False, False),
}
VECTORS = [
    Tile(8, 512, 4), Tile(4, 512, 4), Tile(2, 2048, 4), Tile(8, 1024, 8), Tile(4, 1024, 8),
    Tile(2, 1024, 4), Tile(16, 256, 4), Tile(1, 2048, 4), Tile(4, 512, 2), Tile(8, 1024, 4),
    Tile(2, 4096, 8), Tile(4, 2048, 8), Tile(8, 256, 2), Tile(16, 512, 8), Tile(4, 256, 1),
]  # fmt: skip
MATRICES = [
    Tile(32, 128, 2, 6), Tile(16, 256, 2, 4), Tile(16, 128, 1, 6), Tile(32, 256, 4, 4),
    Tile(32, 256, 2, 3), Tile(64, 128, 4, 4), Tile(64, 128, 4, 6), Tile(64, 64, 4, 6),
    Tile(32, 128, 4, 6), Tile(128, 64, 4, 4), Tile(16, 512, 4, 3), Tile(32, 512, 4, 3),
]  # fmt: skip


def products(name, batch, tiles, early):
    """One line per tile of one product."""
    width, counts, norm, residual, gated = SHAPES[name]
    size = 2 * width * sum(counts)
    copies = max(4, min(24, int(2e9 // size)))
    new = {"device": "cuda", "dtype": torch.bfloat16}
    weights = [[torch.randn(n, width, **new) * 0.02 for n in counts] for _ in range(copies)]
    x = torch.randn(batch, width, **new)
    rms = (torch.ones(width, **new), 1e-5) if norm else None
    rest = torch.randn(batch, sum(counts), **new) if residual else None
    args = (None, rms, rest, gated)

    wanted = decode_linear(x, weights[0], *args).float()
    for tile in (None, *(replace(tile, early=start) for tile in tiles for start in early)):
        label = "torch" if tile is None else str(tile).removeprefix("Tile")
        try:
            got = decode_linear(x, weights[0], *args, tile).float()
            error = float((got - wanted).norm() / wanted.norm())
            calls = [partial(decode_linear, x, group, *args, tile) for group in weights]
            us = 1000 * all_of(calls)
            speed = f"{us:7.2f} us {size / us / 1e6:5.2f} TB/s error {error:.0e}"
        except Exception as problem:
            speed = f"{type(problem).__name__} {str(problem)[:80]}"
        print(f"{name:8} b{batch:<3} {label:64} {speed}", flush=True)


def all_of(calls):
    """Milliseconds per call of many calls in one graph."""
    return least_time(lambda: [call() for call in calls]) / len(calls)


def attention(batch, heads, groups, length):
    """One line: attention over so many cached tokens."""
    new = {"device": "cuda", "dtype": torch.bfloat16}
    capacity, dim, copies = length + 64, 128, 32
    size = 4 * batch * groups * length * dim
    caches = [torch.randn(2, batch, groups, capacity, dim, **new) for _ in range(copies)]
    qkv = torch.randn(batch, (heads + 2 * groups) * dim, **new)
    cos, sin = torch.randn(2, batch, dim, **new)
    lengths = torch.full((batch,), length, device="cuda")
    arrivals = torch.zeros(batch * groups, dtype=torch.int32, device="cuda")
    calls = [
        lambda c=c: decode_attention(qkv, cos, sin, c[0], c[1], lengths, arrivals, dim**-0.5)
        for c in caches
    ]
    ms = all_of(calls)
    label = f"{heads}/{groups} heads {length} keys"
    print(f"attend   b{batch:<3} {label:64} {1000 * ms:7.2f} us {size / ms / 1e9:5.2f} TB/s",
          flush=True)  # fmt: skip


def main():
    """Measure until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--batch", type=int, action="append")
    options = parser.parse_args()
    stop = time.monotonic() + options.seconds
    for batch, length in ((1, 690), (1, 3000), (8, 690), (8, 3000)):
        attention(batch, 32, 32, length)
    attention(8, 32, 8, 690)
    for batch in options.batch or (1, 8):
        for name in SHAPES:
            if time.monotonic() < stop:
                tiles = VECTORS if batch == 1 else MATRICES
                with torch.no_grad():
                    products(name, batch, tiles, (True, False))


if __name__ == "__main__":
    main()
