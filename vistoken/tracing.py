"""Recording what a method did: counts, indices, sizes and source maps per block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistoken.schedule import Step
from vistoken.state import Assignment, Frame, SourceMap, TokenState


@dataclass(frozen=True)
class BlockTrace:
    """One block of one traced forward pass.

    Attributes:
        block: index of the block.
        tokens: tokens that leave it, prefix included.
        assignment: where its tokens went; None when it kept all.
        source_map: which token stands for every original token after this block.
        size: `[B, N]` fp32 patches that each token stands for.
    """

    block: int
    tokens: int
    assignment: Assignment | None
    source_map: SourceMap
    size: Tensor

    @property
    def kept(self) -> Tensor:
        """Original tokens that still lend a token its position, `[B, N]`."""
        return self.source_map.origin

    @property
    def pruned(self) -> Tensor:
        """Mask of original tokens that are gone, `[B, N0]` bool."""
        return self.source_map.parent < 0

    @property
    def merged(self) -> Tensor:
        """Mask of original tokens that live on in another token, `[B, N0]` bool."""
        parent, origin = self.source_map.parent, self.source_map.origin
        cells = torch.arange(parent.shape[1], device=parent.device)
        return (parent >= 0) & (origin.gather(1, parent.clamp_min(0)) != cells)


class Trace:
    """What the last forward pass inside `vistoken.trace` did, block by block."""

    def __init__(self) -> None:
        self.blocks: list[BlockTrace] = []
        self._frame: Frame | None = None
        self._like: Tensor | None = None

    def start(self, frame: Frame, x: Tensor) -> None:
        """A new forward pass begins with tokens x `[B, N0, C]`."""
        self.blocks, self._frame = [], frame
        self._like = torch.empty(x.shape[0], 0, device=x.device)

    def record(self, block: int, step: Step, frame: Frame, x: Tensor) -> None:
        """A block has ended with tokens x `[B, N, C]`."""
        if frame is not self._frame or len(self.blocks) != block:
            return
        assert self._like is not None
        state = frame.state(block + 1)
        with torch.no_grad():
            self.blocks.append(
                BlockTrace(
                    block=block,
                    tokens=x.shape[1],
                    assignment=frame.assignments[block],
                    source_map=frame.source_map(self._like, block + 1),
                    size=state.sizes(self._like),
                )
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens that leave each block, prefix included."""
        return tuple(block.tokens for block in self.blocks)

    @property
    def assignments(self) -> tuple[Assignment | None, ...]:
        """Where tokens went in each block; None where all stayed."""
        return tuple(block.assignment for block in self.blocks)

    @property
    def sizes(self) -> tuple[Tensor, ...]:
        """Token sizes after each block, `[B, N]` fp32."""
        return tuple(block.size for block in self.blocks)

    @property
    def source_map(self) -> SourceMap:
        """The map after the last block."""
        if not self.blocks:
            raise RuntimeError(
                "nothing was traced: run the model inside `with vistoken.trace(...)`"
            )
        return self.blocks[-1].source_map

    @property
    def start_state(self) -> TokenState:
        """The tokens that entered block 0."""
        if self._frame is None:
            raise RuntimeError(
                "nothing was traced: run the model inside `with vistoken.trace(...)`"
            )
        return self._frame.state(0)
