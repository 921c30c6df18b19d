"""Splitting a budget in proportion to weights, the slow way."""

import math


def slow_allocate(weights, caps, total):
    """Water level by bisection, then largest remainders, in Python."""
    total = min(total, sum(caps))
    low, high = 0.0, 1e9
    for _ in range(300):
        level = (low + high) / 2
        given = sum(min(c, level * w) for w, c in zip(weights, caps, strict=True))
        low, high = (level, high) if given < total else (low, level)
    exact = [min(c, high * w) for w, c in zip(weights, caps, strict=True)]
    whole = [math.floor(e + 1e-6) for e in exact]
    order = sorted(
        range(len(caps)), key=lambda i: -(exact[i] - whole[i]) + 9 * (whole[i] == caps[i])
    )
    for index in order[: total - sum(whole)]:
        whole[index] += 1
    return whole
