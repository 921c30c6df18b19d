"""Times of generation: first token, tokens after it, memory; one row of a benchmark."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vistoken.api import info, unwrap, wrap
from vistoken.methods import parse
from vistoken.vlm.accelerate import accelerate
from vistoken.vlm.inside import LayerMethod
from vistoken.vlm.prompt import prepare

LEAST, MOST = 2, 50
"""Calls per measured number."""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        batch: rows.
        mode: `eager`, `static`, `graph` or `modules`.
        method: what the model is wrapped with, or None.
        text: length of prompts without an image, or 0.
        new_tokens: tokens generated.
        seconds: time for repeated calls.
    """

    batch: int
    mode: str
    method: str | None
    text: int
    new_tokens: int
    seconds: float


def measure_row(model: Any, inputs: dict[str, Any], images: int, case: Case) -> dict[str, Any]:
    """Numbers of one case, or `error`; the model is as before afterwards."""
    wrapped = False
    try:
        if case.method is not None:
            wrap(model, case.method)
            wrapped = True
        return _measure(model, inputs, images, case)
    except Exception as error:
        # One row that does not fit in memory or is not carried must not end a benchmark.
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    finally:
        if wrapped:
            unwrap(model)
        if case.mode == "static":
            torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure(model: Any, inputs: dict[str, Any], images: int, case: Case) -> dict[str, Any]:
    device = inputs["input_ids"].device
    entering = prompt = inputs["input_ids"].shape[1]
    inside = case.method is not None and isinstance(parse(case.method), LayerMethod)
    if not inside:
        with torch.no_grad():
            entering = prepare(model, inputs).inputs_embeds.shape[1]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run, say = _runner(model, inputs, case)
    begin = time.perf_counter()
    ids = run(case.new_tokens)
    run(1)
    _wait(device)
    ready = time.perf_counter() - begin
    whole = _time(lambda: run(case.new_tokens), device, case.seconds * 0.7)
    first = _time(lambda: run(1), device, case.seconds * 0.3)
    cuda = device.type == "cuda"
    # A method inside the language model says what is left in the last layers.
    ends = [after for _, after in info(model).images] if inside else []
    left = min(ends, default=images - (prompt - entering))
    return {
        "ms": whole, "first_ms": first, "decode_ms": (whole - first) / (case.new_tokens - 1),
        "per_second": 1000 * case.batch * case.new_tokens / whole, "ready_s": ready,
        "peak_mib": torch.cuda.max_memory_reserved(device) / 2**20 if cuda else 0.0,
        "prompt": entering, "image_tokens": images, "tokens": left,
        "new_tokens": case.new_tokens, "execution": say(),
        "first_ids": ids[0, prompt : prompt + 16].tolist(),
    }  # fmt: skip


def _runner(
    model: Any, inputs: dict[str, Any], case: Case
) -> tuple[Callable[[int], Tensor], Callable[[], str | None]]:
    """Greedy generation of so many tokens, and what ran, in words."""
    if case.mode in ("graph", "modules"):
        fuse = case.mode == "graph"
        fast = accelerate(model, max_new_tokens=case.new_tokens, fuse=fuse)
        return (
            lambda count: fast.generate(**inputs, max_new_tokens=count, do_sample=False),
            lambda: fast.execution,
        )
    static = {"cache_implementation": "static"} if case.mode == "static" else {}
    return (
        lambda count: model.generate(
            **inputs, **static, do_sample=False, max_new_tokens=count, min_new_tokens=count
        ),
        lambda: None,
    )


def _time(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Median wall time of a call in ms."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST or (time.perf_counter() < end and len(times) < MOST):
        begin = time.perf_counter()
        call()
        _wait(device)
        times.append(1000 * (time.perf_counter() - begin))
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
