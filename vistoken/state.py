"""What flows between blocks: the tokens' sizes and origins, and how one set maps to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vistoken.kernels import reduce as ops
from vistoken.kernels.chain import Rule, Slots, reduce_slots

Fill = Literal["nearest", "zeros"]


@dataclass(frozen=True)
class Assignment:
    """Where every token of a block goes: into a slot of its own, into another's, or nowhere.

    A token in `keep` opens a slot and lends it its position; a token in `src` joins the slot in
    `dst`; a token in neither is pruned. Indices only, no gradient.

    Attributes:
        keep: `[B, M]` int64, the token that opens each slot; prefix tokens open the first slots.
        src: `[B, S]` int64, tokens merged away, or None when nothing merges.
        dst: `[B, S]` int64, the slot each of them joins.
        weight: `[B, N]` fp32 weight of every token in its slot; None weighs all alike.
        gain: `[B, S]` fp32 factor on the size that a source brings along; None is 1.
        rule: `mean` by weight, `sum` by weight, or `mlerp`: direction of the mean, length of the
            longest member (ToFu, Kim et al., WACV 2024).
    """

    keep: Tensor
    src: Tensor | None = None
    dst: Tensor | None = None
    weight: Tensor | None = None
    gain: Tensor | None = None
    rule: Rule = "mean"

    @property
    def num_out(self) -> int:
        """Slots M."""
        return self.keep.shape[1]

    @property
    def slots(self) -> Slots:
        """The same, as kernels take it."""
        return Slots(self.keep, self.src, self.dst, self.weight, self.gain, self.rule)

    def reduce(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to slots `[B, M, C]`."""
        return reduce_slots(x, self.slots)

    def select(self, x: Tensor) -> Tensor:
        """Of any per-token tensor `[B, N]` or `[B, N, C]` the entries of the kept tokens."""
        return ops.take(x, self.keep)

    def sizes(self, size: Tensor) -> Tensor:
        """Sizes `[B, N]` to the sizes of the slots `[B, M]`, fp32."""
        kept = ops.take(size, self.keep)
        if self.src is None or self.dst is None:
            return kept
        joined = ops.take(size, self.src)
        if self.gain is not None:
            joined = joined * self.gain
        return ops.add_into(kept, self.dst, joined)

    def parent(self, tokens: int) -> Tensor:
        """Slot of every token, `[B, N]` int64; -1 for pruned tokens."""
        out = self.keep.new_full((self.keep.shape[0], tokens), -1)
        slots = torch.arange(self.num_out, device=out.device).expand_as(self.keep)
        out = out.scatter(1, self.keep, slots)
        if self.src is not None and self.dst is not None:
            out = out.scatter(1, self.src, self.dst)
        return out


class TokenState:
    """The tokens that enter a block.

    Attributes:
        tokens: N, Python int.
        prefix: prefix tokens P.
        grid: rows and columns of the original patches.
        size: `[B, N]` fp32, patches that each token stands for; None while all are 1.
    """

    def __init__(
        self, tokens: int, prefix: int, grid: tuple[int, int], size: Tensor | None = None
    ) -> None:
        self.tokens = tokens
        self.prefix = prefix
        self.grid = grid
        self.size = size
        self._before: TokenState | None = None
        self._keep: Tensor | None = None
        self._origin: Tensor | None = None

    @property
    def reduced(self) -> bool:
        """Whether any token is gone."""
        return self._keep is not None

    @property
    def origin(self) -> Tensor | None:
        """Original token that lends each token its position, `[B, N]` int64; None if not reduced.

        Found on demand: most models never ask.
        """
        if self._origin is None and self._keep is not None and self._before is not None:
            before = self._before.origin
            self._origin = self._keep if before is None else ops.take(before, self._keep)
        return self._origin

    def after(self, assignment: Assignment, size: Tensor | None = None) -> TokenState:
        """The state once `assignment` was applied; `size` if the new sizes are known already."""
        if size is None and (self.size is not None or assignment.src is not None):
            size = assignment.sizes(self.sizes(assignment.keep))
        state = TokenState(assignment.num_out, self.prefix, self.grid, size)
        state._before, state._keep = self, assignment.keep
        return state

    def sizes(self, like: Tensor) -> Tensor:
        """Sizes `[B, N]` fp32, ones if nothing was merged."""
        if self.size is not None:
            return self.size
        return torch.ones((like.shape[0], self.tokens), dtype=torch.float32, device=like.device)


@dataclass(frozen=True)
class SourceMap:
    """Which current token stands for every original token.

    Attributes:
        parent: `[B, N0]` int64, -1 for pruned tokens.
        origin: `[B, N]` int64, original token that lends each current token its position.
        prefix: prefix tokens.
        grid: rows and columns of the original patches.
    """

    parent: Tensor
    origin: Tensor
    prefix: int
    grid: tuple[int, int]

    @staticmethod
    def compose(assignments: Sequence[Assignment], start: TokenState, like: Tensor) -> SourceMap:
        """The map over several assignments in order; `like` gives batch size and device."""
        batch, device = like.shape[0], like.device
        parent = torch.arange(start.tokens, device=device).expand(batch, -1)
        origin, tokens = parent, start.tokens
        for assignment in assignments:
            step = assignment.parent(tokens)
            parent = torch.where(parent < 0, parent, step.gather(1, parent.clamp_min(0)))
            origin, tokens = assignment.select(origin), assignment.num_out
        return SourceMap(parent, origin, start.prefix, start.grid)

    def expand(self, y: Tensor, fill: Fill = "nearest") -> Tensor:
        """Current tokens `[B, N, C]` back to one per original token, `[B, N0, C]`.

        Args:
            y: values of the current tokens.
            fill: what pruned cells get: the value of the kept token nearest on the grid, or zeros.
        """
        index = self.filled() if fill == "nearest" else self.parent.clamp_min(0)
        out = ops.take(y, index)
        if fill == "zeros":
            out = torch.where((self.parent < 0)[..., None], torch.zeros_like(out), out)
        return out

    def filled(self) -> Tensor:
        """`parent` with every pruned cell given to the kept patch token nearest on the grid."""
        columns = self.grid[1]
        cells = torch.arange(self.parent.shape[1] - self.prefix, device=self.parent.device)
        kept = self.origin[:, self.prefix :] - self.prefix
        rows = cells[:, None] // columns - (kept // columns)[:, None]
        cols = cells[:, None] % columns - (kept % columns)[:, None]
        nearest = (rows * rows + cols * cols).argmin(-1) + self.prefix
        nearest = torch.cat([self.parent[:, : self.prefix], nearest], 1)
        return torch.where(self.parent < 0, nearest, self.parent)


class Address:
    """Where a tensor lies: no reference to it, yet never mistaken for one in memory used again."""

    def __init__(self, x: Tensor) -> None:
        self.storage = StorageWeakRef(x.untyped_storage())
        self.place = x.data_ptr(), tuple(x.shape)

    def holds(self, x: Tensor) -> bool:
        """Whether x is that tensor, or shares its memory and shape."""
        return self.place == (x.data_ptr(), tuple(x.shape)) and not self.storage.expired()


class Frame:
    """Everything one forward pass leaves behind for later blocks, dense outputs and recomputation.

    Attributes:
        states: the tokens that enter each block; one longer than the blocks already run.
        assignments: by block, where tokens went.
        inputs: where each block's input lies, by which recomputation finds the frame.
        next: where the output of the block recomputed last lies.
        features: by block, what the tap collected.
        short: by block, the reduced residual stream while its branch runs.
        out: by block, the finished output that replaces the host's.
        whole: the block whose output goes on to the host on the full grid, or None.
        normed: a block's output, its norm made in one pass for the next block, and the version.
    """

    def __init__(self, start: TokenState, depth: int, whole: int | None = None) -> None:
        self.states: list[TokenState | None] = [start] + [None] * depth
        self.assignments: list[Assignment | None] = [None] * depth
        self.inputs: list[Address | None] = [None] * depth
        self.features: list[dict[str, Any] | None] = [None] * depth
        self.short: list[Tensor | None] = [None] * depth
        self.out: list[Tensor | None] = [None] * depth
        self.next: Address | None = None
        self.whole = whole
        self.normed: tuple[Tensor, Tensor, int] | None = None

    def state(self, block: int) -> TokenState:
        """The tokens that enter `block`."""
        state = self.states[block]
        if state is None:
            raise RuntimeError(f"block {block} ran before block {block - 1} had ended")
        return state

    @property
    def done(self) -> int:
        """Blocks that have ended so far."""
        return max(block for block, state in enumerate(self.states) if state is not None)

    def source_map(self, like: Tensor, blocks: int | None = None) -> SourceMap:
        """The map from original tokens to those that leave the first `blocks` blocks."""
        done = [a for a in self.assignments[:blocks] if a is not None]
        return SourceMap.compose(done, self.state(0), like)
