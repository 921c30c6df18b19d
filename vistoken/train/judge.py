"""Learned counts beside counts that nobody learned: are they worse when really reduced?"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vistoken.api import unwrap, wrap
from vistoken.errors import ScheduleError
from vistoken.schedule import Schedule
from vistoken.train.learn import RateLearning

BATCHES = 8
"""Batches that judge; differences that matter show on few."""
CLEARLY = 2.0
"""Standard errors that learned counts must be behind to be given up."""


def better(
    module: RateLearning, learned: Schedule, batches: Iterable[tuple[Tensor, Tensor]]
) -> Schedule:
    """The learned counts, or unlearned ones of the same cost where these are clearly better.

    Straight-through gradients say what a count more or less would do, so that where most tokens go
    a run can end behind its start.

    Args:
        module: what learned, after its run.
        learned: its counts, at the target.
        batches: of which the first judge, by the loss of the run without its cost.

    Returns:
        One of the two; warns where it is not the learned one.
    """
    assert module.cost is not None
    try:
        plain = module.cost.closest(module.target, module.operator.method)
        plain = module.rates.allowed(plain)
        plain = module.cost.meet(plain, module.target, module.rates.allowed)
    except ScheduleError:
        return learned
    kept = list(islice(batches, BATCHES))
    own, other = (losses(module, schedule, kept) for schedule in (learned, plain))
    gap = own - other
    if len(gap) < 2 or float(gap.mean()) <= CLEARLY * float(gap.std()) / len(gap) ** 0.5:
        return learned
    rank_zero_warn(
        f"learned counts lose {own.mean():.4g} on {len(gap)} images, {module.operator.method.name} "
        f"without learning {other.mean():.4g}: taking these. Learn longer, with a smaller lr, or "
        "towards a milder target"
    )
    return plain


@torch.no_grad()
def losses(
    module: RateLearning, schedule: Schedule, batches: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Of every image `labels * CE + distill * KL(dense, reduced)`, really reduced; on the host."""
    device = next(module.backbone.parameters()).device
    model, teacher = (module.aside(name).to(device) for name in ("evaluator", "teacher"))
    weights = module.hparams["labels"], module.hparams["distill"]
    found = []
    wrap(model, module.operator.build(schedule))
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            dense, own = (net(images).float().log_softmax(-1) for net in (teacher, model))
        part = weights[1] * F.kl_div(own, dense, log_target=True, reduction="none").sum(1)
        if weights[0]:
            part = part + weights[0] * F.cross_entropy(own, labels, reduction="none")
        found.append(part.double().cpu())
    unwrap(model)
    return torch.cat(found) if found else torch.zeros(0)
