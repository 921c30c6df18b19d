"""The tap of sparse attention: a block's fused attention call runs the method's instead."""

from __future__ import annotations

from torch import Tensor

from vistoken.errors import TapError
from vistoken.methods.sparse import SparseAttention
from vistoken.tap import Tap


class SparseTap(Tap):
    """Replaces the attention call of one block.

    Args:
        method: the sparse attention.
        block: index of the block.
        grid: rows and columns of the patches in this forward pass.
    """

    def __init__(self, method: SparseAttention, block: int, grid: tuple[int, int]) -> None:
        super().__init__(lambda key: None, None, lambda: None)
        self.method = method
        self.block = block
        self.grid = grid

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Sparse attention of q, k, v `[B, H, N, D]`.

        Raises:
            TapError: the host asks for a mask, causal attention or dropout of attention weights.
        """
        self.calls += 1
        wish = None
        if attn_mask is not None:
            wish = "hands it an attention mask; call the model without one"
        elif is_causal:
            wish = "asks for causal attention"
        elif dropout_p > 0.0:
            wish = "drops attention weights while training; set attn_drop (attention_dropout) to 0"
        if wish is not None:
            raise TapError(
                f"{self.method.name} replaces attention in block {self.block}, but the model {wish}"
            )
        return self.method.attend(query, key, value, self.grid, self.block, scale)
