"""Timing of a model's own blocks at any token count, on the path that inference takes.

Blocks in the middle of the model run on random tokens `[B, n, C]`: without a method, wrapped and
keeping all tokens, wrapped and reducing, and wrapped with next to nothing left for their MLP.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistoken import fast
from vistoken.api import attachment_of, check_method, unwrap, wrap
from vistoken.attach import Attachment
from vistoken.clock import Call, Calls, Mode, device_name, median_ms
from vistoken.errors import ConfigError, ScheduleError, UnsupportedBackboneError
from vistoken.flops import count_macs
from vistoken.methods import METHODS, Method, Pool, parse
from vistoken.models.detect import Backbone, find, grid_at
from vistoken.schedule import Step
from vistoken.spec import BlockSpec, class_path, lookup
from vistoken.state import Assignment, Frame, TokenState

FIRST = 1
"""The first block that is timed; block 0 opens a frame and so cannot stand for the others."""
BLOCKS_ON_CUDA = 8
"""Blocks timed in a row on CUDA: one is too short for the clock, and its weights stay in cache."""
MOST_COUNTS = 32
TYPICAL_SHARES = (0.7, 0.8, 0.9, 0.95)
"""Shares of the dense cost at which a method known by name is timed, the first within reach."""

BUDGET = ("r", "keep_rate", "gflops", "model", "schedule", "at", "round_to")
"""Settings that say how much a method removes; a table serves all of their values."""


@dataclass(frozen=True)
class Case:
    """What a table of times is valid for.

    Attributes:
        host, block: class paths of the vision transformer and of its blocks.
        width, heads, hidden, depth: channels, heads (0 if unknown), width of the MLP, blocks.
        parameters: of one block; tells variants apart that share a class.
        tokens, prefix: N0 and how many of them are prefix tokens.
        dtype, batch, device, mode: how it ran; the device's name includes a CPU's threads.
        method, proportional: what reduced the tokens.
        step: distance of the token counts.
        image, patch: height and width in pixels, as `224x224`.
        outside: parameters outside the blocks.
        settings: of the method, without its budget.
    """

    host: str
    block: str
    width: int
    heads: int
    hidden: int
    depth: int
    parameters: int
    tokens: int
    prefix: int
    dtype: str
    batch: int
    device: str
    mode: Mode
    method: str
    proportional: bool
    step: int
    image: str = ""
    patch: str = ""
    outside: int = 0
    settings: str = ""


class Probe:
    """A model about to be timed; the arguments are those of `LatencyTable.measure`."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor | None,
        batch: int | None,
        method: Method | str | None,
        mode: Mode | None,
        step: int | None,
    ) -> None:
        if model.training:
            raise ConfigError("the table is for inference; call model.eval() first")
        backbone = find(model)
        self.model, self.spec, host = model, backbone.spec, backbone.host
        weight = next(host.parameters())
        self.device, dtype = weight.device, weight.dtype
        conv: Any = lookup(host, self.spec.patch)
        if images is None:
            rows, cols = backbone.shape.grid
            height, width = rows * conv.stride[0], cols * conv.stride[1]
            at_least("batch", 1 if batch is None else batch)
            images = torch.zeros(batch or 1, conv.in_channels, height, width).to(weight)
        elif batch is not None:
            raise ConfigError(f"batch={batch}: images were given, {len(images)} of them")
        self.images = images
        size = (images.shape[-2], images.shape[-1])
        self.shape = backbone.shape.at(grid_at(host, self.spec, size))
        self.method = self._method(method)
        check_method(backbone, self.method)
        self.mode: Mode = mode or ("graph" if self.device.type == "cuda" else "eager")
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode={mode!r}: must be one of {get_args(Mode)}")
        if self.mode == "graph" and self.device.type != "cuda":
            raise ConfigError(f"mode='graph': CUDA graphs need CUDA, the model is on {self.device}")
        shape, cost = self.shape, self.shape.blocks[0]
        if shape.depth < 2 or set(shape.blocks) != {cost}:
            raise UnsupportedBackboneError(
                f"{class_path(type(host))} has {shape.depth} blocks of {len(set(shape.blocks))} "
                "costs; a table of block times needs two blocks or more that are all alike"
            )
        block = backbone.blocks[FIRST]
        names = ("num_heads", "num_attention_heads", "config.num_attention_heads", "n_head")
        heads = (lookup(block, f"{self.spec.attn}.{name}") for name in names)
        if step is None:
            step = min(8 * -(-shape.tokens // (8 * MOST_COUNTS)), max(1, shape.tokens // 4))
        at_least("step", step)
        self.counts = (*range(step, shape.tokens, step), shape.tokens)
        self.counts = tuple(n for n in self.counts if n >= shape.prefix + 2)
        if len(self.counts) < 2:
            raise ConfigError(f"step={step}: must be below the model's {shape.tokens} tokens")
        self.case = Case(
            host=class_path(type(host)),
            block=class_path(type(block)),
            width=shape.width,
            heads=int(next((n for n in heads if isinstance(n, int)), 0)),
            hidden=cost.mlp_linear // (2 * shape.width),
            depth=shape.depth,
            parameters=parameters(block),
            tokens=shape.tokens,
            prefix=shape.prefix,
            dtype=str(dtype).removeprefix("torch."),
            batch=len(images),
            device=device_name(self.device),
            mode=self.mode,
            method=self.method.name,
            proportional=self.method.proportional,
            step=step,
            image=f"{size[0]}x{size[1]}",
            patch=f"{conv.kernel_size[0]}x{conv.kernel_size[1]}",
            outside=parameters(host) - sum(parameters(part) for part in backbone.blocks),
            settings=settings(self.method),
        )

    def _method(self, given: Method | str | None) -> Method:
        """Settings that reduce somewhere, of the method that was named or that the model has."""
        if given is None:
            attachment = attachment_of(self.model)
            given = "diffrate" if attachment is None else attachment.method
        if given in METHODS:
            given = self._typical_settings(METHODS[str(given)])
        method = parse(given) if isinstance(given, str) else given
        if method.name not in METHODS or isinstance(method, Pool):
            raise ConfigError(
                f"method={method.name!r}: its counts cannot be chosen freely; take one of "
                f"{', '.join(name for name in METHODS if name != Pool.name)}"
            )
        if all(step.idle for step in method.plan(self.shape).steps):
            method = self._typical_settings(type(method))
        return method

    def _typical_settings(self, cls: type[Method]) -> Method:
        """Settings at which a method reduces this model considerably."""
        dense = count_macs(self.shape) / 1e9
        for share in TYPICAL_SHARES[:-1]:
            try:
                return cls.at_gflops(self.shape, share * dense)
            except ScheduleError:
                continue
        return cls.at_gflops(self.shape, TYPICAL_SHARES[-1] * dense)

    def columns(self, repeats: int) -> dict[str, Any]:
        """Times of the blocks at every count and of the whole model, as fields of the table."""
        at_least("repeats", repeats)
        start = time.perf_counter()
        dense = find(without_method(self.model))
        wrapped = wrap(without_method(self.model), self.method)
        attachment = attachment_of(wrapped)
        assert attachment is not None
        place = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with torch.no_grad(), place:
            ms = median_ms(self.calls(dense, attachment), self.device, self.mode, repeats)
        total, rest = ms["dense", 0], ms["rest", 0]
        # Alone, with its input in cache, a block runs a little faster than inside the model.
        inside = self.shape.depth * ms["block", self.counts[-1]]
        scale = (total - rest) / inside if total > rest else 1.0
        names = ("block", "idle", "step", "cut")
        at = {name: [scale * ms[name, n] for n in self.counts] for name in names}
        # Times scatter: what is left for the MLP, or added by reducing, is never negative.
        attn = [min(pair) for pair in zip(at["cut"], at["idle"], strict=True)]
        mlp = [whole - part for whole, part in zip(at["idle"], attn, strict=True)]
        adds = []
        for n, took, before in zip(self.counts, at["step"], attn, strict=True):
            after = n - self.removal(n) if self.method.where == "mlp" else n
            adds.append(max(0.0, took - before - interpolate(self.counts, mlp, after)))
        return {
            "tokens": self.counts,
            "block_ms": tuple(at["block"]),
            "attn_ms": tuple(attn),
            "mlp_ms": tuple(mlp),
            "reduce_ms": tuple(adds),
            "dense_ms": total,
            "rest_ms": rest,
            "wrapped_rest_ms": rest - min(rest, max(0.0, ms["patches", 0] - ms["patches", 1])),
            "execution": fast.describe(attachment),
            "seconds": time.perf_counter() - start,
        }

    def calls(self, dense: Backbone, attachment: Attachment) -> Calls:
        """What is timed: the whole model, the model without blocks, its blocks in four forms."""
        host, images = dense.host, self.images
        last = FIRST + BLOCKS_ON_CUDA if self.device.type == "cuda" else FIRST + 1
        # The last block of a model hands nothing to a next one, so it is left out if it can be.
        chosen = range(FIRST, max(FIRST + 1, min(last, self.shape.depth - 1)))
        tokens, args, kwargs = block_input(host, dense.blocks[FIRST], images)
        found: Calls = {
            ("dense", 0): (lambda: host(images),),
            ("rest", 0): (partial(without_blocks, dense, images),),
            ("patches", 0): (partial(patch_embedding, host, self.spec, images),),
            ("patches", 1): (partial(patch_embedding, attachment.host, self.spec, images),),
        }
        for n in self.counts:
            more, named = fit((args, kwargs), self.shape.tokens, self.shape.prefix, n)
            x = random_like(tokens, n)
            run = partial(wrapped_blocks, attachment, chosen, x, more, named)
            found["block", n] = tuple(partial(dense.blocks[i], x, *more, **named) for i in chosen)
            found["idle", n] = found["cut", n] = run(self.step(n, 0))
            found["step", n] = run(self.step(n, self.removal(n)))
            if self.method.where == "mlp":
                nearly_all = n - self.shape.prefix - 1
                found["cut", n] = run(self.step(n, nearly_all), free=True)
        return found

    def typical(self) -> Step:
        """The middle one of the steps at which the method reduces this model."""
        steps = [step for step in self.method.plan(self.shape).steps if not step.idle]
        return steps[len(steps) // 2]

    def removal(self, tokens: int) -> int:
        """Tokens that the method would remove of `tokens`, in proportion to its typical step."""
        step, prefix = self.typical(), self.shape.prefix
        patches = tokens - prefix
        share = (step.tokens - step.merged) / (step.tokens - prefix)
        return max(1, min(patches // 2, round(share * patches)))

    def step(self, tokens: int, removed: int) -> Step:
        """A step that removes so many tokens, pruning and merging as the method does."""
        like = self.typical()
        pruning = (like.tokens - like.pruned) / (like.tokens - like.merged)
        pruned = tokens - round(pruning * removed)
        return Step(like.block, like.depth, tokens, pruned, tokens - removed)


def wrapped_blocks(
    attachment: Attachment,
    chosen: Sequence[int],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    step: Step,
    free: bool = False,
) -> tuple[Call, ...]:
    """Calls of wrapped blocks, each in the middle of a forward pass of its own.

    Args:
        attachment: the method on the model.
        chosen: indices of the blocks.
        x: tokens `[B, N, C]` that enter each block.
        args: further arguments of a block.
        kwargs: keyword arguments of a block.
        step: what each block has to do.
        free: keep the first tokens instead of asking the method.
    """
    first: Any = attachment.blocks[chosen[0]]
    batch, tokens, width = x.shape
    prefix, depth = attachment.shape.prefix, attachment.shape.depth
    size = torch.ones(batch, tokens, device=x.device) if attachment.proportional else None
    state = TokenState(tokens, prefix, (1, tokens - prefix), size)
    keep = torch.arange(step.merged, device=x.device).repeat(batch, 1)
    normed = None
    if isinstance(first.__dict__.get("forward"), fast.FusedBlock):
        # In a chain the block before has made the norm already.
        normed = x, F.layer_norm(x, (width,), *fast.norm_of(first.norm1)), fast.version(x)

    def call(block: int) -> object:
        frame = Frame(state, depth)
        frame.states[block], frame.normed = state, normed
        frame.assignments[block] = Assignment(keep=keep) if free else None
        attachment.frame, attachment.current = frame, (step,) * depth
        return attachment.blocks[block](x, *args, **kwargs)

    return tuple(partial(call, block) for block in chosen)


def block_input(
    host: nn.Module, block: nn.Module, images: Tensor
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """What a host hands to one of its blocks: tokens `[B, N0, C]` and everything else."""
    seen: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [args, kwargs]

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        host(images)
    finally:
        handle.remove()
    (x, *rest), kwargs = seen
    return x, tuple(rest), kwargs


def fit(value: Any, tokens: int, prefix: int, count: int) -> Any:
    """Rotary tables and masks made for `tokens` tokens, cut to the first `count`."""
    if isinstance(value, (tuple, list)):
        return type(value)(fit(part, tokens, prefix, count) for part in value)
    if isinstance(value, dict):
        return {name: fit(part, tokens, prefix, count) for name, part in value.items()}
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if value.shape[-2] == tokens - prefix:
        return value[..., : count - prefix, :]
    if value.shape[-1] == tokens and value.shape[-2] in (1, tokens):
        return value[..., :count, :count]
    return value


def without_method(model: nn.Module) -> nn.Module:
    """A copy that shares the model's weights and carries no method."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    return twin if attachment_of(twin) is None else unwrap(twin)


def without_blocks(dense: Backbone, images: Tensor) -> object:
    """The host's forward with blocks that hand on their input."""
    try:
        for block in dense.blocks:
            block.__dict__["forward"] = hand_on
        return dense.host(images)
    finally:
        for block in dense.blocks:
            del block.__dict__["forward"]


def patch_embedding(host: nn.Module, spec: BlockSpec, images: Tensor) -> object:
    """The host's patch convolution, as it stands in the model."""
    conv: Any = lookup(host, spec.patch)
    return conv(images.to(conv.weight.dtype))


def parameters(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


def settings(method: Method) -> str:
    """A method's settings without its budget."""
    fields = (field.name for field in dataclasses.fields(method) if field.name not in BUDGET)
    return ",".join(f"{name}={getattr(method, name)}" for name in fields)


def hand_on(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a block that does nothing."""
    return x


def random_like(tokens: Tensor, count: int) -> Tensor:
    """Random tokens `[B, count, C]`; the user's random numbers stay untouched."""
    chance = torch.Generator(tokens.device).manual_seed(0)
    shape = (tokens.shape[0], count, tokens.shape[2])
    return torch.randn(shape, generator=chance, device=tokens.device, dtype=tokens.dtype)


def interpolate(knots: tuple[int, ...], values: list[float], at: int) -> float:
    """Linear between the knots, constant beyond the first and the last."""
    if at <= knots[0]:
        return values[0]
    right = next(i for i, knot in enumerate(knots) if knot >= at)
    left = right - 1
    share = (at - knots[left]) / (knots[right] - knots[left])
    return values[left] + share * (values[right] - values[left])


def at_least(name: str, value: int) -> None:
    """Raise `ConfigError` for a number below 1."""
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: must be a whole number >= 1")
