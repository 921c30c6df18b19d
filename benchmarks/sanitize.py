"""Every Triton kernel once at small, odd sizes: for a memory checker.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py
"""

from __future__ import annotations

import torch

from vistoken.kernels.attention import log_normalizer
from vistoken.kernels.biased_attention import biased_attention
from vistoken.kernels.bipartite import bipartite
from vistoken.kernels.chain import Slots, add_reduce_norm
from vistoken.kernels.match import best_match_at
from vistoken.kernels.neighborhood import na1d, na2d, na3d
from vistoken.kernels.ranking import rank_tokens


def draw(*shape, grad=False):
    # Every tensor has its own allocation, so that reading past its end is seen.
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)


def attention():
    for tokens, dim in [(197, 64), (50, 48), (13, 64), (273, 64), (41, 80)]:
        for grad in (False, True):
            q, k, v = (draw(3, 2, tokens, dim, grad=grad) for _ in "qkv")
            bias = torch.rand(3, tokens, device="cuda")
            for rows in (0, 1):
                out, _ = biased_attention(q, k, v, bias, 0.1, rows)
                if grad:
                    out.float().sum().backward()
        with torch.no_grad():
            biased_attention(q, k, v, None, 0.1, 1)
            log_normalizer(q, k, bias, 0.1)


def reduction():
    for batch, tokens, width in [(3, 197, 384), (2, 41, 96), (2, 300, 64)]:
        keys, x = draw(batch, 2, tokens, 32), draw(batch, tokens, width)
        for prefix in (0, 1, 5):
            keep, src, dst = bipartite(keys, prefix, 7)
            size = torch.ones(batch, tokens, device="cuda")
            norm = (draw(width), draw(width), 1e-6)
            add_reduce_norm(x, draw(batch, tokens, width), None, None, None, norm)
            add_reduce_norm(x, x, draw(width), Slots(keep, src, dst, size), size, norm)
            order = rank_tokens(torch.rand(batch, tokens, device="cuda"), prefix)
            best_match_at(x, order[:, 20:], order[:, :20])


def neighborhood():
    for call, grid, window in [(na1d, (37,), 7), (na2d, (11, 19), 5), (na3d, (6, 6, 7), 3)]:
        for dilation in (1, 2):
            q, k, v = (draw(2, *grid, 3, 32, grad=True) for _ in "qkv")
            call(q, k, v, window, dilation=dilation).float().sum().backward()


if __name__ == "__main__":
    for part in (attention, reduction, neighborhood):
        part()
        torch.cuda.synchronize()
        print(part.__name__, "ran")
