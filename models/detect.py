"""Finding the vision transformer in a model, its family, and its lengths and costs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vistoken.errors import UnsupportedBackboneError
from vistoken.models import hf_vision, open_clip_vit, timm_vit
from vistoken.shape import BlockCost, ModelShape
from vistoken.spec import BlockSpec, class_path, lookup

ROWS: tuple[BlockSpec, ...] = (*timm_vit.ROWS, *open_clip_vit.ROWS, *hf_vision.ROWS)
"""Every family that can be carried."""

SUPPORTED = ", ".join(dict.fromkeys(row.family for row in ROWS))


@dataclass(frozen=True)
class Backbone:
    """A vision transformer found in a model.

    Attributes:
        spec: its family's row.
        host: the module that owns the blocks.
        path: name of the host inside the model, empty for the model itself.
        blocks: the blocks in order.
        shape: lengths and costs at its default image size.
    """

    spec: BlockSpec
    host: nn.Module
    path: str
    blocks: list[nn.Module]
    shape: ModelShape


def find(model: nn.Module) -> Backbone:
    """The one vision transformer in a model.

    Raises:
        UnsupportedBackboneError: none or several are found, or the one found cannot be carried; the
            message says what was looked for and what is there.
    """
    names = {host for row in ROWS for host in row.hosts}
    found = [
        (path, module)
        for path, module in model.named_modules()
        if any(class_path(base) in names for base in type(module).__mro__)
    ]
    outer = [
        (path, module)
        for path, module in found
        if not any(path != p and path.startswith(p + "." if p else "") for p, _ in found)
    ]
    if len(outer) != 1:
        there = [f"{path or 'the model'} ({class_path(type(m))})" for path, m in outer]
        raise UnsupportedBackboneError(
            f"{class_path(type(model))}: looked for one vision transformer of the families "
            f"{SUPPORTED}; found {', '.join(there) if there else 'none among its modules'}"
            + ("; wrap one of them" if there else "")
        )
    path, host = outer[0]
    spec, blocks = _row(host)
    for block in blocks:
        attn = lookup(block, spec.attn)
        assert isinstance(attn, nn.Module)
        reason = spec.refuse(host, attn)
        if reason is not None:
            raise UnsupportedBackboneError(f"{class_path(type(host))} ({spec.family}): {reason}")
    return Backbone(spec, host, path, blocks, shape_of(model, host, spec, blocks))


def _row(host: nn.Module) -> tuple[BlockSpec, list[nn.Module]]:
    """The row whose host and block classes fit, and the blocks."""
    bases = {class_path(base) for base in type(host).__mro__}
    rows = [row for row in ROWS if bases & set(row.hosts)]
    owner = lookup(host, rows[0].blocks)
    blocks = list(owner.children()) if isinstance(owner, nn.Module) else []
    kinds = {_known_type(block, rows) for block in blocks}
    fits = [row for row in rows if kinds and kinds <= set(row.block_types)]
    there = sorted({class_path(type(block)) for block in blocks})
    if not fits:
        wanted = sorted({kind for row in rows for kind in row.block_types})
        raise UnsupportedBackboneError(
            f"{class_path(type(host))}: looked for blocks of {', '.join(wanted)} at "
            f"'{rows[0].blocks}'; found {', '.join(there) or 'none'}"
        )
    spec = fits[0]
    parts = (spec.enter, spec.attn, spec.branch_in, spec.branch_out)
    for index, block in enumerate(blocks):
        for part in parts:
            if not isinstance(lookup(block, part), nn.Module):
                raise UnsupportedBackboneError(
                    f"{class_path(type(host))} ({spec.family}): looked for module '{part}' in "
                    f"block {index}; found {sorted(name for name, _ in block.named_children())}"
                )
    for part in filter(None, (spec.patch, spec.exit)):
        if not isinstance(lookup(host, part), nn.Module):
            raise UnsupportedBackboneError(
                f"{class_path(type(host))} ({spec.family}): looked for module '{part}'; found "
                f"{sorted(name for name, _ in host.named_children())}"
            )
    return spec, blocks


def _known_type(block: nn.Module, rows: list[BlockSpec]) -> str | None:
    """The known class whose forward this block runs, or None."""
    known = {kind for row in rows for kind in row.block_types}
    for base in type(block).__mro__:
        if class_path(base) in known:
            return class_path(base)
        if "forward" in vars(base):
            return None
    return None


def shape_of(
    model: nn.Module, host: nn.Module, spec: BlockSpec, blocks: list[nn.Module]
) -> ModelShape:
    """Lengths and costs of a host at its default image size."""
    cls = sum(_token_count(host, path) for path in spec.class_tokens)
    prefix = cls + sum(_token_count(host, path) for path in spec.registers)
    declared = getattr(host, "num_prefix_tokens", prefix)
    if declared != prefix:
        raise UnsupportedBackboneError(
            f"{class_path(type(host))}: it declares {declared} prefix tokens, {prefix} were found "
            f"in {', '.join(spec.class_tokens + spec.registers)}"
        )
    conv = lookup(host, spec.patch)
    assert isinstance(conv, nn.Module)
    # A convolutional stem may end in the right width already and have no projection.
    weight = getattr(conv, "weight", None)
    costs = tuple(_cost(block, spec) for block in blocks)
    return ModelShape(
        grid=grid_at(host, spec, None),
        prefix=prefix,
        cls=cls,
        width=int(getattr(host, "embed_dim", 0) if weight is None else weight.shape[0]),
        blocks=costs,
        stem=0 if weight is None else weight.numel(),
        head=_head(model, host),
        pool=_pool_kind(host),
    )


def grid_at(
    host: nn.Module, spec: BlockSpec, image_size: int | tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns of patches at an image size, or at the host's default.

    Raises:
        UnsupportedBackboneError: the host has no default and none was given.
    """
    if image_size is None:
        for path in ("patch_embed.grid_size", "grid_size"):
            known = lookup(host, path)
            if known is not None:
                return tuple(known)  # type: ignore[arg-type, return-value]
        image_size = lookup(host, "config.image_size")  # type: ignore[assignment]
    if image_size is None:
        raise UnsupportedBackboneError(
            f"{class_path(type(host))} has no default image size; build it with img_size=..."
        )
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    dynamic = lookup(host, "patch_embed.dynamic_feat_size")
    if callable(dynamic):
        rows, cols = dynamic(size)
        return int(rows), int(cols)
    conv = lookup(host, spec.patch)
    assert isinstance(conv, nn.Conv2d)
    kernel, stride = conv.kernel_size, conv.stride
    rows, cols = ((s - k) // t + 1 for s, k, t in zip(size, kernel, stride, strict=True))
    return rows, cols


def _token_count(host: nn.Module, path: str) -> int:
    """Tokens that a prefix parameter holds: `[C]` one, `[1, n, C]` n."""
    token = lookup(host, path)
    if not isinstance(token, Tensor):
        return 0
    return 1 if token.dim() == 1 else token.shape[-2]


def _cost(block: nn.Module, spec: BlockSpec) -> BlockCost:
    """Multiply-accumulates of one block from the shapes of its weights."""

    def linear(path: str) -> int:
        part = lookup(block, path)
        assert isinstance(part, nn.Module)
        return sum(p.numel() for p in part.parameters() if p.dim() == 2)

    attn = lookup(block, spec.attn)
    width = getattr(attn, "attn_dim", None) or getattr(attn, "embed_dim", None)
    if width is None:
        names = ("proj", "out_proj", "o_proj", "output.dense")
        outputs = [lookup(block, f"{spec.attn}.{name}") for name in names]
        width = next(m.in_features for m in outputs if isinstance(m, nn.Linear))
    mlp = linear("mlp") if isinstance(lookup(block, "mlp"), nn.Module) else 0
    return BlockCost(linear(spec.attn), int(width), mlp)


def _head(model: nn.Module, host: nn.Module) -> int:
    """Multiply-accumulates of the classifiers, once per image."""
    names = ("head", "head_dist", "classifier", "cls_classifier", "distillation_classifier")
    found = {lookup(owner, name) for owner in (model, host) for name in names}
    return sum(m.weight.numel() for m in found if isinstance(m, nn.Linear))


def _pool_kind(host: nn.Module) -> str:
    """What the head reads, in ModelShape's words."""
    if getattr(host, "attn_pool", None) is not None:
        return "map"
    kind = str(getattr(host, "global_pool", getattr(host, "pool_type", "token")))
    return {"tok": "token", "": "none"}.get(kind, kind)
