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
from vistoken.kernels.biased_attention import biased_attention
from vistoken.kernels.chain import Slots, add_reduce_norm
from vistoken.kernels.dispatch import use_triton, why_not_triton
from vistoken.methods.base import Need
from vistoken.methods.sparse import SparseAttention
from vistoken.spec import class_path, lookup
from vistoken.state import Frame, TokenState
from vistoken.tap import gather_signals

BLOCK = "timm.models.vision_transformer.Block"
PARTS = {
    "norm1": ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"),
    "attn": ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"),
    "attn.qkv": ("torch.nn.modules.linear.Linear",),
    "attn.proj": ("torch.nn.modules.linear.Linear",),
    "norm2": ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"),
    "mlp": ("timm.layers.mlp.Mlp",),
    "mlp.fc1": ("torch.nn.modules.linear.Linear",),
    "mlp.fc2": ("torch.nn.modules.linear.Linear",),
    "mlp.act": ("torch.nn.modules.activation.GELU", "timm.layers.activations.GELU"),
    **dict.fromkeys(
        ("attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm"),
        ("torch.nn.modules.linear.Identity",),
    ),
    **dict.fromkeys(
        ("ls1", "ls2"),
        ("torch.nn.modules.linear.Identity", "timm.layers.layer_scale.LayerScale"),
    ),
}
"""Classes that the chain reproduces, by module path in a block."""

TOLERANCE = 2e-2
"""Relative error to the block's own forward that bf16 and fp16 rounding explains."""


def why_not(block: Any) -> str | None:
    """The reason why a block is not one that the chain reproduces, or None."""
    if class_path(type(block)) != BLOCK:
        return f"its blocks are {class_path(type(block))}"
    for path, allowed in PARTS.items():
        try:
            part = block.get_submodule(path)
        except AttributeError:
            if path in ("attn.norm", "ls1", "ls2"):
                continue
            return f"a block has no module '{path}'"
        if class_path(type(part)) not in allowed:
            return f"'{path}' of a block is {class_path(type(part))}"
    if any(norm.weight is None or norm.bias is None for norm in (block.norm1, block.norm2)):
        return "its norms have no weight and bias"
    if getattr(block.attn, "gate", None) is not None:
        return "its attention is gated"
    if getattr(block.mlp.act, "approximate", "none") != "none":
        return "its GELU is approximate already"
    return None


class FusedBlock:
    """Stands in for one block's `forward`; falls back to the block's own.

    Args:
        attachment: the method on the model.
        block: index of the block.
    """

    def __init__(self, attachment: Attachment, block: int) -> None:
        self.attachment = attachment
        self.block = block
        self.seen: tuple[list[Any], list[int]] | None = None
        self.places: list[tuple[dict[str, Any], str]] = []
        self.untouched = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None, "places": []}

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
        kind = (x.device, x.dtype)
        if kind not in self.attachment.checked:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            self.attachment.checked.add(kind)
            if not agrees(self.attachment, x):
                return False
        return self.intact()

    def intact(self) -> bool:
        """Whether the block's parts are of the known kind and carry no foreign hook.

        Layers can be exchanged and hooks added after wrap, so this looks at every call; the
        inspection itself is repeated only where something changed.
        """
        parts = [modules.get(name) for modules, name in self.places]
        seen = (parts, _hook_ids(parts))
        if seen != self.seen or not parts:
            self.places = [_place(self.owner, path) for path in PARTS]
            parts = [modules.get(name) for modules, name in self.places]
            self.seen = (parts, _hook_ids(parts))
            self.untouched = why_not(self.owner) is None and not any(map(_is_watched, parts))
        return self.untouched

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

        if frame.normed is not None and frame.normed[0] is x:
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
        if assignment.rule == "mlerp" and assignment.src is not None:
            short = assignment.reduce(plus(x, branch, gamma))
            h, after = F.layer_norm(short, (short.shape[-1],), *norm), state.after(assignment)
            return short, h, after
        slots = Slots(
            assignment.keep,
            assignment.src,
            assignment.dst,
            assignment.weight,
            assignment.gain,
            assignment.rule != "sum",
        )
        short, h, size = add_reduce_norm(x, branch, gamma, slots, state.size, norm)
        return short, h, state.after(assignment, size)

    def finish(self, short: Tensor, branch: Tensor, frame: Frame) -> Tensor:
        """The second residual add, with the next block's first norm where that follows."""
        attachment, gamma = self.attachment, layer_scale(self.owner, "ls2")
        following = self.block + 1
        cut = attachment.method.where == "block" and not attachment.current[self.block].idle
        if following == len(attachment.blocks) or cut:
            return (
                torch.add(short, branch) if gamma is None else torch.addcmul(short, branch, gamma)
            )
        after: Any = attachment.blocks[following]
        norm = norm_of(after.norm1)
        x, h, _ = add_reduce_norm(short, branch, gamma, None, None, norm)
        frame.normed = (x, h)
        return x


def split_heads(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, H, N, d]` of normed tokens h `[B, N, C]`, views of one."""
    batch, tokens, _ = h.shape
    qkv = F.linear(h, attn.qkv.weight, attn.qkv.bias)
    q, k, v = qkv.view(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
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
    rows = cls if Need.CLASS_ROW in needs else 0
    out, row = biased_attention(q, k, v, None, attn.scale, rows, size=size)
    others = needs - {Need.CLASS_ROW}
    # Only these read the bias: sparing its launch counts at small batches.
    reads = size is not None and not others <= {Need.KEYS, Need.STREAM}
    bias = size.log() if reads and size is not None else None
    signals = gather_signals(others, 0, q, k, bias, attn.scale)
    if rows:
        signals["class_row"] = row
    return out.transpose(1, 2).flatten(2), signals


def plus(x: Tensor, branch: Tensor | None, gamma: Tensor | None) -> Tensor:
    """`x + gamma * branch` as far as they are there."""
    if branch is None:
        return x
    return torch.add(x, branch) if gamma is None else torch.addcmul(x, branch, gamma)


def gelu_linear(h: Tensor, layer: nn.Linear) -> Tensor:
    """`gelu(linear(h))`, in the matrix product's epilogue where there is one.

    The epilogue uses the tanh form, which differs from the exact one by less than 5e-4: below the
    rounding of bf16 activations.
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
    return use_triton(x)


def _place(owner: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """Where a module of a block is kept: the parent's table of modules, and the name in it."""
    parent, _, name = path.rpartition(".")
    found = lookup(owner, parent)
    return (found._modules if isinstance(found, nn.Module) else {}), name


def _hook_ids(parts: list[Any]) -> list[int]:
    """Numbers of all forward hooks on the modules; torch gives every hook its own."""
    return [
        number
        for part in parts
        if part is not None
        for hooks in (part._forward_pre_hooks, part._forward_hooks)
        for number in hooks
    ]


def _is_watched(part: nn.Module | None) -> bool:
    """Whether someone else's forward hook sits on a module."""
    if part is None or not (part._forward_hooks or part._forward_pre_hooks):
        return False
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return any(type(hook).__module__ != "vistoken.hooks" for hook in hooks)


def bind(attachment: Attachment) -> None:
    """Put the chain on an attachment's blocks, if all of them are of the known kind."""
    if isinstance(attachment.method, SparseAttention):
        attachment.fused = f"{attachment.method.name} replaces attention inside them"
        return
    reasons = [why_not(block) for block in attachment.blocks]
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
    chain = attachment.fused if isinstance(attachment.fused, str) else None
    if kernels is None and chain is None:
        return (
            "fused Triton chain (the model's own blocks while training, compiling or under "
            "autocast)"
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


def agrees(attachment: Attachment, x: Tensor) -> bool:
    """Whether the chain and the first block's own forward agree on random tokens like x.

    Disagreement switches the chain off for this model; `vistoken.info` then says so.
    """
    owner: Any = attachment.blocks[0]
    chance = torch.Generator(x.device).manual_seed(0)  # the user's random numbers stay untouched
    shape = (2, min(64, x.shape[1]), x.shape[2])
    tokens = torch.randn(shape, generator=chance, device=x.device, dtype=x.dtype)
    attachment.inert = True
    try:
        own = type(owner).forward(owner, tokens).float()
    finally:
        attachment.inert = False
    h = F.layer_norm(tokens, tokens.shape[-1:], *norm_of(owner.norm1))
    out, _ = attend(owner.attn, *split_heads(owner.attn, h), None, frozenset(), 0)
    branch = F.linear(out, owner.attn.proj.weight, owner.attn.proj.bias)
    gamma = layer_scale(owner, "ls1")
    short, h, _ = add_reduce_norm(tokens, branch, gamma, None, None, norm_of(owner.norm2))
    branch = F.linear(gelu_linear(h, owner.mlp.fc1), owner.mlp.fc2.weight, owner.mlp.fc2.bias)
    gamma = layer_scale(owner, "ls2")
    chain = plus(short, branch, gamma).float()
    error = float((chain - own).norm() / own.norm())
    same = error <= TOLERANCE  # false for NaN too
    if not same:
        attachment.fused = f"the fused chain is off by {error:.1e} from the model's own block"
    return same
