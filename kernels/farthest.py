"""Farthest-first order: each next vector is the one least like all that were picked before.

The similarities of all pairs are never held: a step compares one vector with all others. Steps
follow each other, so what a step costs is its launches: one on a GPU with Triton, five otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.kernels.dispatch import ANY, as_op, use_triton

CHUNK = 256
"""Rows of similarities held at once while the first vector is sought."""


def farthest_first(x: Tensor, count: int) -> Tensor:
    """Indices of `count` vectors, in the order in which they are picked.

    The first is the one whose nearest other vector is farthest by cosine; each next one has the
    least cosine to its nearest picked one. Of equal ones the first is taken.

    Args:
        x: `[N, C]`, N >= 2.
        count: 1 ... N.

    Returns:
        `[count]` int64.
    """
    run = farthest_first_op if as_op(x, ANY) else _farthest_first
    order: Tensor = run(x.detach(), count)
    return order


def _farthest_first(x: Tensor, count: int) -> Tensor:
    first = loneliest(F.normalize(x.float(), dim=-1))
    if not use_triton(x, ANY):
        return farthest_first_reference(x, first, count)
    from vistoken.kernels.triton_farthest import farthest_first_triton

    return farthest_first_triton(x, first, count)


farthest_first_op = torch.library.custom_op(
    "vistoken::farthest_first",
    _farthest_first,
    mutates_args=(),
    schema="(Tensor x, SymInt count) -> Tensor",
)


@farthest_first_op.register_fake
def _(x: Tensor, count: int) -> Tensor:
    return x.new_empty(count, dtype=torch.int64)


def farthest_first_reference(x: Tensor, first: Tensor, count: int) -> Tensor:
    """`farthest_first` in torch operators, from a first index `[1]`."""
    x = F.normalize(x.float(), dim=-1)
    picks = first.new_empty(count + 1)
    picks[:1] = first
    nearest = x.new_full((1, len(x)), float("-inf"))
    like = torch.empty_like(nearest)
    for pick, following in zip(picks[:-1].split(1), picks[1:].split(1), strict=True):
        torch.mm(x.index_select(0, pick), x.T, out=like)
        torch.maximum(nearest, like, out=nearest)
        nearest.index_fill_(1, pick, float("inf"))
        torch.argmin(nearest, 1, out=following)
    return picks[:-1]


def loneliest(x: Tensor) -> Tensor:
    """Index `[1]` of the unit vector `[N, C]` whose nearest other one is farthest."""
    closest = []
    for start in range(0, len(x), CHUNK):
        near = x[start : start + CHUNK] @ x.T
        near.diagonal(start).fill_(float("-inf"))
        closest.append(near.amax(1))
    return torch.cat(closest).argmin(0, keepdim=True)
