"""The branch bypass: hooks that shorten the residual stream inside a block that is not ours.

A pre-norm block computes `x = x + A(n1(x))`, then `x = x + M(n2(x))`, and only the block holds x.
At the entry of the MLP branch the residual stream is reduced and the short one goes on; at its last
module `short + branch` is kept and a one-element zero returned, which the host's own add
broadcasts; at the block's end the kept sum replaces the host's. The host's forward always runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vistoken.errors import RecomputeError, TapError
from vistoken.kernels.dispatch import as_given, autocasts
from vistoken.methods.base import Features, Method
from vistoken.methods.sparse import SparseAttention
from vistoken.schedule import Schedule, Step
from vistoken.shape import ModelShape
from vistoken.sparse import SparseTap
from vistoken.spec import BlockSpec, Readout
from vistoken.state import Address, Assignment, Fill, Frame, SourceMap, TokenState
from vistoken.tap import Tap, gather_signals

T = TypeVar("T")
FRAMES_KEPT = 8
"""Forward passes whose blocks can still be recomputed by activation checkpointing."""


class Attachment:
    """One method on one model: what it decided, and the frame of the forward pass that runs.

    Args:
        spec: the family's row.
        method: the settings.
        shape: lengths and costs at the model's default image size.
        host: the module that owns the blocks.
        blocks: the blocks in order.
        fill: what pruned cells get in dense outputs.
    """

    def __init__(
        self,
        spec: BlockSpec,
        method: Method,
        shape: ModelShape,
        host: nn.Module,
        blocks: list[nn.Module],
        fill: Fill,
    ) -> None:
        self.spec = spec
        self.method = method
        self.shape = shape
        self.host = host
        self.blocks = blocks
        self.fill = fill
        self.needs = method.needs
        self.proportional = method.proportional
        self.plans: dict[tuple[int, int], Schedule] = {}
        self.steps: dict[tuple[int, int], tuple[Step, ...]] = {}
        self.plan(shape.grid)
        self.handles: list[Any] = []
        self.grid = shape.grid
        self.frame: Frame | None = None
        self.past: deque[Frame] = deque(maxlen=FRAMES_KEPT)
        self.inside = False
        self.raw = False
        self.whole: int | None = None
        self.inert = False
        self.fused: bool | str = False
        self.checked: dict[tuple[torch.device, torch.dtype], str | None] = {}
        self.tracer: Any = None
        self.current: tuple[Step, ...] = self.steps[shape.grid]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.update(frame=None, past=deque(maxlen=FRAMES_KEPT), tracer=None)
        return state

    @property
    def readout(self) -> Readout:
        """What the head needs; asked anew each time, for hosts can change their pooling."""
        return self.spec.readout(self.host)

    def plan(self, grid: tuple[int, int]) -> Schedule:
        """The schedule on a patch grid, planned once."""
        if grid not in self.plans:
            schedule = self.method.plan(self.shape.at(grid))
            self.plans[grid] = schedule
            self.steps[grid] = schedule.steps
        return self.plans[grid]

    # Frames ---------------------------------------------------------------------------------------

    def begin(self, block: int, x: Tensor) -> None:
        """The input x `[B, N, C]` of a block arrived: open, continue or find again its frame."""
        again = recomputing()
        if again:
            self.frame = self.recall(block, x)
            self.current = self.steps[self.frame.state(0).grid]
        elif block == 0:
            self.frame = self.open(x)
        frame = self.running()
        frame.short[block] = frame.out[block] = None
        if again or torch.compiler.is_compiling():
            return
        if block == 0 and torch.is_grad_enabled():
            self.past.append(frame)
        if self.past and self.past[-1] is frame:  # no other frame is ever looked up again
            frame.inputs[block] = Address(x)

    def open(self, x: Tensor) -> Frame:
        """The frame of a new forward pass."""
        patches = x.shape[1] - self.shape.prefix
        grid = self.grid
        if patches != grid[0] * grid[1]:
            grid = (1, patches)
        self.plan(grid)
        self.current = self.steps[grid]
        start = TokenState(x.shape[1], self.shape.prefix, grid)
        frame = Frame(start, self.shape.depth, self.whole)
        if self.tracer is not None:
            self.tracer.start(frame, x)
        return frame

    def running(self) -> Frame:
        """The frame of this forward pass."""
        if self.frame is None:
            raise RecomputeError("a block ran before block 0 of the same forward pass")
        return self.frame

    def recall(self, block: int, x: Tensor) -> Frame:
        """The frame whose `block` had this very input, while a backward pass recomputes it.

        Where several blocks, or the whole host, are recomputed in one go, only the first block gets
        an input that was kept; the others follow the output of the block before.
        """
        for frame in reversed(self.past):
            known = frame.inputs[block]
            if known is not None and known.holds(x):
                return frame
        if block == 0:
            return self.open(x)
        if self.frame is not None and self.frame.next is not None and self.frame.next.holds(x):
            return self.frame
        raise RecomputeError(
            f"activation checkpointing recomputes block {block} of a forward pass that is not "
            f"known any more. The last {FRAMES_KEPT} passes are kept; reentrant checkpoints cannot "
            "be followed, use use_reentrant=False"
        )

    def close(self) -> None:
        """The host's forward is over: forget its frame."""
        self.inside = False
        self.frame = None

    # Attention ------------------------------------------------------------------------------------

    def tap(self, block: int, masked: bool = False) -> Tap | None:
        """The tap of a block's attention, or None where nothing is to be read or added.

        Args:
            block: index of the block.
            masked: whether the host hands its attention a mask this time.
        """
        frame = self.running()
        if isinstance(self.method, SparseAttention):
            sparse = block in self.method.replaced(self.shape.depth)
            return SparseTap(self.method, block, frame.state(0).grid) if sparse else None
        reduces = not self.current[block].idle and frame.assignments[block] is None
        collects = bool(self.needs) and reduces
        state = frame.state(block)
        biased = self.proportional and state.size is not None
        masked = (masked or self.spec.masks) and state.reduced
        if not (collects or biased or masked):
            return None

        def log_size(key: Tensor) -> Tensor | None:
            if not self.proportional or state.size is None:
                return None
            return state.size.to(widened(key)).log()

        def collect(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> None:
            def signals() -> dict[str, Any]:
                cls = self.shape.cls
                return gather_signals(self.needs, cls, q.detach(), k.detach(), bias, scale)

            frame.features[block] = undisturbed(q.device.type, signals)

        return Tap(log_size, collect if collects else None, lambda: state.origin)

    def pool_tap(self) -> Tap | None:
        """The tap of an attention pool: merged tokens count by their size."""
        if self.frame is None or self.readout != "leave":
            return None
        state = self.frame.state(self.shape.depth)
        if state.size is None:
            return None
        size, prefix = state.size, state.prefix

        def log_size(key: Tensor) -> Tensor | None:
            keys = key.shape[2]
            if keys not in (size.shape[1], size.shape[1] - prefix):
                return None
            return size[:, -keys:].to(widened(key)).log()

        return Tap(log_size, None, lambda: None)

    # Reduction ------------------------------------------------------------------------------------

    def assign(self, block: int, x: Tensor) -> Assignment:
        """Where the tokens x `[B, N, C]` of a block go; the same answer when recomputed."""
        frame, step = self.running(), self.current[block]
        known = frame.assignments[block]
        if known is not None:
            return known
        signals = frame.features[block]
        if self.needs and signals is None:
            raise TapError(
                f"{self.method.name} needs {', '.join(need.value for need in self.needs)}, but no "
                f"fused attention call passed through block {block} of this {self.spec.family}"
            )

        def choose() -> Assignment:
            features = Features(x=x.detach(), **(signals or {}))
            return self.method.assign(features, frame.state(block), step)

        assignment = undisturbed(x.device.type, choose)
        frame.assignments[block], frame.features[block] = assignment, None
        return assignment

    def shorten(self, block: int, x: Tensor) -> Tensor:
        """Residual stream `[B, N, C]` to `[B, M, C]` at the block's point of reduction."""
        step = self.current[block]
        if step.idle:
            return x
        if x.shape[1] != step.tokens:
            raise RuntimeError(f"block {block} got {x.shape[1]} tokens, {step.tokens} were planned")
        return self.assign(block, x).reduce(x)

    def advance(self, block: int) -> None:
        """Record the tokens that leave a block."""
        frame = self.running()
        assignment, state = frame.assignments[block], frame.state(block)
        if frame.states[block + 1] is None:
            frame.states[block + 1] = state if assignment is None else state.after(assignment)

    # Outputs --------------------------------------------------------------------------------------

    def full(self, y: Tensor, blocks: int | None = None) -> Tensor:
        """Tokens `[B, N, C]` after `blocks` blocks (None: those done) on the full grid."""
        frame = self.running()
        end = frame.done if blocks is None else blocks
        if not frame.state(end).reduced:
            return y
        return self.source_map(y, end).expand(y, self.fill)

    def source_map(self, like: Tensor, blocks: int) -> SourceMap:
        """The map from original tokens to those after `blocks` blocks."""
        return self.running().source_map(like, blocks)

    def weigh(self, y: Tensor) -> Tensor:
        """Scale tokens so that the host's plain mean becomes the mean weighted by size."""
        state = self.running().state(self.shape.depth)
        if state.size is None:
            return y
        first = 0 if self.readout == "weigh_all" else state.prefix
        size = state.size[:, first:].to(widened(y))
        share = size * (size.shape[1] / size.sum(1, keepdim=True))
        share = torch.cat([share.new_ones(share.shape[0], first), share], 1)
        return (y * share[..., None]).to(y.dtype)


def recomputing() -> bool:
    """Whether a backward pass is running, so that activation checkpointing runs this again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def undisturbed(device_type: str, call: Callable[[], T]) -> T:
    """`call()` without gradient or autocast; contexts that would change nothing are not entered."""
    if torch.is_grad_enabled() or autocasts(device_type):
        with torch.no_grad(), as_given(device_type):
            return call()
    return call()


def widened(x: Tensor) -> torch.dtype:
    """The type in which weights by size are computed for x: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
