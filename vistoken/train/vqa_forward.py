"""Many questions about one picture in one pass: each sees the picture and itself alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vistoken.eval.vqa_words import BOS, ID, USER


class Pass(NamedTuple):
    """What one pass over pictures and turns gives.

    Attributes:
        logits: `[B, Q, L, words]`; place t predicts id t + 1 of its turn.
        patches: tower features that the projector reads `[B, P, N, C]`.
        pooled: class token of the tower's last layer, normalised `[B, P, C]`.
    """

    logits: Tensor
    patches: Tensor
    pooled: Tensor


class PackedTurns(nn.Module):
    """Runs a LLaVA-NeXT on pictures of one size with Q turns of L ids each behind them.

    The tower and the picture's tokens, which are most of the work, are shared by all turns; the
    mask keeps turns apart and positions start anew, so each turn is what a first turn is.

    Args:
        model: `LlavaNextForConditionalGeneration` with square 2 x 2 crops.
        compile: whether to compile the layers.
    """

    def __init__(self, model: Any, compile: bool = False) -> None:
        super().__init__()
        self.model = model
        head = torch.tensor([[ID[BOS], ID[USER]]], device=model.device)
        self.register_buffer("head", head, persistent=False)
        if compile:
            for layer in (*self.tower.encoder.layers, *model.model.language_model.layers):
                layer.compile()

    @property
    def tower(self) -> Any:
        """The CLIP tower."""
        return self.model.model.vision_tower

    def encode(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Tower features `[B, P, N, C]`, pooled class tokens `[B, P, C]` of `[B, P, 3, h, w]`."""
        tower = self.tower
        x = tower.pre_layrnorm(tower.embeddings(tiles.flatten(0, 1)))
        states = [x]
        for layer in tower.encoder.layers:
            x = layer(x, attention_mask=None)
            states.append(x)
        consumed = states[self.model.config.vision_feature_layer][:, 1:]
        pooled = tower.post_layernorm(x[:, 0])
        shape = tiles.shape[:2]
        return consumed.unflatten(0, shape), pooled.unflatten(0, shape)

    def pack(self, patches: Tensor) -> Tensor:
        """Picture tokens `[B, V, C]`: thumbnail, then the mosaic with a newline behind each row."""
        base = self.model.model
        tokens = base.multi_modal_projector(patches)
        side = int(tokens.shape[2] ** 0.5)
        grid = tokens[:, 1:].unflatten(2, (side, side)).unflatten(1, (2, 2))
        mosaic = grid.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        ends = base.image_newline.to(mosaic.dtype).expand(*mosaic.shape[:2], 1, -1)
        mosaic = torch.cat([mosaic, ends], dim=2).flatten(1, 2)
        return torch.cat([tokens[:, 0], mosaic], dim=1)

    def forward(self, tiles: Tensor, ids: Tensor) -> Pass:
        """Logits of every turn.

        Args:
            tiles: thumbnail and crops `[B, 5, 3, h, w]`.
            ids: turns `[B, Q, L]`, filled up behind their end.
        """
        patches, pooled = self.encode(tiles)
        picture = self.pack(patches)
        language = self.model.model.language_model
        head = self.head.expand(len(ids), 2)  # type: ignore[operator]
        parts = [language.embed_tokens(head), picture, language.embed_tokens(ids.flatten(1))]
        x = torch.cat([part.to(picture.dtype) for part in parts], dim=1)
        prefix = 2 + picture.shape[1]
        positions, mask = turn_mask(prefix, ids.shape[1], ids.shape[2], ids.device)
        rotary = language.rotary_emb(x, position_ids=positions)
        for layer in language.layers:
            x = layer(
                x, attention_mask=mask, position_ids=positions, position_embeddings=rotary,
                past_key_values=None, use_cache=False,
            )  # fmt: skip
        turns = language.norm(x[:, prefix:]).unflatten(1, ids.shape[1:])
        return Pass(self.model.lm_head(turns), patches, pooled)


def turn_mask(prefix: int, turns: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions `[1, T]` and who sees whom `[1, 1, T, T]`, bool."""
    at = torch.arange(prefix + turns * length, device=device)
    turn = torch.where(at < prefix, -1, (at - prefix) // length)
    positions = torch.where(at < prefix, at, prefix + (at - prefix) % length)
    together = (turn[:, None] == turn) | (turn < 0)
    return positions[None], (together & (at[:, None] >= at))[None, None]
