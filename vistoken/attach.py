"""The branch bypass: hooks that shorten the residual stream inside a block that is not ours.

A pre-norm block computes `x = x + A(n1(x))`, then `x = x + M(n2(x))`, and only the block holds x.
At the entry of the MLP branch the residual stream is reduced and the short one goes on; at its last
module `short + branch` is kept and a one-element zero returned, which the host's own add
broadcasts; at the block's end the kept sum replaces the host's. The host's forward always runs.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.errors import RecomputeError, TapError
from vistoken.methods.base import Features, Method
from vistoken.schedule import Schedule, Step
from vistoken.shape import ModelShape
from vistoken.spec import BlockSpec, Readout, lookup
from vistoken.state import Address, Assignment, Fill, Frame, SourceMap, TokenState
from vistoken.tap import Tap, gather_signals

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
        self.taps = bool(self.needs) or self.proportional or spec.masks
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
        self.checked: set[tuple[torch.device, torch.dtype]] = set()
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
        frame.inputs[block] = Address(x)
        if block == 0 and torch.is_grad_enabled():
            self.past.append(frame)

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

    def tap(self, block: int) -> Tap | None:
        """The tap of a block's attention, or None where nothing is to be read or added."""
        frame = self.running()
        reduces = not self.current[block].idle and frame.assignments[block] is None
        collects = bool(self.needs) and reduces
        state = frame.state(block)
        biased = self.proportional and state.size is not None
        masked = self.spec.masks and state.reduced
        if not (collects or biased or masked):
            return None

        def log_size(key: Tensor) -> Tensor | None:
            if not self.proportional or state.size is None:
                return None
            return state.size.to(widened(key)).log()

        def collect(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> None:
            with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
                frame.features[block] = gather_signals(
                    self.needs, self.shape.cls, q.detach(), k.detach(), bias, scale
                )

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
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            features = Features(x=x.detach(), **(signals or {}))
            assignment = self.method.assign(features, frame.state(block), step)
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


class Hook:
    """A hook that knows its attachment and block; a plain object, so copies and pickles work."""

    def __init__(self, attachment: Attachment, block: int = -1) -> None:
        self.attachment = attachment
        self.block = block


class BlockEnter(Hook):
    """Pre-hook of a block's first module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.attachment.inert:
            self.attachment.begin(self.block, args[0])


class Positions(Hook):
    """Pre-hook of a block with rotary positions: tables follow the tokens that are left."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        attachment, keyword = self.attachment, self.attachment.spec.positions
        table = kwargs.get(keyword) if keyword else None
        if self.block == 0 or table is None:
            return None
        again = recomputing()
        frame = attachment.recall(self.block, args[0]) if again else attachment.running()
        state = frame.state(self.block)
        if not state.reduced:
            return None
        return args, {**kwargs, str(keyword): select_positions(table, state)}


class TapEnter(Hook):
    """Pre-hook of an attention module: enter the tap."""

    def __init__(self, attachment: Attachment, block: int, pool: bool = False) -> None:
        super().__init__(attachment, block)
        self.pool = pool
        self.tap: Tap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tap": None}

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        attachment = self.attachment
        if attachment.inert:
            return
        self.tap = attachment.pool_tap() if self.pool else attachment.tap(self.block)
        if self.tap is not None:
            self.tap.__enter__()  # type: ignore[no-untyped-call]


class TapLeave(Hook):
    """Always-called post-hook of an attention module: leave the tap, whatever happened."""

    def __init__(self, enter: TapEnter) -> None:
        super().__init__(enter.attachment, enter.block)
        self.enter = enter

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tap, self.enter.tap = self.enter.tap, None
        if tap is None:
            return
        tap.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is not None and tap.calls != 1:
            raise TapError(
                f"{tap.calls} fused attention calls passed through {type(module).__name__} of "
                f"block {self.block}, 1 was expected. Use the host's fused attention (timm: "
                "set_fused_attn(True); transformers: attn_implementation='sdpa')"
            )


class BranchIn(Hook):
    """Pre-hook of the MLP branch: reduce the residual stream."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        attachment, x = self.attachment, args[0]
        if attachment.inert:
            return None
        short = attachment.shorten(self.block, x)
        if short is x:
            return None
        attachment.running().short[self.block] = short
        return (short, *args[1:])


class BranchOut(Hook):
    """Post-hook of the MLP branch's last module: finish the short sum, hand the host a zero."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        frame = self.attachment.frame
        if frame is None:
            return None
        short = frame.short[self.block]
        if short is None:
            return None
        frame.out[self.block], frame.short[self.block] = short + output, None
        return output.new_zeros(1)


class BlockLeave(Hook):
    """Post-hook of a block: return the short sum (or reduce here), close the block's books."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        attachment = self.attachment
        frame = attachment.running()
        first = output[0] if isinstance(output, tuple) else output
        out = frame.out[self.block]
        if out is not None:
            frame.out[self.block] = None
            if torch.is_grad_enabled() and first.requires_grad and not out.requires_grad:
                raise RecomputeError(
                    "reentrant activation checkpointing loses the gradient of reduced tokens; "
                    "use use_reentrant=False"
                )
            first = out
        elif attachment.method.where == "block":
            first = attachment.shorten(self.block, first)
        attachment.advance(self.block)
        if attachment.tracer is not None:
            attachment.tracer.record(self.block, attachment.current[self.block], frame, first)
        if frame.whole == self.block:
            first = attachment.full(first, self.block + 1)
        if recomputing():
            frame.next = Address(first)
        return (first, *output[1:]) if isinstance(output, tuple) else first


class PatchGrid(Hook):
    """Post-hook of the patch convolution: note the grid of this image size."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.attachment.grid = (output.shape[-2], output.shape[-1])


class HostEnter(Hook):
    """Pre-hook of the host: what leaves its exit now goes to its own head."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.attachment.inside = True


class ExitTokens(Hook):
    """Post-hook of the module that returns all tokens before pooling."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        attachment = self.attachment
        if attachment.raw or attachment.frame is None:
            return output
        if not attachment.inside or attachment.readout == "grid":
            return attachment.full(output)
        return attachment.weigh(output) if attachment.readout != "leave" else output


class HostLeave(Hook):
    """Always-called post-hook of the host: full-grid tokens in its output object, then clean up."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        attachment = self.attachment
        try:
            if output is None or attachment.spec.exit or attachment.frame is None:
                return None
            return full_output(attachment, output)
        finally:
            attachment.close()


def full_output(attachment: Attachment, output: Any) -> Any:
    """An output object (or tuple) of transformers with its token tensors on the full grid."""
    if isinstance(output, tuple):
        last, *rest = output
        return (attachment.full(last), *(full_states(attachment, part) for part in rest))
    output["last_hidden_state"] = attachment.full(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = full_states(attachment, output["hidden_states"])
    return output


def full_states(attachment: Attachment, part: Any) -> Any:
    """The tuple of hidden states (embeddings first, then after each block) on the full grid."""
    if not isinstance(part, tuple) or len(part) != attachment.shape.depth + 1:
        return part
    return tuple(attachment.full(state, block) for block, state in enumerate(part))


def recomputing() -> bool:
    """Whether a backward pass is running, so that activation checkpointing runs this again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def widened(x: Tensor) -> torch.dtype:
    """The type in which weights by size are computed for x: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def select_positions(table: Tensor, state: TokenState) -> Tensor:
    """Rotary tables `[M0, D]`, `[H, M0, D]` or per image, at the living patches: `[B, H, M, D]`."""
    assert state.origin is not None
    index = state.origin[:, state.prefix :] - state.prefix
    while table.dim() < 4:
        table = table[None]
    if table.shape[2] == index.shape[1] and table.shape[2] != state.grid[0] * state.grid[1]:
        return table
    table = table.expand(index.shape[0], -1, -1, -1)
    return table.gather(2, index[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))


def attach(attachment: Attachment) -> None:
    """Register every hook of an attachment; on failure none is left."""
    spec, handles = attachment.spec, attachment.handles

    def module(owner: nn.Module, path: str) -> nn.Module:
        found = lookup(owner, path)
        assert isinstance(found, nn.Module)
        return found

    def tap(target: nn.Module, block: int, pool: bool = False) -> None:
        enter = TapEnter(attachment, block, pool)
        handles.append(target.register_forward_pre_hook(enter))
        handles.append(target.register_forward_hook(TapLeave(enter), always_call=True))

    try:
        host = attachment.host
        handles.append(module(host, spec.patch).register_forward_hook(PatchGrid(attachment)))
        handles.append(host.register_forward_pre_hook(HostEnter(attachment)))
        for block, owner in enumerate(attachment.blocks):
            handles.append(
                module(owner, spec.enter).register_forward_pre_hook(BlockEnter(attachment, block))
            )
            if spec.positions:
                handles.append(
                    owner.register_forward_pre_hook(Positions(attachment, block), with_kwargs=True)
                )
            if attachment.taps:
                tap(module(owner, spec.attn), block)
            if attachment.method.where == "mlp":
                entry, last = module(owner, spec.branch_in), module(owner, spec.branch_out)
                handles.append(entry.register_forward_pre_hook(BranchIn(attachment, block)))
                handles.append(last.register_forward_hook(BranchOut(attachment, block)))
            leave = BlockLeave(attachment, block)
            handles.append(owner.register_forward_hook(leave, prepend=True))
        for path in spec.pool:
            if isinstance(lookup(host, path), nn.Module):
                tap(module(host, path), attachment.shape.depth, pool=True)
        if spec.exit:
            handles.append(module(host, spec.exit).register_forward_hook(ExitTokens(attachment)))
        handles.append(host.register_forward_hook(HostLeave(attachment), always_call=True))
    except BaseException:
        detach(attachment)
        raise


def detach(attachment: Attachment) -> None:
    """Remove every hook of an attachment."""
    for handle in attachment.handles:
        handle.remove()
    attachment.handles.clear()
