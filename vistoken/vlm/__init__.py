"""Fewer image tokens in vision-language models: `vistoken.wrap(llava, vistoken.HiRED(budget=0.2))`.

Methods cut image tokens before the language model; `generate` and its ids stay as they are.
"""

from __future__ import annotations

from vistoken.vlm.base import ImageMethod, LanguageMethod
from vistoken.vlm.baselines import PoolTokens, RandomTokens
from vistoken.vlm.diverse import HoloV, MaxMin, VisionZip
from vistoken.vlm.global_com2 import GlobalCom2
from vistoken.vlm.hired import HiRED
from vistoken.vlm.inside import FastV, LayerMethod, LayerRates, PSigmoid, PyramidDrop
from vistoken.vlm.must_drop import MustDrop

__all__ = [
    "METHODS",
    "FastV",
    "GlobalCom2",
    "HiRED",
    "HoloV",
    "ImageMethod",
    "LanguageMethod",
    "LayerMethod",
    "LayerRates",
    "MaxMin",
    "MustDrop",
    "PSigmoid",
    "PoolTokens",
    "PyramidDrop",
    "RandomTokens",
    "VisionZip",
]

METHODS: dict[str, type[LanguageMethod]] = {
    cls.name: cls for cls in (HiRED, GlobalCom2, VisionZip, HoloV, MaxMin, RandomTokens, PoolTokens)
} | {cls.name: cls for cls in (FastV, PyramidDrop, PSigmoid, LayerRates, MustDrop)}
"""Every method for vision-language models, by its command-line name."""
