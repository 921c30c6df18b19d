"""`forward_intermediates` of a wrapped host: every intermediate comes back on the full grid."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vistoken.attach import Attachment

NAME = "forward_intermediates"


class Intermediates:
    """Stands in for one host's `forward_intermediates` (timm and open_clip share its contract).

    The host runs its own, asked for token lists; its last block returns the full grid, for its norm
    and head follow; each other intermediate is expanded with the source map of its block. All are
    then reshaped as the caller wanted.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(getattr(type(self.attachment.host), NAME))
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The host's `forward_intermediates`; same arguments, same result, full grid."""
        attachment, host = self.attachment, self.attachment.host
        original = getattr(type(host), NAME)
        call = inspect.signature(original).bind(host, *args, **kwargs)
        call.apply_defaults()
        wanted = call.arguments["output_fmt"]
        call.arguments["output_fmt"] = "NLC"
        blocks = chosen_blocks(attachment.shape.depth, call.arguments["indices"])
        stop = call.arguments.get("stop_early", False)
        attachment.raw = True
        last = attachment.shape.depth - 1
        attachment.whole = max(blocks, default=last) if stop else last
        try:
            return self.expanded(original(*call.args, **call.kwargs), blocks, wanted)
        finally:
            attachment.raw, attachment.whole = False, None
            attachment.close()

    def expanded(self, result: Any, blocks: list[int], fmt: str) -> Any:
        """The result in whichever of its forms the host returned it."""
        if isinstance(result, dict):
            patches = result["image_intermediates"]
            result["image_intermediates"] = [
                self.patches(y, block, fmt) for y, block in zip(patches, blocks, strict=True)
            ]
            features = result.get("image_features")
            if features is not None and features.dim() == 3:
                result["image_features"] = self.blanked(features)
            return result
        if isinstance(result, tuple):
            final, listed = result
            return self.blanked(final), self.expanded(listed, blocks, fmt)
        return [
            (self.patches(y[0], block, fmt), y[1])
            if isinstance(y, tuple)
            else self.patches(y, block, fmt)
            for y, block in zip(result, blocks, strict=True)
        ]

    def patches(self, y: Tensor, block: int, fmt: str) -> Tensor:
        """Patch tokens `[B, n, C]` after `block` as `[B, M0, C]` or `[B, C, h, w]`."""
        attachment = self.attachment
        prefix = attachment.shape.prefix
        blank = y.new_zeros(y.shape[0], prefix, y.shape[2])
        if block == attachment.whole:
            y = self.blanked(torch.cat([blank, y], 1))[:, prefix:]
        elif attachment.running().state(block + 1).reduced:
            y = attachment.full(torch.cat([blank, y], 1), block + 1)[:, prefix:]
        if fmt == "NLC":
            return y
        rows, cols = attachment.running().state(0).grid
        return y.reshape(y.shape[0], rows, cols, -1).permute(0, 3, 1, 2).contiguous()

    def blanked(self, y: Tensor) -> Tensor:
        """The last block's tokens `[B, N0, C]` with zeros where a norm left its bias."""
        attachment = self.attachment
        assert attachment.whole is not None
        end = attachment.whole + 1
        if attachment.fill != "zeros" or not attachment.running().state(end).reduced:
            return y
        return y.masked_fill((attachment.source_map(y, end).parent < 0)[..., None], 0.0)


def chosen_blocks(depth: int, indices: int | list[int] | tuple[int, ...] | None) -> list[int]:
    """Blocks that `indices` means: all, the last n, or a list (negatives count from the end)."""
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        return list(range(depth - indices, depth))
    return sorted({index % depth for index in indices})


def install(attachment: Attachment) -> None:
    """Put the stand-in on a host that has `forward_intermediates`."""
    host = attachment.host
    if hasattr(type(host), NAME):
        host.__dict__[NAME] = Intermediates(attachment)


def uninstall(host: nn.Module) -> None:
    """Take it off again."""
    host.__dict__.pop(NAME, None)
