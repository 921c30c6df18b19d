"""CUDA graphs: one recorded forward pass per input shape, replayed without launch overhead.

Token counts are fixed per schedule, so a wrapped model can be captured as it is. Capturing takes a
few forward passes, not minutes of compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vistoken.errors import BackendUnavailableError

T = TypeVar("T")

WARM_UP = 3
"""Forward passes before a capture: kernels are built and the allocator settles."""


class Graphed:
    """A model whose forward passes are replayed from CUDA graphs, for inference.

    Graphs of all shapes share one memory pool; results are copied out, so they stay valid. A graph
    holds what the model did when it was captured: after `unwrap`, exchanged layers or another
    autocast, make a new one. Weights changed in place are followed.

    Args:
        model: a module in eval mode on a CUDA device; its call takes one tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._pool: Any = None
        self._graphs: dict[tuple[Any, ...], tuple[Any, Tensor, Any]] = {}

    def __call__(self, x: Tensor) -> Any:
        """The model's output for x; the first call with a new shape or dtype captures."""
        if self.model.training:
            check(self.model, x)
        key = (
            tuple(x.shape),
            x.dtype,
            x.device,
            x.is_contiguous(memory_format=torch.channels_last),
        )
        if key not in self._graphs:
            self._graphs[key] = self._capture(x)
        graph, static, output = self._graphs[key]
        static.copy_(x.detach())
        graph.replay()
        return _copied(output)

    def _capture(self, x: Tensor) -> tuple[Any, Tensor, Any]:
        """Warm up, then record one forward pass on a copy of x."""
        check(self.model, x)
        static = x.detach().clone()
        side = torch.cuda.Stream(x.device)
        with torch.no_grad():
            forward = partial(self.model, static)
            graph, output = record(forward, times=WARM_UP, stream=side, pool=self._pool)
        self._pool = graph.pool()
        return graph, static, output


def compile(model: nn.Module, example: Tensor) -> Graphed:
    """Capture a model for the example's shape; other shapes are captured when they first come.

    Args:
        model: a wrapped (or dense) model in eval mode on a CUDA device.
        example: an input, for example images `[B, 3, H, W]`.

    Returns:
        A callable like the model, for inference.

    Raises:
        BackendUnavailableError: the model or the example is not on a CUDA device, or the model is
            in training mode.
    """
    graphed = Graphed(model)
    check(model, example)
    graphed(example)
    return graphed


def record(
    run: Callable[[], T], warm: Callable[[], object] | None = None, *, times: int = 1,
    stream: Any = None, pool: Any = None,
) -> tuple[Any, T]:  # fmt: skip
    """One call as a CUDA graph and what that call returned, after a warm-up on another stream.

    Args:
        run: works on fixed buffers and waits for nothing.
        warm: what warms up, `times` times; None is `run`.
        times: see there.
        stream: of the warm-up; None is a new one of the current device.
        pool: of memory that graphs share; None is the graph's own.
    """
    stream = torch.cuda.Stream() if stream is None else stream
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(times):
            (warm or run)()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = run()
    return graph, output


def check(model: nn.Module, x: Tensor) -> None:
    """Raise for what cannot be captured."""
    weight = next(model.parameters(), x)
    if not (x.is_cuda and weight.is_cuda):
        raise BackendUnavailableError(
            f"CUDA graphs need a CUDA device; the model is on {weight.device}, "
            f"the input on {x.device}"
        )
    if model.training:
        raise BackendUnavailableError("CUDA graphs are for inference; call model.eval() first")


def _copied(output: Any) -> Any:
    """Fresh tensors in the same structure."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, dict):
        return type(output)({name: _copied(part) for name, part in output.items()})
    if isinstance(output, (tuple, list)):
        parts = [_copied(part) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output
