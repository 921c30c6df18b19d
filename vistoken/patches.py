"""Patch embedding as one matrix product, for inference on a GPU.

A convolution whose stride is its kernel reads every pixel once: unfolding the image and multiplying
is the same sum. The library's bf16 convolution with few input channels runs far below the matrix
units' speed: a quarter of a small model's time.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistoken.attach import Attachment
from vistoken.kernels.dispatch import use_triton
from vistoken.spec import class_path

CONV = "torch.nn.modules.conv.Conv2d"


def unfold_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution with stride = kernel, as a matrix product.

    Args:
        x: images `[B, C_in, H, W]`; H and W are multiples of the kernel.
        weight: `[C, C_in, p_h, p_w]`.
        bias: `[C]` or None.

    Returns:
        `[B, C, H / p_h, W / p_w]`, a view whose channels lie together: flattening and transposing
        it gives contiguous tokens without a copy.
    """
    batch, channels, height, width = x.shape
    p_h, p_w = weight.shape[2:]
    rows, cols = height // p_h, width // p_w
    patches = x.reshape(batch, channels, rows, p_h, cols, p_w).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, rows * cols, -1)
    tokens: Tensor = F.linear(patches, weight.flatten(1), bias)
    return tokens.mT.view(batch, -1, rows, cols)


def why_not(conv: Any) -> str | None:
    """The reason why a module is no convolution that unfolding replaces, or None."""
    if class_path(type(conv)) != CONV:
        return f"it is {class_path(type(conv))}"
    if not isinstance(conv.__dict__.get("forward"), FusedPatches | None):
        return "it has a forward of its own"
    if conv.stride != conv.kernel_size:
        return f"its stride {conv.stride} is not its kernel {conv.kernel_size}"
    if conv.padding not in ((0, 0), "valid") or conv.dilation != (1, 1) or conv.groups != 1:
        return "it is padded, dilated or grouped"
    return None


class FusedPatches:
    """Stands in for the `forward` of a patch convolution; falls back to its own.

    Args:
        attachment: the method on the model.
        conv: the convolution.
        tolerance: relative error to the convolution that rounding explains.
    """

    def __init__(self, attachment: Attachment, conv: nn.Conv2d, tolerance: float) -> None:
        self.attachment = attachment
        self.conv = conv
        self.tolerance = tolerance
        self.agreed: dict[tuple[torch.device, torch.dtype], bool] = {}

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.conv).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, input: Tensor) -> Tensor:
        """The convolution's forward, `[B, C_in, H, W]` to `[B, C, H / p, W / p]`."""
        if self.usable(input):
            return unfold_linear(input, self.conv.weight, self.conv.bias)
        return type(self.conv).forward(self.conv, input)

    def usable(self, x: Tensor) -> bool:
        """Whether this very call can be unfolded."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.dim() != 4:
            return False
        if x.numel() == 0:
            return False
        conv = self.conv
        if self.attachment.fused is not True or not use_triton(x) or x.dtype != conv.weight.dtype:
            return False
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            return False
        whole = x.shape[2] % conv.kernel_size[0] == 0 and x.shape[3] % conv.kernel_size[1] == 0
        return whole and why_not(conv) is None and self.agrees(x)

    def agrees(self, x: Tensor) -> bool:
        """Whether both forms agree on random pixels; checked once per device and dtype."""
        kind = (x.device, x.dtype)
        if kind not in self.agreed:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            chance = torch.Generator(x.device).manual_seed(0)
            side = [2 * k for k in self.conv.kernel_size]
            pixels = torch.randn(
                2, x.shape[1], *side, generator=chance, device=x.device, dtype=x.dtype
            )
            own = type(self.conv).forward(self.conv, pixels).double()
            mine = unfold_linear(pixels, self.conv.weight, self.conv.bias).double()
            error = float((mine - own).norm() / own.norm())
            self.agreed[kind] = error <= self.tolerance  # false for NaN too
        return self.agreed[kind]


def bind(attachment: Attachment, tolerance: float) -> None:
    """Put the matrix product on a host's patch convolution, if it has one of the known kind."""
    conv = getattr(getattr(attachment.host, "patch_embed", None), "proj", None)
    if conv is not None and why_not(conv) is None:
        conv.__dict__["forward"] = FusedPatches(attachment, conv, tolerance)


def unbind(attachment: Attachment) -> None:
    """Take it off again."""
    conv = getattr(getattr(attachment.host, "patch_embed", None), "proj", None)
    if conv is not None and isinstance(conv.__dict__.get("forward"), FusedPatches):
        del conv.__dict__["forward"]
