"""What a method may know about a model before it runs: lengths and costs, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BlockCost:
    """Multiply-accumulates of one block.

    Attributes:
        attn_linear: per token in the attention branch's linear layers (`4 C^2` in a plain ViT).
        attn_width: heads times head width; scores and weighted sum cost `2 N^2 attn_width`.
        mlp_linear: per token in the MLP branch's linear layers (`8 C^2` in a plain ViT).
    """

    attn_linear: int
    attn_width: int
    mlp_linear: int


@dataclass(frozen=True)
class ModelShape:
    """Lengths and costs of a vision transformer at one image size.

    Attributes:
        grid: rows and columns of patches, (h, w).
        prefix: prefix tokens (class, distillation, registers), always the first tokens.
        cls: how many of the prefix tokens are class or distillation tokens; they come first.
        width: channels C.
        blocks: cost of each block; its length is the depth.
        stem: multiply-accumulates of the patch embedding per token.
        head: multiply-accumulates of the classifier, once per image.
        pool: what the head reads: `token`, `avg`, `map`, `max` or `none`.
    """

    grid: tuple[int, int]
    prefix: int
    cls: int
    width: int
    blocks: tuple[BlockCost, ...]
    stem: int
    head: int
    pool: str = "token"

    @property
    def depth(self) -> int:
        """Number of blocks L."""
        return len(self.blocks)

    @property
    def patches(self) -> int:
        """Patch tokens M0 that enter block 0."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens N0 that enter block 0, prefix included."""
        return self.prefix + self.patches

    def at(self, grid: tuple[int, int]) -> ModelShape:
        """The same model on another patch grid."""
        return replace(self, grid=grid)

    @staticmethod
    def plain(
        width: int,
        depth: int,
        grid: tuple[int, int] = (14, 14),
        *,
        patch: int = 16,
        prefix: int = 1,
        classes: int = 1000,
        mlp_ratio: float = 4.0,
        pool: str = "token",
    ) -> ModelShape:
        """A plain ViT by its published numbers, without building it."""
        cost = BlockCost(4 * width * width, width, int(2 * mlp_ratio * width * width))
        return ModelShape(
            grid=grid,
            prefix=prefix,
            cls=min(prefix, 2),
            width=width,
            blocks=(cost,) * depth,
            stem=3 * patch * patch * width,
            head=classes * width,
            pool=pool,
        )
