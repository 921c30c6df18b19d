"""Which implementation of an operator runs, and why; what every launch looks at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from importlib.util import find_spec
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

HALF = (torch.bfloat16, torch.float16)
"""Types of the kernels that multiply matrices; fp32 stays with torch, whose sums are exact."""

ANY = (*HALF, torch.float32)
"""Types of the kernels that only move, add or rank."""


def as_op(x: Tensor, dtypes: tuple[torch.dtype, ...] = HALF) -> bool:
    """Whether an operator whose kernel takes `dtypes` is to be called as `vistoken::` operator.

    That is what a compiler or an exported program can hold, but each call of it costs the host
    several times a launch, so without them the kernel is launched directly. Where there is no
    kernel the torch operators stay visible: compilers fuse them, and exported programs need nothing
    of ours.
    """
    return torch.compiler.is_compiling() and use_triton(x, dtypes)


def trains(*inputs: Tensor | None) -> bool:
    """Whether autograd follows one of the inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def autocasts(kind: str) -> bool:
    """Whether autocast is active on a type of device; some types, like meta, have none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def as_given(kind: str) -> AbstractContextManager[object]:
    """A context in which tensors are computed with in the types that they have."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


def why_not_triton(
    device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...] = HALF
) -> str | None:
    """The reason why tensors of this device and dtype stay with torch operators, or None."""
    reason = device_reason(device)
    if reason is None and dtype not in dtypes:
        return f"the model runs in {str(dtype).removeprefix('torch.')}"
    return reason


def use_triton(x: Tensor, dtypes: tuple[torch.dtype, ...] = HALF) -> bool:
    """Whether x goes to a Triton kernel that takes `dtypes`."""
    return device_reason(x.device) is None and x.dtype in dtypes


def device_reason(device: torch.device) -> str | None:
    """The reason why a device does not run Triton kernels, or None."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    return _constant(device.index or 0)


def on_device(
    launch: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """A launcher that runs on the device of its first tensor, whichever device is current."""

    @wraps(launch)
    def run(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return launch(x, *args, **kwargs)
        return launch(x, *args, **kwargs)

    return run


def packed(x: Tensor) -> Tensor:
    """x, copied only where the values of its last axis are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def far_apart(rows: int, *strides: int) -> bool:
    """Whether the offsets of so many rows need 64 bits."""
    return rows * max(strides) >= 2**31


def _constant(index: int) -> str | None:
    """`_gpu_reason` for compilers, which must not trace into it."""
    return _gpu_reason(index)


# What `torch.compiler.assume_constant_result` does, without importing the compiler for it.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _gpu_reason(index: int) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None
