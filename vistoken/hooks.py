"""The hooks of the bypass and the tap: small callable objects, so copies and pickles work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vistoken.attach import Attachment, recomputing
from vistoken.errors import RecomputeError, TapError
from vistoken.spec import lookup
from vistoken.state import Address, TokenState
from vistoken.tap import Tap


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

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attachment = self.attachment
        if attachment.inert:
            return
        masked = kwargs.get("attn_mask") is not None or bool(kwargs.get("is_causal"))
        self.tap = attachment.pool_tap() if self.pool else attachment.tap(self.block, masked)
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
    # transformers leaves out states that its caller did not ask for.
    return tuple(
        None if state is None else attachment.full(state, block) for block, state in enumerate(part)
    )


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
        handles.append(target.register_forward_pre_hook(enter, with_kwargs=True))
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
