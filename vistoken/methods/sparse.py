"""Methods that keep every token and replace attention in chosen blocks by a sparse one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.errors import ScheduleError
from vistoken.flops import count_macs, softmax_attention
from vistoken.kernels.dispatch import autocasts
from vistoken.methods.base import Method, as_blocks, require
from vistoken.schedule import Schedule
from vistoken.shape import ModelShape


@dataclass(frozen=True)
class SparseAttention(Method):
    """Base of sparse attention inside a vision transformer that was trained with dense attention.

    Patch tokens attend to a few patches, and to all prefix tokens (class, distillation, registers)
    in the same softmax; prefix tokens attend to everything. Projections, norms, rotary embedding
    and every other block stay the host's own.

    A subclass says which patches: `attend_grid`, `pairs` and `fits`.

    Args:
        blocks: blocks that get sparse attention, 0 is the first; None is all of them.
    """

    where: ClassVar[Literal["block"]] = "block"

    blocks: int | Sequence[int] | None = dataclasses.field(default=None, kw_only=True)

    def check(self) -> None:
        """Normalise the blocks."""
        if isinstance(self.blocks, range):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.blocks is not None:
            as_blocks(self, "blocks")
        require(self, "round_to", self.round_to == 1, "1, for no token is removed")

    def replaced(self, depth: int) -> tuple[int, ...]:
        """Blocks with sparse attention in a model of `depth` blocks."""
        if self.blocks is None:
            return tuple(range(depth))
        assert isinstance(self.blocks, tuple)
        return self.blocks

    def counts(self, shape: ModelShape) -> Schedule:
        """All tokens in every block.

        Raises:
            ScheduleError: a block that the model does not have, or a grid that does not fit.
        """
        missing = [block for block in self.replaced(shape.depth) if block >= shape.depth]
        if missing:
            raise ScheduleError(
                f"{self.name}: blocks={missing} do not exist, the model has {shape.depth} blocks, "
                f"0 to {shape.depth - 1}"
            )
        for block in self.replaced(shape.depth):
            self.fits(shape.grid, block)
        return Schedule(shape.tokens, shape.prefix, ((shape.tokens,) * 2,) * shape.depth)

    def fits(self, grid: tuple[int, int], block: int) -> None:
        """Raise `ScheduleError` if a block cannot attend on a grid of (rows, columns)."""
        raise NotImplementedError

    def pairs(self, grid: tuple[int, int], block: int) -> int:
        """Patch-to-patch scores of one image and head in a block."""
        raise NotImplementedError

    def attend_grid(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: tuple[Tensor, Tensor] | None,
        block: int,
        scale: float | None,
    ) -> Tensor:
        """Sparse attention of one block's patches.

        Args:
            q: queries `[B, rows, columns, H, D]`.
            k: keys, like q; with grouped queries with fewer heads.
            v: values, like k.
            extra: keys and values `[B, P, H, D]` that every patch attends to as well.
            block: index of the block.
            scale: factor on the scores; None is `D ** -0.5`.

        Returns:
            `[B, rows, columns, H, D]`.
        """
        raise NotImplementedError

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int],
        block: int,
        scale: float | None,
    ) -> Tensor:
        """What stands in for fused attention in a block.

        Args:
            q: queries of all tokens `[B, H, N, D]`, prefix tokens first.
            k: keys, like q; with grouped queries with fewer heads.
            v: values, like k.
            grid: rows and columns of the patches.
            block: index of the block.
            scale: factor on the scores; None is `D ** -0.5`.

        Returns:
            `[B, H, N, D]`.
        """
        q, k, v = autocast(q, k, v)
        prefix = q.shape[2] - grid[0] * grid[1]
        tokens = [t.transpose(1, 2) for t in (q, k, v)]
        inner_q, inner_k, inner_v = (t[:, prefix:].unflatten(1, grid) for t in tokens)
        extra = (tokens[1][:, :prefix], tokens[2][:, :prefix]) if prefix else None
        out = self.attend_grid(inner_q, inner_k, inner_v, extra, block, scale).flatten(1, 2)
        if prefix:
            groups = q.shape[1] != k.shape[1]
            first = F.scaled_dot_product_attention(
                q[:, :, :prefix], k, v, scale=scale, enable_gqa=groups
            )
            out = torch.cat([first.transpose(1, 2), out], 1)
        return out.transpose(1, 2)

    def cost(self, shape: ModelShape) -> float:
        """Cost of one image, in G: dense blocks, with the sparse scores where attention is sparse.

        Raises:
            ScheduleError: the method does not fit the shape.
        """
        self.plan(shape)
        total = count_macs(shape)
        for block in self.replaced(shape.depth):
            width = shape.blocks[block].attn_width
            scores = self.pairs(shape.grid, block) + shape.patches * shape.prefix
            scores += shape.prefix * shape.tokens
            total += 2.0 * scores * width - softmax_attention(shape.tokens, width)
        return total / 1e9


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the type that fused attention computes in under autocast."""
    kind = tensors[0].device.type
    if not autocasts(kind) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) for t in tensors)
