"""wrap, unwrap, info, trace, flops: everything a user calls on a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import nn

from vistoken import dense, fast
from vistoken.attach import Attachment
from vistoken.errors import (
    AlreadyWrappedError,
    ConfigError,
    NotWrappedError,
    UnsupportedBackboneError,
    UnsupportedMethodError,
)
from vistoken.flops import count_macs
from vistoken.hooks import attach, detach
from vistoken.methods import HostedAttachment, HostedMethod, parse
from vistoken.methods.base import Method, Need
from vistoken.methods.sparse import SparseAttention
from vistoken.models.detect import Backbone, find, grid_at
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape
from vistoken.spec import class_path
from vistoken.state import Fill
from vistoken.tracing import Trace

M = TypeVar("M", bound=nn.Module)
KEY = "_vistoken"
"""Attribute of a wrapped model that holds its attachment."""


def wrap(model: M, method: Method | HostedMethod | str, *, fill: Fill = "nearest") -> M:
    """Make a vision model run with fewer tokens, in place.

    Class, parameters, `state_dict` keys and call stay as they are; `unwrap` undoes it exactly. Wrap
    before `torch.compile`, `DistributedDataParallel` or FSDP.

    Args:
        model: a model of timm, open_clip or transformers that contains one supported vision
            transformer, or that transformer itself; for methods that cut image tokens in front of
            a language model, the transformers model with `generate`.
        method: a method's settings, or its command-line form such as `"tome:r=13"`.
        fill: what pruned cells get in dense outputs: the value of the kept token `nearest` on the
            patch grid, or `zeros`.

    Returns:
        The same object.

    Raises:
        ConfigError: `method` or `fill` is not what it should be.
        AlreadyWrappedError: the model, or a part of it, is wrapped already.
        UnsupportedBackboneError: no supported vision transformer is in the model.
        UnsupportedMethodError: the model lacks what the method reads.
        ScheduleError: the method's counts do not fit the model.
    """
    method = parse(method) if isinstance(method, str) else method
    if not isinstance(method, (Method, HostedMethod)):
        raise ConfigError(
            f"method={method!r}: must be a vistoken method or a string such as 'tome:r=13'"
        )
    if fill not in get_args(Fill):
        raise ConfigError(f"fill={fill!r}: must be one of {get_args(Fill)}")
    _check_model(model)
    if not isinstance(method, Method):
        model.__dict__[KEY] = method.attach_to(model)
        return model
    backbone = find(model)
    check_method(backbone, method)
    attachment = Attachment(
        backbone.spec,
        method,
        backbone.shape,
        backbone.host,
        backbone.blocks,
        fill,
    )
    attach(attachment)
    fast.bind(attachment)
    dense.install(attachment)
    model.__dict__[KEY] = attachment
    return model


def unwrap(model: M) -> M:
    """Take the method off again; the model computes exactly what it did before `wrap`.

    Raises:
        NotWrappedError: the model carries no method.
    """
    found = hosted_of(model)
    if found is not None:
        found[1].detach()
        del found[0].__dict__[KEY]
        return model
    owner, attachment = _find_attachment(model)
    detach(attachment)
    fast.unbind(attachment)
    dense.uninstall(attachment.host)
    del owner.__dict__[KEY]
    return model


@dataclass(frozen=True)
class Info:
    """What `vistoken.info` says about a wrapped model.

    Attributes:
        method: its settings in command-line form.
        family: the backbone family.
        path: name of the vision transformer inside the model, empty for the model itself.
        blocks: number of blocks.
        counts: tokens that leave each block at the default image size, prefix included.
        tokens: tokens that enter block 0.
        gflops: cost of one image, in G multiply-accumulates.
        dense_gflops: cost without the method.
        execution: which implementation runs, and why.
        sparse: blocks whose attention the method replaces.
    """

    method: str
    family: str
    path: str
    blocks: int
    counts: tuple[int, ...]
    tokens: int
    gflops: float
    dense_gflops: float
    execution: str
    sparse: tuple[int, ...] = ()

    def __str__(self) -> str:
        saved = 1 - self.gflops / self.dense_gflops
        effect = f"{self.tokens} -> {self.counts[-1]} tokens over {self.blocks} blocks"
        if self.sparse:
            which = ", ".join(map(str, self.sparse))
            effect = f"sparse attention in blocks {which} of {self.blocks}"
        return (
            f"{self.method} on {self.family}{f' at {self.path}' if self.path else ''}: {effect}, "
            f"{self.gflops:.3g} of {self.dense_gflops:.3g} GFLOPs ({saved:.0%} saved); "
            f"{self.execution}"
        )


def info(model: nn.Module) -> Any:
    """Method, family, counts, cost and execution path of a wrapped model: an `Info`.

    A vision-language model gives a `vistoken.vlm.LanguageInfo`: what was cut from each image.

    Raises:
        NotWrappedError: the model carries no method.
    """
    found = hosted_of(model)
    if found is not None:
        return found[1].describe()
    owner, attachment = _find_attachment(model)
    schedule, shape = attachment.plan(attachment.shape.grid), attachment.shape
    method = attachment.method
    path = next((name for name, m in owner.named_modules() if m is attachment.host), "")
    return Info(
        method=method.to_string(),
        family=attachment.spec.family,
        path=path,
        blocks=shape.depth,
        counts=schedule.kept,
        tokens=shape.tokens,
        gflops=method.cost(shape),
        dense_gflops=count_macs(shape) / 1e9,
        execution=fast.describe(attachment),
        sparse=method.replaced(shape.depth) if isinstance(method, SparseAttention) else (),
    )


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Record counts, indices, sizes and source maps of the forward passes inside the block.

    The trace holds the last forward pass; nothing is recorded outside.

    Raises:
        NotWrappedError: the model carries no method.
    """
    _, attachment = _find_attachment(model)
    record = Trace()
    before, attachment.tracer = attachment.tracer, record
    try:
        yield record
    finally:
        attachment.tracer = before


def flops(
    model: nn.Module,
    method: Method | str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> float:
    """Cost of one image in G multiply-accumulates, the papers' convention.

    Args:
        model: a supported model, wrapped or not, or one of `vistoken.models` that counts itself.
        method: the method to count with; None counts the one the model is wrapped with, or the
            dense model.
        image_size: side, or (height, width), in pixels; None is the model's default.

    Raises:
        UnsupportedBackboneError: no supported vision transformer is in the model.
    """
    own = getattr(model, "macs", None)
    if callable(own) and method is None:
        return float(own(image_size)) / 1e9
    backbone = find(model)
    shape = backbone.shape.at(grid_at(backbone.host, backbone.spec, image_size))
    if method is None:
        attachment = attachment_of(model)
        if attachment is None:
            return count_macs(shape) / 1e9
        method = attachment.method
    method = parse(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise ConfigError(f"{method!r} cuts prompts, not the tower: its cost depends on the text")
    return method.cost(shape)


def schedule_of(model: nn.Module) -> Schedule:
    """The token counts of a wrapped model at its default image size."""
    _, attachment = _find_attachment(model)
    return attachment.plan(attachment.shape.grid)


def shape_of(model: nn.Module) -> ModelShape:
    """Lengths and costs of the vision transformer in a model.

    Raises:
        UnsupportedBackboneError: no supported vision transformer is in the model.
    """
    return find(model).shape


def hosted_of(model: nn.Module) -> tuple[nn.Module, HostedAttachment] | None:
    """The module that carries a method of its own making, and that method's attachment."""
    for module in model.modules():
        found = module.__dict__.get(KEY)
        if found is not None and not isinstance(found, Attachment):
            return module, found
    return None


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a wrapped model or of a part of it, or None."""
    for module in model.modules():
        found = module.__dict__.get(KEY)
        if isinstance(found, Attachment):
            return found
    return None


def check_method(backbone: Backbone, method: Method) -> None:
    """Raise `UnsupportedMethodError` if the model lacks what the method reads."""
    if Need.CLASS_ROW in method.needs and backbone.shape.cls == 0:
        raise UnsupportedMethodError(
            f"{method.name} ranks tokens by the class token's attention, but "
            f"{class_path(type(backbone.host))} has no class token; methods that need none: tome, "
            "tofu, mctf, zero_tprune, random, pool"
        )
    for part in ("patch_drop", "patch_dropout"):
        drops = not isinstance(getattr(backbone.host, part, None), nn.Identity | None)
        if drops and isinstance(method, SparseAttention):
            raise UnsupportedMethodError(
                f"{method.name} needs the whole patch grid, but {class_path(type(backbone.host))} "
                f"drops patches in training ('{part}'); build it with a patch dropout of 0"
            )


def _check_model(model: nn.Module) -> None:
    """Raise for objects that cannot be wrapped at all."""
    if not isinstance(model, nn.Module):
        raise UnsupportedBackboneError(f"model={type(model).__name__}: must be a torch.nn.Module")
    if isinstance(model, nn.DataParallel):
        raise UnsupportedBackboneError(
            "nn.DataParallel shares Python state between threads; use DistributedDataParallel"
        )
    compiled = any(m._compiled_call_impl is not None for m in model.modules())
    scripted = isinstance(model, torch.jit.ScriptModule)
    if compiled or scripted or type(model).__name__ == "OptimizedModule":
        raise UnsupportedBackboneError(
            f"{type(model).__name__} is compiled already; wrap the model first, then compile it"
        )
    hosted = hosted_of(model)
    found = attachment_of(model) if hosted is None else hosted[1]
    if found is not None:
        raise AlreadyWrappedError(
            f"the model carries {found.method.to_string()} already; vistoken.unwrap(model) first"
        )
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__ == "vistoken.hooks":
                raise AlreadyWrappedError(
                    "this part belongs to a larger model that is wrapped already; unwrap that first"
                )


def _find_attachment(model: nn.Module) -> tuple[nn.Module, Attachment]:
    """The module that carries the attachment, and the attachment."""
    for module in model.modules():
        found = module.__dict__.get(KEY)
        if isinstance(found, Attachment):
            return module, found
    hosted = hosted_of(model)
    if hosted is not None:
        raise NotWrappedError(
            f"{hosted[1].method.to_string()} cuts prompts, not the tower's tokens; "
            "vistoken.info(model) says what it did"
        )
    raise NotWrappedError(f"{class_path(type(model))} carries no vistoken method")
