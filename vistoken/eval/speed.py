"""Speed: dense and reduced models timed in turn, in one run, on one input."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vistoken.api import wrap
from vistoken.errors import ConfigError
from vistoken.graphs import record
from vistoken.methods import Method

Mode = Literal["eager", "graph", "compiled"]
Call = Callable[[], object]
CALLS_PER_SAMPLE = 10
"""Calls between two CUDA events: one is too short to be timed well."""
BYTES_PER_MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """How fast one model ran.

    Attributes:
        ms: median time of one batch in milliseconds.
        per_second: images per second at that time.
        speedup: median over the rounds of dense time by this time; 1 for the dense model.
        peak_mib: peak CUDA memory of one eager forward pass, weights included; None on a CPU.
    """

    ms: float
    per_second: float
    speedup: float
    peak_mib: float | None


def measure(
    model: nn.Module,
    methods: Sequence[Method | None],
    images: Tensor,
    *,
    mode: Mode = "eager",
    repeats: int = 10,
    warmup: int = 2,
    autocast: torch.dtype | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time a model under several methods, the dense model first.

    Every round times each model once, so that a slower clock or a busy machine hits all alike.
    The copies share the model's weights; the model itself stays as it is.

    Args:
        model: a model without a method.
        methods: settings to time; the first must be None, the dense model.
        images: one batch `[B, 3, H, W]`, on the model's device and in its dtype.
        mode: `eager`; `graph`, one captured CUDA graph each; `compiled`, `torch.compile` each.
        repeats: rounds.
        warmup: calls of each model before the first round.
        autocast: number format of an autocast context, or None.
        on_pass: called after every model's warm-up and after every timed pass.

    Returns:
        One timing for each entry of `methods`.

    Raises:
        ConfigError: an unknown mode, a CUDA graph without CUDA, or a first entry that is not None.
    """
    on_cuda = images.device.type == "cuda"
    if mode not in get_args(Mode):
        raise ConfigError(f"mode={mode!r}: must be one of {get_args(Mode)}")
    if mode == "graph" and not on_cuda:
        raise ConfigError(f"mode='graph' captures CUDA graphs; the model is on {images.device}")
    if not methods or methods[0] is not None:
        raise ConfigError("the first entry of methods must be None, the dense model")
    calls: list[Call] = []
    peaks: list[float | None] = []
    place = torch.cuda.device(images.device) if on_cuda else nullcontext()
    with torch.inference_mode(), place:
        for method in methods:
            call = _eager(_variant(model, method), images, autocast, mode == "compiled")
            for _ in range(warmup):
                call()
            peaks.append(_peak(call, images.device) if on_cuda else None)
            calls.append(record(call)[0].replay if mode == "graph" else call)
            on_pass()
        clock = _cuda_ms if on_cuda else _wall_ms
        rounds: list[list[float]] = []
        for _ in range(repeats):
            rounds.append([])
            for call in calls:
                rounds[-1].append(clock(call))
                on_pass()
    return [_timing(index, rounds, len(images), peak) for index, peak in enumerate(peaks)]


def _timing(index: int, rounds: list[list[float]], batch: int, peak: float | None) -> Timing:
    """Medians over the rounds."""
    ms = statistics.median(times[index] for times in rounds)
    return Timing(
        ms=ms,
        per_second=1000 * batch / ms,
        speedup=statistics.median(times[0] / times[index] for times in rounds),
        peak_mib=peak,
    )


def _variant(model: nn.Module, method: Method | None) -> nn.Module:
    """A copy that shares the model's weights and carries a method."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    variant = copy.deepcopy(model, shared)
    return variant if method is None else wrap(variant, method)


def _eager(model: nn.Module, images: Tensor, autocast: torch.dtype | None, compiled: bool) -> Call:
    """One forward pass as a call."""
    run: Callable[[Tensor], object] = torch.compile(model) if compiled else model
    kind = images.device.type

    def call() -> object:
        context: AbstractContextManager[object] = (
            nullcontext() if autocast is None else torch.autocast(kind, dtype=autocast)
        )
        with context:
            return run(images)

    return call


def _peak(call: Call, device: torch.device) -> float:
    """Peak memory of one call in MiB."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / BYTES_PER_MIB


def _cuda_ms(call: Call) -> float:
    """Device time of one call in milliseconds, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS_PER_SAMPLE):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / CALLS_PER_SAMPLE


def _wall_ms(call: Call) -> float:
    """Wall time of one call in milliseconds."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000
