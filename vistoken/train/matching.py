"""Learned matching features (DTEM, Lee and Hong, NeurIPS 2024): a projection used only to match.

The merge in the forward pass is the hard one that inference makes; backwards a source divides
softly over its few best partners, and by them the projection learns who should have been first.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vistoken.errors import ConfigError
from vistoken.kernels.match import unit
from vistoken.methods.features import MatchingFeatures
from vistoken.train.rates import Rates


class Matching(nn.Module):
    """One linear projection of the residual stream for every learned block.

    Args:
        rates: the counts learned beside it.
        width: channels of the features.
        partners: partners that share the gradient of a source.
        temperature: of the softmax over their cosines.
    """

    def __init__(
        self, rates: Rates, width: int = 64, partners: int = 4, temperature: float = 0.1
    ) -> None:
        super().__init__()
        shape = rates.shape
        if not 1 <= width <= shape.width:
            raise ConfigError(f"width={width}: must be in 1..{shape.width}, the model's channels")
        if not 1 <= partners < shape.patches or temperature <= 0:
            raise ConfigError(
                f"partners={partners}, temperature={temperature}: must be in "
                f"1..{shape.patches - 1} and larger than 0"
            )
        self.partners, self.temperature = partners, temperature
        self.blocks = rates.blocks
        # Orthogonal rows keep cosines as well as a projection can.
        start = [nn.init.orthogonal_(torch.empty(width, shape.width)).T for _ in rates.blocks]
        self.weight = nn.Parameter(torch.stack(start).contiguous())

    def forward(self, x: Tensor, place: int) -> Tensor:
        """Features `[B, N, width]` of tokens x `[B, N, C]` in the learned block number `place`."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return unit(x) @ self.weight[place].to(wide)

    def cosine(self, metric: Tensor, partners: Tensor) -> Tensor:
        """Cosine `[B, N, K]` of every token's features with those of its partners."""
        metric = unit(metric)
        batch, tokens, count = partners.shape
        there = partners.reshape(batch, tokens * count, 1).expand(-1, -1, metric.shape[2])
        found = metric.gather(1, there).view(batch, tokens, count, -1)
        return (metric[:, :, None] * found).sum(-1)

    def features(self) -> MatchingFeatures:
        """The projections as `DiffRate(features=...)` takes them; they follow the training."""
        return MatchingFeatures(dict(zip(self.blocks, self.weight.detach(), strict=True)))

    def save(self, path: str | Path) -> None:
        """Write the projections to a file that `DiffRate(features=...)` loads."""
        from safetensors.torch import save_file

        save_file(
            {str(b): w.float().cpu().contiguous() for b, w in self.features().weights.items()}, path
        )
