"""Dilated NAT (DiNAT) and its kin, Hassani and Shi, arXiv 2209.15001.

DiNAT alternates dense and dilated windows in NAT; DiNAT_s does so in Swin's skeleton; the isotropic
models keep one resolution, as ViT does. Importing this file registers them with timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model

from vistoken.models import nat
from vistoken.models.nat import NAT, build, published


def alternate(depths: Sequence[int], largest: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Dilations 1, d, 1, d, ... in every level."""
    return tuple(
        tuple(d if index % 2 else 1 for index in range(depth))
        for depth, d in zip(depths, largest, strict=True)
    )


def dilated(settings: dict[str, Any], *largest: int) -> dict[str, Any]:
    """Settings with alternating dilations, the largest of each level given."""
    return {**settings, "dilations": alternate(settings["depths"], largest)}


NEAR, FAR = (8, 4, 2, 1), (13, 6, 3, 1)
"""Largest dilation per level, for images of 224 and of 384 pixels."""

LARGE: dict[str, Any] = {**nat.SMALL, "embed_dim": 192, "drop_path_rate": 0.35}
SWIN: dict[str, Any] = {
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "mlp_ratio": 4.0,
    "stem": "patch",
    "merge": "patch",
    "drop_path_rate": 0.2,
}
SWIN_SMALL: dict[str, Any] = {**SWIN, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
SWIN_BASE: dict[str, Any] = {**SWIN_SMALL, "embed_dim": 128, "drop_path_rate": 0.5}
SWIN_LARGE: dict[str, Any] = {**SWIN_SMALL, "embed_dim": 192, "drop_path_rate": 0.35}
FLAT: dict[str, Any] = {
    "embed_dim": 384,
    "depths": (12,),
    "mlp_ratio": 4.0,
    "stem": "patch",
    "patch_size": 16,
    "drop_path_rate": 0.1,
}
FLAT_BASE: dict[str, Any] = {**FLAT, "embed_dim": 768, "drop_path_rate": 0.4}
WHOLE: dict[str, Any] = {"kernel_size": 14}
"""A window as large as the map: dense attention with relative position bias (ViT-rpb)."""

ONE_K, TWENTY_TWO_K = "dinat/checkpoints/imagenet1k/", "dinat/checkpoints/imagenet22k/"
ISOTROPIC = "dinat/checkpoints/isotropic/"
CLASSES_22K: dict[str, Any] = {"num_classes": 21841}
PATCHES: dict[str, Any] = {"first_conv": "patch_embed.proj"}


def _cfgs() -> dict[str, dict[str, Any]]:
    """The published files by `name.tag`."""
    found: dict[str, dict[str, Any]] = {}
    for size in ("mini", "tiny", "small", "base"):
        name = f"dinat_{size}"
        found[f"{name}.in1k"] = published(f"{ONE_K}{name}_in1k_224.pth", f"dinat-{size}-in1k-224")
    large, hub = "dinat_large_in22k", "dinat-large"
    found |= {
        "dinat_large.in22k_ft_in1k": published(
            f"{ONE_K}{large}_in1k_224.pth", f"{hub}-in22k-in1k-224"
        ),
        "dinat_large.in22k": published(f"{TWENTY_TWO_K}{large}_224.pth", **CLASSES_22K),
        "dinat_large_384.in22k_ft_in1k": published(
            f"{ONE_K}{large}_in1k_384.pth", f"{hub}-in22k-in1k-384", 384
        ),
        "dinat_large_384_11x11.in22k_ft_in1k": published(
            f"{ONE_K}{large}_in1k_384_11x11.pth", f"{hub}-11x11-in22k-in1k-384", 384
        ),
        "dinat_large_384_11x11.in22k": published(
            f"{TWENTY_TWO_K}{large}_224_11x11interp.pth", size=224, **CLASSES_22K
        ),
    }
    for size in ("tiny", "small", "base"):
        name = f"dinat_s_{size}"
        found[f"{name}.in1k"] = published(f"{ONE_K}{name}_in1k_224.pth", **PATCHES)
    large = "dinat_s_large"
    found |= {
        f"{large}.in22k_ft_in1k": published(f"{ONE_K}{large}_in1k_224.pth", **PATCHES),
        f"{large}.in22k": published(
            f"{TWENTY_TWO_K}{large}_in22k_224.pth", **PATCHES, **CLASSES_22K
        ),
        f"{large}_384.in22k_ft_in1k": published(
            f"{ONE_K}{large}_in1k_384.pth", size=384, **PATCHES
        ),
    }
    for kind in ("nat_isotropic", "dinat_isotropic", "vitrpb"):
        for size in ("small", "base"):
            name = f"{kind}_{size}"
            found[f"{name}.in1k"] = published(
                f"{ISOTROPIC}{name}_in1k_224.pth", **PATCHES, pool_size=(14, 14)
            )
    return found


default_cfgs = generate_default_cfgs(_cfgs())


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini: 20 M parameters, 2.7 GFLOPs."""
    return build("dinat_mini", pretrained, dilated(nat.MINI, *NEAR), kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny: 28 M parameters, 4.3 GFLOPs."""
    return build("dinat_tiny", pretrained, dilated(nat.TINY, *NEAR), kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small: 51 M parameters, 7.8 GFLOPs; unlike NAT-Small without LayerScale."""
    return build("dinat_small", pretrained, dilated(nat.SMALL, *NEAR), kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base: 90 M parameters, 13.7 GFLOPs."""
    return build("dinat_base", pretrained, dilated(nat.BASE, *NEAR), kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large: 201 M parameters, 30.5 GFLOPs."""
    return build("dinat_large", pretrained, dilated(LARGE, *NEAR), kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for images of 384 pixels."""
    return build("dinat_large_384", pretrained, dilated(LARGE, *FAR), kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for images of 384 pixels, windows of 11 x 11."""
    settings = {**dilated(LARGE, *NEAR), "kernel_size": 11}
    return build("dinat_large_384_11x11", pretrained, settings, kwargs)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Tiny: 28 M parameters, 4.5 GFLOPs."""
    return build("dinat_s_tiny", pretrained, dilated(SWIN, *NEAR), kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Small: 50 M parameters, 8.7 GFLOPs."""
    return build("dinat_s_small", pretrained, dilated(SWIN_SMALL, *NEAR), kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Base: 88 M parameters, 15.4 GFLOPs."""
    return build("dinat_s_base", pretrained, dilated(SWIN_BASE, *NEAR), kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Large: 197 M parameters, 34.5 GFLOPs."""
    return build("dinat_s_large", pretrained, dilated(SWIN_LARGE, *NEAR), kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Large for images of 384 pixels."""
    return build("dinat_s_large_384", pretrained, dilated(SWIN_LARGE, *FAR), kwargs)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Isotropic NAT-Small: 22 M parameters, 4.3 GFLOPs."""
    return build("nat_isotropic_small", pretrained, FLAT, kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Isotropic NAT-Base: 86 M parameters, 16.9 GFLOPs."""
    return build("nat_isotropic_base", pretrained, FLAT_BASE, kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Isotropic DiNAT-Small: 22 M parameters, 4.3 GFLOPs."""
    return build("dinat_isotropic_small", pretrained, dilated(FLAT, 2), kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Isotropic DiNAT-Base: 86 M parameters, 16.9 GFLOPs."""
    return build("dinat_isotropic_base", pretrained, dilated(FLAT_BASE, 2), kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Isotropic NAT-Small with a window of the whole map: dense attention, 4.6 GFLOPs."""
    return build("vitrpb_small", pretrained, {**FLAT, **WHOLE}, kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Isotropic NAT-Base with a window of the whole map: dense attention, 17.5 GFLOPs."""
    return build("vitrpb_base", pretrained, {**FLAT_BASE, **WHOLE}, kwargs)
