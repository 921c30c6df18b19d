"""Median times of many calls that take turns, and what they were measured on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from vistoken._version import __version__
from vistoken.graphs import record

Mode = Literal["graph", "eager"]
Call = Callable[[], object]
Calls = dict[tuple[str, int], tuple[Call, ...]]
"""What is timed, by name and token count: calls in a row that cost the same."""


def median_ms(
    calls: Calls, device: torch.device, mode: Mode, repeats: int
) -> dict[tuple[str, int], float]:
    """Median milliseconds of every call.

    The calls take turns, so that a busy moment or a slower clock hits one sample of each.
    """
    clock = cuda_ms if device.type == "cuda" else wall_ms
    runs: dict[tuple[str, int], Call] = {
        name: partial(in_a_row, several) for name, several in calls.items()
    }
    if mode == "graph":
        runs = captured(runs)
    taken: dict[tuple[str, int], list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            sample = clock(run) / len(calls[name])
            if turn > 0:
                taken[name].append(sample)
    return {name: statistics.median(times) for name, times in taken.items()}


def in_a_row(calls: tuple[Call, ...]) -> None:
    """Call one after another; what they return is not kept."""
    for call in calls:
        call()


def wall_ms(run: Call) -> float:
    """Milliseconds on the host's clock."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def cuda_ms(run: Call) -> float:
    """Milliseconds on the device, between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def captured(runs: dict[tuple[str, int], Call]) -> dict[tuple[str, int], Call]:
    """The same as CUDA graphs; nothing that they make is kept, so they share one memory pool."""
    stream, pool = torch.cuda.Stream(), None
    found: dict[tuple[str, int], Call] = {}
    for name, run in runs.items():
        graph, _ = record(run, times=2, stream=stream, pool=pool)
        pool, found[name] = graph.pool(), graph.replay
    return found


def device_name(device: torch.device) -> str:
    """What the device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU {platform.machine()} {torch.get_num_threads()} threads"
    return device.type


def versions() -> dict[str, str]:
    """Versions of what decides on speed."""
    found = {"vistoken": __version__, "torch": torch.__version__}
    for package in ("triton", "timm", "transformers", "open_clip_torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
