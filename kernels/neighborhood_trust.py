"""A compiled tile is trusted once it agreed with the reference on random input of its own sizes.

Compilers for sm_90 are known to build some attention kernels wrongly, depending on tile, warps and
head width, so no tile runs on a user's tensors before it was compared.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from vistoken.kernels import neighborhood_reference as reference
from vistoken.kernels.dispatch import as_given
from vistoken.kernels.neighborhood_tiles import Pass, Tile, ranked, shape_of
from vistoken.kernels.neighborhood_windows import Neighborhood

LOG = logging.getLogger(__name__)

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 2e-3}
"""Relative error that rounding explains, TF32 included; a kernel built wrongly is far beyond."""

TRIES = 4
SIDE = 64
"""Longest axis that is compared as it is; longer ones are cut to about this."""


class NoSoundTileError(RuntimeError):
    """No tile of a pass agreed with the reference on this device."""


@dataclass(frozen=True)
class Call:
    """What the compiled kernels of a call depend on."""

    grid: tuple[int, ...]
    hood: Neighborhood
    heads: int
    key_heads: int
    dim: int
    dtype: torch.dtype
    extra: int
    rpb: bool

    def small(self) -> Call:
        """The same call on a grid that is quick to compare; lengths keep what they are mod 16."""
        grid = tuple(
            n if n <= SIDE else min(n, max(SIDE, -(-d * w // 16) * 16) + n % 16)
            for n, w, d in zip(self.grid, self.hood.window, self.hood.dilation, strict=True)
        )
        return replace(self, grid=grid)


def call_of(
    q: Tensor, k: Tensor, hood: Neighborhood, extra_k: Tensor | None, rpb: Tensor | None
) -> Call:
    """The call that these tensors make."""
    extra = 0 if extra_k is None else extra_k.shape[1]
    heads, dim = q.shape[-2:]
    return Call(
        tuple(q.shape[1:-2]), hood, heads, k.shape[-2], dim, q.dtype, extra, rpb is not None
    )


_FOUND: dict[tuple[Pass, Call, torch.device], Tile | None] = {}


def sound_tile(
    kind: Pass,
    q: Tensor,
    k: Tensor,
    hood: Neighborhood,
    extra_k: Tensor | None,
    rpb: Tensor | None,
) -> Tile | None:
    """The first tile that agrees with the reference, or None to take the choice as it is.

    It is compared in the first call of its kind, which waits for the device; while a CUDA graph is
    captured nothing can wait, so a call that nobody made before is not compared.

    Raises:
        NoSoundTileError: none of the likeliest tiles agrees.
    """
    if not q.is_cuda:
        return None
    call = call_of(q, k, hood, extra_k, rpb)
    key = kind, call, q.device
    if key not in _FOUND:
        if torch.cuda.is_current_stream_capturing():
            return None
        _FOUND[key] = first_sound(kind, call, q.device)
    tile = _FOUND[key]
    if tile is None:
        raise NoSoundTileError(f"no tile of the {kind} pass of {call} agrees with the reference")
    return tile


def first_sound(kind: Pass, call: Call, device: torch.device) -> Tile | None:
    """The first of the likeliest tiles that agrees with the reference."""
    shape = shape_of(call.grid, call.hood, call.dim, call.dtype.itemsize)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    for tile in islice(ranked(shape, kind, capability), TRIES):
        try:
            error = difference(kind, call.small(), tile, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            # A tile that cannot be built or launched here is as good as a wrong one.
            LOG.warning("%s of %s: %s: %s", tile, kind, type(failure).__name__, failure)
            continue
        if error <= TOLERANCE[call.dtype]:
            return tile
        LOG.warning("%s of the %s pass is off by %.1e and is not used", tile, kind, error)
    return None


@torch.no_grad()
def difference(kind: Pass, call: Call, tile: Tile, device: torch.device) -> float:
    """Largest relative error of a pass's results on random input."""
    from vistoken.kernels import triton_neighborhood as forward
    from vistoken.kernels import triton_neighborhood_gradients as gradients

    source = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = call.dtype) -> Tensor:
        return torch.randn(shape, generator=source, device=device).to(dtype)

    q, grad = (draw(1, *call.grid, call.heads, call.dim) for _ in range(2))
    k, v = (draw(1, *call.grid, call.key_heads, call.dim) for _ in range(2))
    extra_k = extra_v = rpb = None
    if call.extra:
        extra_k, extra_v = (draw(1, call.extra, call.key_heads, call.dim) for _ in range(2))
    if call.rpb:
        rpb = draw(call.heads, *(2 * w - 1 for w in call.hood.window), dtype=torch.float32)
    hood, scale = call.hood, call.dim**-0.5
    more = extra_k, extra_v, rpb
    with as_given(device.type):
        out, lse = reference.forward(q, k, v, hood, scale, *more)
        if kind == "forward":
            found = forward.forward(q, k, v, hood, scale, *more, tile)
            return max(map(relative, found, (out, lse)))
        exact = reference.backward(grad, None, q, k, v, out, lse, hood, scale, *more)
        if kind == "query":
            dq, _ = gradients.query_gradient(
                grad, None, q, k, v, out, lse, hood, scale, *more, tile
            )
            return relative(dq, exact[0])
        delta = (grad.float() * out.float()).sum(-1)
        both = gradients.key_gradients(grad, q, k, v, lse, delta, hood, scale, rpb, tile)
    # Gradients of extra tokens are another kernel's, and do not enter those of the grid.
    return max(map(relative, both, exact[1:3]))


def relative(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm; NaN counts as infinite."""
    far = float((value.double() - exact.double()).norm() / exact.double().norm())
    return far if far == far else float("inf")
