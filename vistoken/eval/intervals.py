"""Confidence intervals of measured shares."""

from __future__ import annotations

import math


def wilson_interval(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share.

    Args:
        hits: Successes, in 0..total.
        total: Trials, at least 1.
        z: Standard normal quantile; the default gives 95 %.

    Returns:
        Lower and upper end, in 0..1.

    Raises:
        ValueError: If the counts cannot be a share.
    """
    if total < 1 or not 0 <= hits <= total:
        raise ValueError(
            f"{hits} hits of {total} are no share; need 0 <= hits <= total, total >= 1"
        )
    share = hits / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
