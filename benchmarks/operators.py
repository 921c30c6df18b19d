"""What the benchmarks of single operators share: a clock, timers, errors and results files."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from vistoken.eval.record import make_record, write_json
from vistoken.graphs import record


class Clock:
    """Time left of `--seconds`."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def over(self) -> bool:
        return time.monotonic() > self.end


def say(*words: object) -> None:
    print(*words, flush=True)


def replayed(call, repeats: int = 3):
    """A CUDA graph of several calls, ready to be replayed."""

    def several() -> None:
        for _ in range(repeats):
            call()

    graph, _ = record(several, call, times=2)
    graph.replay()
    return graph.replay


def graph_ms(call, repeats: int = 10, rounds: int = 15) -> float:
    """Median milliseconds of one call, from replays of a CUDA graph of several."""
    return event_ms(replayed(call, repeats), rounds) / repeats


def event_ms(call, rounds: int = 15) -> float:
    """Median milliseconds between events around single calls."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def relative(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def gpu_name() -> str:
    """The model of the GPU as files are named after it, such as `h100`."""
    return torch.cuda.get_device_name().split()[1].lower()


def save(folder: str | None, name: str, rows: list[dict], add: bool = False) -> None:
    """Write `<folder>/<name>-<gpu>.json`; with `add`, rows of other cases stay in it."""
    if folder is None:
        return
    path, command = Path(folder) / f"{name}-{gpu_name()}.json", " ".join(["python", *sys.argv])
    old = json.loads(path.read_text()) if add and path.exists() else {"rows": []}
    cases = {row["case"] for row in rows}
    kept = [row for row in old["rows"] if row["case"] not in cases]
    if kept and not old["command"].endswith(command):
        command = f"{old['command']} && {command}"
    write_json(make_record(torch.device("cuda"), [*kept, *rows], command), path)
    say("wrote", path.name)
