"""Choosing tokens on the device, with counts that the host knows: no step waits for a result."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(scores: Tensor) -> Tensor:
    """Rank of every entry along the last axis, 0 for the largest; ties go to the lower index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def top(scores: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """True at the `count` largest scores `[V]`, among the allowed ones `[V]`."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return ranks(scores) < count


def top_by_segment(
    scores: Tensor, segment: Tensor, sizes: tuple[int, ...], budgets: Tensor
) -> Tensor:
    """True at the largest scores of every segment, as many as its budget says.

    Args:
        scores: `[V]`.
        segment: `[V]` segment of every token, -1 for tokens that are never taken.
        sizes: tokens of every segment.
        budgets: `[S]` int64, on the device.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[segment[order].argsort(stable=True)]
    skipped = segment.shape[0] - sum(sizes)
    starts, start = [], skipped
    for size in sizes:
        starts.append(start)
        start += size
    first = torch.tensor([0, *starts]).to(scores.device, non_blocking=True)
    limit = torch.cat([budgets.new_zeros(1), budgets])
    part = segment[order] + 1
    place = torch.arange(segment.shape[0], device=scores.device) - first[part]
    chosen = torch.zeros_like(segment, dtype=torch.bool)
    return chosen.scatter_(0, order, place < limit[part])


def allocate(weights: Tensor, caps: tuple[int, ...], total: int) -> Tensor:
    """Split `total` in proportion to weights, never above a cap, to the last unit.

    What a full part cannot take is offered to the others in proportion; fractions are rounded by
    largest remainder. The sum is `min(total, sum(caps))`.

    Args:
        weights: `[S]`, not negative; all zero means equal.
        caps: capacity of every part.
        total: units to hand out.

    Returns:
        `[S]` int64.
    """
    limit = torch.tensor(caps, dtype=torch.float64).to(weights.device, non_blocking=True)
    total = min(total, sum(caps))
    share = weights.double()
    share = share + (share.sum() + 1) * 1e-12 * limit
    # Parts fill up in the order of cap per weight: find the level t of min(cap, t * weight).
    order = (limit / share.clamp(min=1e-300)).argsort(stable=True)
    full, rest = limit[order], share[order]
    before = full.cumsum(0) - full
    after = rest.flip(0).cumsum(0).flip(0)
    level = (total - before) / after.clamp(min=1e-300)
    open_ = level * rest < full
    # Beyond the first part that stays open, the level no longer changes.
    none_open = ~open_.any()
    first = torch.where(none_open, 0, open_.int().argmax())
    exact = torch.minimum(limit, level.gather(0, first[None]) * share)
    exact = torch.where(none_open, limit, exact)
    whole = (exact + 1e-9).floor()
    missing = total - whole.sum()
    fraction = torch.where(whole < limit, exact - whole, -1.0)
    return (whole + (ranks(fraction) < missing)).long()


def index_of(mask: Tensor, count: int | None) -> Tensor:
    """Rising indices of the True entries; a known count keeps the device from waiting."""
    if count is None:
        return mask.nonzero().flatten()
    return (~mask).to(torch.uint8).argsort(stable=True)[:count]


def split(total: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """`total` split on the host in proportion to sizes, by largest remainder, ties to the first."""
    whole = sum(sizes)
    parts = [total * size // whole for size in sizes]
    by_fraction = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for index in by_fraction[: total - sum(parts)]:
        parts[index] += 1
    return tuple(parts)
