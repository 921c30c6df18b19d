"""Class rows of the vision tower at O(N) cost, whatever attention implementation runs.

Two hooks per layer keep the class token's query and the keys as the host projects them; one
softmax row per head follows. No attention map is ever formed, and the host's attention is left
as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.errors import TapError, UnsupportedMethodError
from vistoken.models.llava import LanguageHost
from vistoken.spec import class_path, lookup


@dataclass(frozen=True)
class Row:
    """The class token of one layer.

    Attributes:
        logits: scores of every patch before the softmax, per head, fp32 `[P, H, N]`.
        attention: attention paid to every patch, averaged over heads, fp32 `[P, N]`; the class
            token's own share is left out, not redistributed.
        keys: mean of the heads' keys, fp32 `[P, N, d]`.
    """

    logits: Tensor
    attention: Tensor
    keys: Tensor

    def part(self, start: int, count: int) -> Row:
        """The partitions of one image."""
        stop = start + count
        return Row(self.logits[start:stop], self.attention[start:stop], self.keys[start:stop])


@dataclass
class RowReader:
    """Reads class rows at some layers of a tower while it runs; one call at a time.

    Args:
        layers: indices of the tower's blocks.
        watched: blocks whose output is kept as well.
    """

    layers: tuple[int, ...]
    watched: tuple[int, ...] = ()
    handles: list[Any] = field(default_factory=list)
    queries: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def attach(self, host: LanguageHost) -> None:
        """Install the hooks."""
        for layer in self.layers:
            attn = lookup(host.blocks[layer], "self_attn")
            assert isinstance(attn, nn.Module)
            self.handles += [
                attn.q_proj.register_forward_hook(_Query(self, layer)),  # type: ignore[union-attr, operator]
                attn.k_proj.register_forward_hook(_Key(self, layer, attn)),  # type: ignore[union-attr, operator]
            ]
        for layer in self.watched:
            self.handles.append(host.blocks[layer].register_forward_hook(_Output(self, layer)))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def remove(self) -> None:
        """As a handle: `detach`."""
        self.detach()

    def take(self) -> dict[int, Row]:
        """The rows of the tower's last call, once.

        Raises:
            TapError: a layer was not seen.
        """
        rows, self.rows, self.queries = self.rows, {}, {}
        missing = sorted(set(self.layers) - set(rows))
        if missing:
            raise TapError(f"the vision tower did not run layers {missing}; nothing to score by")
        return rows

    def take_outputs(self) -> dict[int, Tensor]:
        """What the watched blocks returned in the tower's last call, once `[P, N, C]`."""
        outputs, self.outputs = self.outputs, {}
        return outputs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "queries": {}, "rows": {}, "outputs": {}}


@dataclass
class _Query:
    """Forward hook of a query projection: keeps the class token's query."""

    reader: RowReader
    layer: int

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.reader.queries[self.layer] = out[:, :1].detach()


@dataclass
class _Key:
    """Forward hook of a key projection: the row, from the query kept before."""

    reader: RowReader
    layer: int
    attn: nn.Module

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        query = self.reader.queries.pop(self.layer, None)
        if query is None:
            raise TapError(f"{class_path(type(self.attn))} projects keys before queries")
        heads: Any = self.attn.num_heads
        scale: Any = getattr(self.attn, "scale", (out.shape[-1] // heads) ** -0.5)
        with torch.no_grad():
            q = query.float().unflatten(-1, (heads, -1))[:, 0]
            k = out.detach().float().unflatten(-1, (heads, -1))
            logits = torch.einsum("phd,pnhd->phn", q, k) * scale
            attention = logits.softmax(-1).mean(1)[:, 1:]
            self.reader.rows[self.layer] = Row(logits[:, :, 1:], attention, k[:, 1:].mean(2))


@dataclass
class _Output:
    """Forward hook of a block: keeps its patch tokens."""

    reader: RowReader
    layer: int

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        self.reader.outputs[self.layer] = hidden[:, 1:].detach()


def check_rows(host: LanguageHost, layers: tuple[int, ...], name: str) -> None:
    """Raise `UnsupportedMethodError` if this model cannot give class rows at these layers."""
    if not host.class_token:
        raise UnsupportedMethodError(
            f"{name} ranks image tokens by the class token's attention, but the vision tower of "
            f"this {host.spec.family} has no class token in line with them; methods that need "
            "none: random_tokens, pool_tokens, max_min, globalcom2:score=distance"
        )
    for layer in layers:
        if not 0 <= layer < len(host.blocks):
            raise UnsupportedMethodError(
                f"{name} reads layer {layer}, but the vision tower has {len(host.blocks)}"
            )
        attn = host.blocks[layer]
        parts = (lookup(attn, "self_attn.q_proj"), lookup(attn, "self_attn.k_proj"))
        if not all(isinstance(part, nn.Module) for part in parts):
            raise UnsupportedMethodError(
                f"{class_path(type(attn))} has no separate query and key projections to read"
            )
