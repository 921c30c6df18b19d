"""Metrics against loops over single images in float64."""

import math

import pytest
import torch

from vistoken.eval.fidelity import Scores, divergence
from vistoken.eval.sources import Share


def naive_kl(dense, reduced):
    """KL of two rows of logits, term by term."""
    p_total = sum(math.exp(v) for v in dense)
    q_total = sum(math.exp(v) for v in reduced)
    total = 0.0
    for a, b in zip(dense, reduced, strict=True):
        p = math.exp(a) / p_total
        total += p * (math.log(p) - math.log(math.exp(b) / q_total))
    return total


def naive_scores(logits, labels, dense):
    """All metrics with loops."""
    top1 = top5 = agree = 0
    kl = 0.0
    for row, label, full in zip(logits.tolist(), labels.tolist(), dense.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda k: -row[k])
        top1 += order[0] == label
        top5 += label in order[:5]
        agree += order[0] == max(range(len(full)), key=lambda k: full[k])
        kl += naive_kl(full, row)
    n = len(labels)
    return {"top1": top1 / n, "top5": top5 / n, "agreement": agree / n, "kl": kl / n, "n": n}


@pytest.mark.parametrize(("classes", "batches"), [(10, (5, 5, 3)), (3, (1,)), (7, (4, 1))])
def test_scores_equal_loops(classes, batches):
    torch.manual_seed(classes)
    scores = Scores(classes)
    parts = []
    for size in batches:
        dense = torch.randn(size, classes) * 2
        logits = dense + torch.randn(size, classes)
        labels = torch.randint(classes, (size,))
        scores.update(logits, labels, dense)
        parts.append((logits, labels, dense))
    expected = naive_scores(*(torch.cat(column) for column in zip(*parts, strict=True)))
    assert scores.compute() == pytest.approx(expected, rel=1e-6)


def test_identical_logits_are_zero_apart():
    logits = torch.randn(4, 10)
    scores = Scores(10)
    scores.update(logits, logits.argmax(1), logits)
    assert scores.compute() == {"top1": 1.0, "top5": 1.0, "agreement": 1.0, "kl": 0.0, "n": 4}


def test_divergence_is_not_symmetric_and_by_hand():
    dense = torch.tensor([[math.log(3.0), 0.0]])
    flat = torch.zeros(1, 2)
    assert float(divergence(dense, flat)) == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    )
    assert float(divergence(flat, dense)) == pytest.approx(
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    )


def test_sum_stays_precise_in_a_half_precision_module():
    torch.manual_seed(0)
    scores = Scores(10).to(torch.bfloat16)
    dense, logits = torch.randn(2, 300, 10)
    labels = torch.zeros(300, dtype=torch.long)
    for start in range(0, 300, 7):
        part = slice(start, start + 7)
        scores.update(logits[part], labels[part], dense[part])
    assert scores.compute()["kl"] == pytest.approx(
        float(divergence(dense, logits).mean()), rel=1e-9
    )


@pytest.mark.parametrize(("count", "world"), [(10, 1), (10, 3), (7, 4)])
def test_processes_share_items_without_repeats(count, world):
    shares = [list(Share(count, rank, world)) for rank in range(world)]
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert [len(Share(count, rank, world)) for rank in range(world)] == [len(s) for s in shares]
