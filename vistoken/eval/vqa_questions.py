"""Questions about Fashion scenes: what, how many, where, largest, smallest, is there, above."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistoken.eval.hashing import hash_integers
from vistoken.eval.vqa_plan import MOST, Layout
from vistoken.eval.vqa_words import (
    ASSISTANT,
    EOS,
    ID,
    NAMES,
    NUMBERS,
    PAD,
    PLURALS,
    REGIONS,
    split_words,
)

KINDS = ("what", "count", "where", "largest", "smallest", "exist", "total", "above")
TURN = 10
"""Ids of one turn: question, role, answer, end, filling."""
MARGIN = 1.3
"""Least ratio of areas for a question about the largest or smallest garment."""

_TEMPLATES = {
    "what": "what is at the {} ?",
    "count": "how many {} are there ?",
    "where": "where is the only {} ?",
    "largest": "what is the largest garment ?",
    "smallest": "what is the smallest garment ?",
    "exist": "is there a {} here ?",
    "total": "how many garments are there ?",
    "above": "is the {} above the {} ?",
}
_STREAM, _DRAWS = 40, 6


@dataclass(frozen=True)
class Questions:
    """Turns about a batch of scenes.

    Attributes:
        ids: question, role, answer, end and filling `[B, Q, TURN]` int64.
        labels: the same where it is answer or end, else -100 `[B, Q, TURN]`.
        kind: index into `KINDS` `[B, Q]`.
    """

    ids: Tensor
    labels: Tensor
    kind: Tensor


def ask(
    layout: Layout, index: Tensor, seed: int, count: int = 1, kinds: Tensor | None = None
) -> Questions:
    """Ask about scenes.

    Args:
        layout: what the scenes show.
        index: their numbers `[B]`; with the seed they decide what is asked.
        seed: any integer.
        count: Q, questions per scene.
        kinds: wanted kinds `[B, Q]`; None draws them. A kind that a scene has no answer to (an
            `only` that is there twice, two garments of nearly one size) becomes `what`.
    """
    n = hash_integers(seed, index, _STREAM, count * _DRAWS).view(-1, count, _DRAWS)
    kind = n[..., 0] % len(KINDS) if kinds is None else kinds
    device = index.device
    name, plural, region, number = (ID[w[0]] for w in (NAMES, PLURALS, REGIONS, NUMBERS))
    present = layout.name >= 0
    total = present.sum(1, keepdim=True)
    pick = (n[..., 1] % total).clamp(min=0)
    chosen = layout.name.gather(1, pick)
    # Most questions are about garments that are there; the others keep every answer possible.
    asked = torch.where(n[..., 2] % 100 < 65, chosen, n[..., 3] % len(NAMES))
    sought = torch.where(n[..., 2] % 100 < 30, chosen, n[..., 3] % len(NAMES))
    cell = torch.where(n[..., 2] % 100 < 80, layout.cell.gather(1, pick), n[..., 3] % len(REGIONS))
    counts = (layout.name[:, :, None] == torch.arange(len(NAMES), device=device)).sum(1)
    here = (layout.cell[:, None] == cell[..., None]) & present[:, None]
    found = torch.where(here, layout.name[:, None], -1).amax(-1)
    many = counts.gather(1, asked)
    only, other, where, beneath, pair = _unique(layout, counts, n)
    large, small, clear_large, clear_small = _extremes(layout)
    wide = asked.shape
    answers = {
        "what": torch.where(found >= 0, name + found, ID["nothing"]),
        "count": number + many,
        "where": region + where,
        "largest": (name + large).expand(wide),
        "smallest": (name + small).expand(wide),
        "exist": torch.where(counts.gather(1, sought) > 0, ID["yes"], ID["no"]),
        "total": (number + total).expand(wide),
        "above": torch.where(where // 3 < beneath // 3, ID["yes"], ID["no"]),
    }
    blanks: dict[str, tuple[Tensor, ...]] = {
        "what": (region + cell,),
        "count": (plural + asked,),
        "where": (name + only,),
        "exist": (name + sought,),
        "above": (name + only, name + other),
    }
    valid = {
        "where": (counts == 1).any(1, keepdim=True).expand(wide),
        "largest": clear_large.expand(wide),
        "smallest": clear_small.expand(wide),
        "above": pair & (where // 3 != beneath // 3),
    }
    for wanted, ok in valid.items():
        kind = torch.where((kind == KINDS.index(wanted)) & ~ok, 0, kind)
    turns = [_write(_TEMPLATES[k], blanks.get(k, ()), answers[k]) for k in KINDS]
    ids, labels = (torch.stack(parts) for parts in zip(*turns, strict=True))
    at = kind[None, ..., None].expand(1, *wide, TURN)
    return Questions(ids.gather(0, at)[0], labels.gather(0, at)[0], kind)


def _unique(layout: Layout, counts: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    """Two names that occur once, drawn per question, their cells, and whether there are two."""
    once = (counts == 1)[:, None]
    draw = torch.stack([(n[..., 4] >> shift) & 63 for shift in range(0, 42, 6)], -1)
    first_two = torch.where(once, draw * 8 + torch.arange(7, device=draw.device), -1)
    order = first_two.argsort(-1, descending=True)
    only, other = order[..., 0], order[..., 1]
    cells = []
    for name in (only, other):
        match = layout.name[:, None] == name[..., None]
        cells.append(torch.where(match, layout.cell[:, None], 0).amax(-1))
    return only, other, cells[0], cells[1], once.sum(-1) >= 2


def _extremes(layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Names of the largest and smallest garment `[B, 1]`, and whether that is clear."""
    falling, by = layout.area.sort(dim=1, descending=True)
    last = (layout.name >= 0).sum(1, keepdim=True) - 1
    names = layout.name.gather(1, by)
    large, small = names[:, :1], names.gather(1, last)
    inside = torch.arange(MOST, device=by.device) <= last
    # The runner-up is the first of another name: of two boots either may be the largest.
    rival_large = torch.where(inside & (names != large), falling, 0).amax(1, keepdim=True)
    huge = torch.where(inside & (names != small), falling, torch.inf).amin(1, keepdim=True)
    return (
        large, small, falling[:, :1] > MARGIN * rival_large,
        falling.gather(1, last) * MARGIN < huge,
    )  # fmt: skip


def _write(template: str, blanks: tuple[Tensor, ...], answer: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and labels `[B, Q, TURN]` of one kind."""
    left = list(blanks)
    columns = []
    for piece in [*split_words(template), ASSISTANT]:
        columns.append(left.pop(0) if piece == "{}" else torch.full_like(answer, ID[piece]))
    quiet = [torch.full_like(answer, -100)] * len(columns)
    end = torch.full_like(answer, ID[EOS])
    rest = TURN - len(columns) - 2
    ids = [*columns, answer, end, *[torch.full_like(answer, ID[PAD])] * rest]
    labels = [*quiet, answer, end, *[torch.full_like(answer, -100)] * rest]
    return torch.stack(ids, -1), torch.stack(labels, -1)
