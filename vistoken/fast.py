"""The fused chain: a plain pre-norm block of timm as a handful of launches, for inference on a GPU.

    h   = LayerNorm(x)                              (left over from the block before)
    o   = attention(qkv(h), sizes)                  one kernel, class row included
    x,h = reduce(x + ls1 proj(o)), LayerNorm        one kernel; sizes too
    x,h = x + ls2 fc2(gelu(fc1(h))), LayerNorm of the next block

The block's own `forward` still runs whenever anything is out of the ordinary: gradients, training,
autocast, masks, compiling, hooks on inner modules, another dtype or device, or an outcome that did
not agree with the block's own on random input.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistoken import patches
from vistoken.attach import Attachment
from vistoken.kernels.biased_attention import biased_attention, biased_attention_reference
from vistoken.kernels.chain import add_reduce_norm
from vistoken.kernels.dispatch import use_triton, why_not_triton
from vistoken.methods.base import Need
from vistoken.methods.sparse import SparseAttention
from vistoken.parts import Watch, is_watched, why_not
from vistoken.state import Frame, TokenState
from vistoken.tap import gather_signals

TOLERANCE = 2e-2
"""Relative error to the block's own forward that bf16 and fp16 rounding explains."""


class FusedBlock:
    """Stands in for one block's `forward`; falls back to the block's own.

    Args:
        attachment: the method on the model.
        block: index of the block.
    """

    def __init__(self, attachment: Attachment, block: int) -> None:
        self.attachment = attachment
        self.block = block
        self.watch = Watch()

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.owner).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def owner(self) -> Any:
        """The block."""
        return self.attachment.blocks[self.block]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's forward, x `[B, N, C]` to `[B, M, C]`."""
        options = (*args, *kwargs.values())
        if all(option is None or option is False for option in options) and self.usable(x):
            return self.run(x)
        out: Tensor = type(self.owner).forward(self.owner, x, *args, **kwargs)
        return out

    def usable(self, x: Tensor) -> bool:
        """Whether this very call can take the chain."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.owner.training:
            return False
        if self.attachment.fused is not True or not runs_fused(x):
            return False
        return self.watch.intact(self.owner) and self.checked(x)

    def checked(self, x: Tensor) -> bool:
        """Whether the chain agreed with the model's own first block on tensors like x."""
        kind = (x.device, x.dtype)
        verdicts = self.attachment.checked
        if kind not in verdicts:
            first: Any = self.attachment.blocks[0]
            capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
            if capturing or first.training or not first.__dict__["forward"].watch.intact(first):
                return False
            verdicts[kind] = disagreement(self.attachment, x)
        return verdicts[kind] is None

    def norms_for(self, x: Tensor) -> bool:
        """Whether the block before may make this block's first norm of x, which it hands over."""
        owner = self.owner
        weight = owner.norm1.weight if self.watch.intact(owner) else None
        if weight is None or (weight.device, weight.dtype) != (x.device, x.dtype):
            return False
        # FSDP frees the weights of blocks that do not run yet.
        return weight.untyped_storage().size() > 0 and not (x.is_inference() and is_watched(owner))

    def run(self, x: Tensor) -> Tensor:
        """The chain on x `[B, N, C]`; leaves the frame as the bypass would."""
        attachment, block, owner = self.attachment, self.block, self.owner
        attachment.begin(block, x)
        frame = attachment.running()
        state, step = frame.state(block), attachment.current[block]
        reduces = not step.idle and attachment.method.where == "mlp"
        needs = attachment.needs if not step.idle else frozenset()
        sized = attachment.proportional and state.size is not None
        size = state.size if sized else None

        if frame.normed is not None and frame.normed[0] is x and frame.normed[2] == version(x):
            h = frame.normed[1]
        else:
            h = F.layer_norm(x, x.shape[-1:], *norm_of(owner.norm1))
        heads = split_heads(owner.attn, h)
        side = None
        if reduces and needs == {Need.KEYS}:
            frame.features[block] = gather_signals(needs, 0, *heads[:2], None, owner.attn.scale)
            side = self.assign_aside(x)
        attn_out, signals = attend(owner.attn, *heads, size, needs, attachment.shape.cls)
        if side is None and not step.idle:
            frame.features[block] = signals
            if reduces and Need.STREAM not in needs:
                side = self.assign_aside(x)
        branch = F.linear(attn_out, owner.attn.proj.weight, owner.attn.proj.bias)
        if side is not None:
            torch.cuda.current_stream(x.device).wait_stream(side)
        del heads, attn_out, signals  # not before: the side stream may have been reading them
        short, h, after = self.reduce(x, branch, state, frame, reduces)
        frame.states[block + 1] = after
        hidden = gelu_linear(h, owner.mlp.fc1)
        branch = F.linear(hidden, owner.mlp.fc2.weight, owner.mlp.fc2.bias)
        return self.finish(short, branch, frame)

    def assign_aside(self, x: Tensor) -> torch.cuda.Stream | None:
        """While a graph is captured, find the assignment beside attention and projection.

        Matching leaves most of the GPU idle, so in a graph it becomes a branch of its own. Outside
        a capture a second stream costs more on the host than it saves.

        Returns:
            The stream to wait for, or None where nothing was done.
        """
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            self.attachment.assign(self.block, x)
        return side

    def reduce(
        self, x: Tensor, branch: Tensor | None, state: TokenState, frame: Frame, reduces: bool
    ) -> tuple[Tensor, Tensor, TokenState | None]:
        """Residual add, reduction and second norm; also the state after it, if it is final."""
        owner, gamma = self.owner, layer_scale(self.owner, "ls1")
        norm = norm_of(owner.norm2)
        if not reduces:
            short, h, _ = add_reduce_norm(x, branch, gamma, None, state.size, norm)
            idle = self.attachment.current[self.block].idle
            return short, h, state if idle else None
        if Need.STREAM in self.attachment.needs:
            x, branch = plus(x, branch, gamma), None
            assignment = self.attachment.assign(self.block, x)
        else:
            assignment = self.attachment.assign(self.block, x)
        short, h, size = add_reduce_norm(x, branch, gamma, assignment.slots, state.size, norm)
        return short, h, state.after(assignment, size)

    def finish(self, short: Tensor, branch: Tensor, frame: Frame) -> Tensor:
        """The second residual add, with the next block's first norm where that follows."""
        attachment, gamma = self.attachment, layer_scale(self.owner, "ls2")
        following = self.block + 1
        cut = attachment.method.where == "block" and not attachment.current[self.block].idle
        if following == len(attachment.blocks) or cut:
            return plus(short, branch, gamma)
        after: Any = attachment.blocks[following]
        chain = after.__dict__.get("forward")
        listened = short.is_inference() and is_watched(self.owner)
        if listened or not isinstance(chain, FusedBlock) or not chain.norms_for(short):
            return plus(short, branch, gamma)
        x, h, _ = add_reduce_norm(short, branch, gamma, None, None, norm_of(after.norm1))
        frame.normed = (x, h, version(x))
        return x


def split_heads(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, H, N, d]` of normed tokens h `[B, N, C]`, views of one."""
    batch, tokens, _ = h.shape
    qkv = F.linear(h, attn.qkv.weight, attn.qkv.bias)
    shape = (batch, tokens, 3, attn.num_heads, qkv.shape[-1] // (3 * attn.num_heads))
    q, k, v = qkv.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attend(
    attn: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    needs: frozenset[Need],
    cls: int,
) -> tuple[Tensor, dict[str, Any]]:
    """Attention before its projection, `[B, N, C]`, and declared signals."""
    rows, lse = cls if Need.CLASS_ROW in needs else 0, None
    if Need.RECEIVED in needs:
        out, row, lse = biased_attention(
            q, k, v, None, attn.scale, rows, size=size, return_lse=True
        )
    else:
        out, row = biased_attention(q, k, v, None, attn.scale, rows, size=size)
    others = needs - {Need.CLASS_ROW}
    # Only these read the bias: sparing its launch counts at small batches.
    reads = size is not None and not others <= {Need.KEYS, Need.STREAM}
    bias = size.log() if reads and size is not None else None
    signals = gather_signals(others, 0, q, k, bias, attn.scale, lse)
    if rows:
        signals["class_row"] = row
    return out.transpose(1, 2).flatten(2), signals


def version(x: Tensor) -> int:
    """How often x was written to in place; tensors of inference mode do not count it."""
    return 0 if x.is_inference() else x._version


def plus(x: Tensor, branch: Tensor | None, gamma: Tensor | None) -> Tensor:
    """`x + gamma * branch` as far as they are there."""
    if branch is None:
        return x
    return torch.add(x, branch) if gamma is None else torch.addcmul(x, branch, gamma)


def gelu_linear(h: Tensor, layer: nn.Linear) -> Tensor:
    """`gelu(linear(h))`, in the matrix product's epilogue where there is one.

    The epilogue uses the tanh form, which differs from the exact one by less than 5e-4: small
    beside activations of order one, but more than rounding where the result is near zero.
    """
    if h.is_cuda and layer.bias is not None:
        flat = h.reshape(-1, h.shape[-1])
        out = torch._addmm_activation(layer.bias, flat, layer.weight.t(), use_gelu=True)
        return out.view(*h.shape[:-1], -1)
    return F.gelu(F.linear(h, layer.weight, layer.bias))


def layer_scale(block: nn.Module, name: str) -> Tensor | None:
    """The gains of a LayerScale `[C]`, or None."""
    gamma = getattr(getattr(block, name, None), "gamma", None)
    return gamma if isinstance(gamma, Tensor) else None


def norm_of(norm: Any) -> tuple[Tensor, Tensor, float]:
    """Weight, bias and eps of a LayerNorm."""
    return norm.weight, norm.bias, norm.eps


def runs_fused(x: Tensor) -> bool:
    """Whether tensors like x take the chain."""
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        return False
    return x.numel() > 0 and use_triton(x)


def bind(attachment: Attachment) -> None:
    """Put the chain on an attachment's blocks, if all of them are of the known kind."""
    if isinstance(attachment.method, SparseAttention):
        attachment.fused = f"{attachment.method.name} replaces attention inside them"
        return
    reasons = [why_not(block) for block in attachment.blocks]
    if any("forward" in block.__dict__ for block in attachment.blocks):
        reasons.insert(0, "a block has a forward of its own")
    reason = next((r for r in reasons if r is not None), None)
    attachment.fused = True if reason is None else reason
    if reason is None:
        for index, block in enumerate(attachment.blocks):
            block.__dict__["forward"] = FusedBlock(attachment, index)
        patches.bind(attachment, TOLERANCE)


def describe(attachment: Attachment) -> str:
    """Which implementation inference runs with the model as it is now, and why."""
    weight = next(attachment.host.parameters())
    kernels = why_not_triton(weight.device, weight.dtype)
    chain = attachment.checked.get((weight.device, weight.dtype))
    chain = attachment.fused if isinstance(attachment.fused, str) else chain
    if kernels is None and chain is None:
        return (
            "fused Triton chain, GELU in its tanh form (the model's own blocks while training, "
            "compiling or under autocast)"
        )
    between = "torch operators" if kernels else "Triton kernels"
    reasons = "; ".join(reason for reason in (kernels, chain) if reason)
    return f"the model's own blocks with {between} between them: {reasons}"


def unbind(attachment: Attachment) -> None:
    """Take the chain off again."""
    patches.unbind(attachment)
    for block in attachment.blocks:
        if isinstance(block.__dict__.get("forward"), FusedBlock):
            del block.__dict__["forward"]


def disagreement(attachment: Attachment, x: Tensor) -> str | None:
    """How the chain and the first block's own forward differ on random tokens like x, or None.

    What is found keeps tensors of this kind off the chain; `vistoken.info` then says so.
    """
    owner: Any = attachment.blocks[0]
    chance = torch.Generator(x.device).manual_seed(0)  # the user's random numbers stay untouched
    shape = (2, min(64, x.shape[1]), x.shape[2])
    tokens = torch.randn(shape, generator=chance, device=x.device, dtype=x.dtype)
    attachment.inert = True
    try:
        own = type(owner).forward(owner, tokens)
    finally:
        attachment.inert = False
    h = F.layer_norm(tokens, tokens.shape[-1:], *norm_of(owner.norm1))
    q, k, v = split_heads(owner.attn, h)
    size = 1 + 8 * torch.rand(shape[:2], generator=chance, device=x.device)
    weighed, row = biased_attention(q, k, v, None, owner.attn.scale, 1, size=size)
    exact, exact_row, _ = biased_attention_reference(q, k, v, size.log(), owner.attn.scale, 1)
    out, _ = attend(owner.attn, q, k, v, None, frozenset(), 0)
    branch = F.linear(out, owner.attn.proj.weight, owner.attn.proj.bias)
    gamma = layer_scale(owner, "ls1")
    short, h, _ = add_reduce_norm(tokens, branch, gamma, None, None, norm_of(owner.norm2))
    branch = F.linear(gelu_linear(h, owner.mlp.fc1), owner.mlp.fc2.weight, owner.mlp.fc2.bias)
    chain = plus(short, branch, layer_scale(owner, "ls2"))
    for mine, theirs in ((chain, own), (weighed, exact), (row, exact_row)):
        assert mine is not None and theirs is not None
        error = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
        if not error <= TOLERANCE:  # NaN is none either
            return f"the fused chain is off by {error:.1e} from the model's own block"
    return None
