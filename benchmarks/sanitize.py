"""Every Triton kernel once at small, odd sizes: for a memory checker.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py  # or only: ... decoding routing
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

# Every tensor has its own allocation, so that reading past its end is seen.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from vistoken.kernels.attention import log_normalizer
from vistoken.kernels.biased_attention import biased_attention
from vistoken.kernels.bipartite import bipartite
from vistoken.kernels.chain import Slots, add_reduce_norm, reduce_slots
from vistoken.kernels.decode_attention import decode_attention
from vistoken.kernels.decode_linear import decode_linear, tiles
from vistoken.kernels.farthest import farthest_first
from vistoken.kernels.match import best_match_at
from vistoken.kernels.neighborhood import na1d, na2d, na3d
from vistoken.kernels.prefill import rotate_and_store, silu_times
from vistoken.kernels.ranking import rank_tokens
from vistoken.kernels.routing import block_list_attention, routed_attention
from vistoken.kernels.routing_regions import route

HALF, SINGLE = torch.bfloat16, torch.float32


def draw(*shape, grad=False, dtype=HALF):
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def draw_qkv(*shape, dtype=HALF):
    return [draw(*shape, grad=True, dtype=dtype) for _ in "qkv"]


def follow(out, lse):
    """The backward pass, of both results."""
    (out.float().sum() + lse.sum()).backward()


def attention():
    for tokens, dim in [(197, 64), (50, 48), (13, 64), (273, 64), (41, 80)]:
        bias, alive = torch.rand(3, tokens), torch.rand(3, tokens) < 0.7
        for grad in (False, True):
            q, k, v = (draw(3, 2, tokens, dim, grad=grad) for _ in "qkv")
            for rows in (0, 1):
                out, _ = biased_attention(q, k, v, bias, 0.1, rows)
                if grad:
                    out.float().sum().backward()
            weight, some = bias.clone().requires_grad_(grad), alive.float().requires_grad_(grad)
            out, _, lse = biased_attention(q, k, v, weight, 0.1, alive=some, return_lse=True)
            if grad:
                follow(out, lse)
        with torch.no_grad():
            biased_attention(q, k, v, None, 0.1, 1)
            biased_attention(q, k, v, None, 0.1, 2, size=1 + bias, alive=alive)
            log_normalizer(q, k, bias, 0.1)
            log_normalizer(q[:, :, 1:6], k, draw(3, 2, tokens, dtype=SINGLE), 0.1)


def reduction():
    for batch, tokens, width in [(3, 197, 384), (2, 41, 96), (2, 300, 64)]:
        keys, x = draw(batch, 2, tokens, 32), draw(batch, tokens, width)
        for prefix in (0, 1, 5):
            keep, src, dst = bipartite(keys, prefix, 7)
            size, gain = torch.ones(batch, tokens), torch.rand(batch, 7)
            norm = (draw(width), draw(width), 1e-6)
            add_reduce_norm(x, draw(batch, tokens, width), None, None, None, norm)
            add_reduce_norm(x, x, draw(width), Slots(keep, src, dst, size), size, norm)
            add_reduce_norm(x, None, None, Slots(keep, src, dst, None, gain), size, norm)
            add_reduce_norm(x, None, None, Slots(keep), size, norm)
            add_reduce_norm(x, x, None, Slots(keep, src, dst, size, rule="mlerp"), size, norm)
            reduce_slots(x, Slots(keep, src, dst, size, rule="sum"))
            order = rank_tokens(torch.rand(batch, tokens), prefix)
            best_match_at(x, order[:, 20:], order[:, :20])
            best_match_at(x, order[:, :3], order[:, 3:])


def selection():
    for tokens, width, dtype in [(9, 5, SINGLE), (41, 513, HALF), (130, 24, HALF)]:
        farthest_first(draw(tokens, width, dtype=dtype), min(tokens, 12))


def neighborhood():
    for call, grid, window in [(na1d, (37,), 7), (na2d, (11, 19), 5), (na3d, (6, 6, 7), 3)]:
        for dilation in (1, 2):
            q, k, v = draw_qkv(2, *grid, 3, 32)
            call(q, k, v, window, dilation=dilation).float().sum().backward()
        bias = draw(3, *[2 * window - 1] * len(grid), grad=True, dtype=SINGLE)
        more = {f"additional_{name}": draw(2, 5, 3, 32, grad=True) for name in ("keys", "values")}
        follow(*call(q, k, v, window, rpb=bias, return_lse=True, **more))
        call(q, k, v, window, stride=2, is_causal=True).float().sum().backward()


def regions():
    """The choice of regions: means, scores and lists."""
    for grid, size, heads, dim in [
        ((7, 9), (3, 4), 4, 24), ((9, 10), (1, 1), 1, 8), ((9, 11), (5, 6), 4, 32),
        ((5, 5), (5, 2), 6, 80), ((37, 37), (7, 6), 6, 32),
    ]:  # fmt: skip
        for shared, dtype in ((1, HALF), (heads // 2 or 1, SINGLE)):
            q, k = draw(2, *grid, heads, dim, dtype=dtype), draw(2, *grid, shared, dim, dtype=dtype)
            for per_head in (False, True):
                route(q, k, size, 3, per_head)


def routing():
    """Regions of ragged maps: a program for each, or for many queries where lists are distinct."""
    for grid, size, heads, dim, dtype in [
        ((5, 7), (2, 3), 2, 32, HALF), ((16, 15), (2, 2), 1, 64, HALF),
        ((7, 5), (1, 1), 2, 24, HALF), ((23, 19), (12, 10), 2, 32, HALF),
        ((13, 11), (4, 4), 2, 128, HALF), ((9, 11), (3, 4), 2, 40, SINGLE),
    ]:  # fmt: skip
        q, k, v = draw_qkv(2, *grid, heads, dim, dtype=dtype)
        for per_head, extra, distinct, pads in [
            (False, 0, True, "mask"), (True, 5, True, "mask"), (True, 70, False, "attend"),
        ]:  # fmt: skip
            index = route(q, k, size, 4, per_head)
            index[..., -1] = -1  # no region
            more = [draw(2, extra, heads, dim, grad=True, dtype=dtype) for _ in "kv"]
            follow(*routed_attention(q, k, v, index, size, None, pads, *more, return_lse=True,
                                     distinct=distinct))  # fmt: skip
        whole = route(q[:1], k[:1], size, 2)
        shared = draw_qkv(2, *grid, 1, dim, dtype=dtype)[1:]
        follow(*routed_attention(q, *shared, whole, size, return_lse=True))


def block_lists():
    for queries, keys, blocks, dim in [(75, 131, (16, 48), 64), (197, 197, (64, 64), 128),
                                       (11, 40, (6, 12), 32)]:  # fmt: skip
        q, k, v = draw(2, queries, 4, dim, grad=True), *draw_qkv(2, keys, 2, dim)[1:]
        lists = -(-queries // blocks[0])
        for heads, causal in ((1, False), (4, True)):
            index = torch.randint(-1, -(-keys // blocks[1]), (2, heads, lists, 3))
            counts = torch.randint(0, 4, index.shape[:-1]) if causal else None
            out, lse = block_list_attention(q, k, v, index, blocks, counts, causal, return_lse=True)
            follow(out, lse.masked_fill(lse.isinf(), 0.0))


def decoding():
    """One step: all tiles of the linear maps, and attention over caches that end anywhere."""
    early = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    for rows, width in [(1, 80), (1, 1504), (3, 80), (16, 304)]:
        x, norm = draw(rows, width), (draw(width), 1e-5)
        for product, counts in [("qkv", (128, 64, 64)), ("head", (50,)), ("gate", (24, 24)),
                                ("back", (41,))]:  # fmt: skip
            weights, biases = [draw(n, width) for n in counts], [draw(n) for n in counts]
            back = draw(rows, *counts) if product == "back" else None
            first, *others = tiles(rows, product)
            for tile in (first, *others, replace(first, early=early)):
                decode_linear(x, weights, biases, norm, back, product == "gate", tile)
            decode_linear(x, weights, None, None, back, product == "gate", first)
    for heads, groups, dim, capacity, lengths in [
        (4, 4, 32, 200, [150]), (4, 1, 16, 64, [0]),
        (6, 2, 48, 320, [319, 64]), (2, 2, 64, 130, [1, 63, 128]),
    ]:  # fmt: skip
        batch = len(lengths)
        qkv, (cos, sin) = draw(batch, (heads + 2 * groups) * dim), (draw(batch, dim) for _ in "cs")
        cache = [draw(batch, groups, capacity, dim) for _ in "kv"]
        arrivals = torch.zeros(batch * groups, dtype=torch.int32)
        for known in {False, early}:
            decode_attention(qkv, cos, sin, *cache, torch.tensor(lengths), arrivals, 0.1, known)


def prompts():
    for batch, length, heads, groups, dim in [
        (2, 37, 4, 2, 16),
        (1, 5, 3, 3, 40),
        (3, 64, 2, 1, 64),
    ]:
        q, k, v = (draw(batch, length, n, dim) for n in (heads, groups, groups))
        cos, sin = (draw(batch, length, dim) for _ in "cs")
        rotate_and_store(q, k, v, cos, sin, *(draw(batch, groups, length, dim) for _ in "kv"))
        silu_times(draw(batch, length, 3 * dim), draw(batch, length, 3 * dim))


PARTS = {part.__name__: part for part in (
    attention, reduction, selection, neighborhood, regions, routing, block_lists, decoding, prompts,
)}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all where none is named")
    args = parser.parse_args()
    torch.set_default_device("cuda")
    for name in args.parts or PARTS:
        PARTS[name]()
        torch.cuda.synchronize()
        print(name, "ran", flush=True)
