"""Token sparsity for vision transformers: one call makes an existing model cheaper.

    model = vistoken.wrap(model, vistoken.ToMe(r=13))

Importing vistoken needs torch only; model libraries are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vistoken import attention, methods
from vistoken._version import __version__
from vistoken.api import Info, flops, info, trace, unwrap, wrap
from vistoken.errors import (
    AlreadyWrappedError,
    BackendUnavailableError,
    ConfigError,
    NotWrappedError,
    RecomputeError,
    ScheduleError,
    TapError,
    UnsupportedBackboneError,
    UnsupportedMethodError,
    VistokenError,
)
from vistoken.graphs import Graphed, compile
from vistoken.latency import LatencyTable
from vistoken.methods import (
    MCTF,
    BiLevelRouting,
    DiffRate,
    EViT,
    Method,
    NeighborhoodAttention,
    Pool,
    RandomDrop,
    ToFu,
    ToMe,
    ZeroTPrune,
    parse,
)
from vistoken.schedule import Schedule
from vistoken.state import Assignment, SourceMap
from vistoken.tracing import Trace
from vistoken.vlm import (
    FastV,
    GlobalCom2,
    HiRED,
    HoloV,
    LayerRates,
    MaxMin,
    MustDrop,
    PoolTokens,
    PSigmoid,
    PyramidDrop,
    RandomTokens,
    VisionZip,
)

__all__ = [
    "MCTF",
    "AlreadyWrappedError",
    "Assignment",
    "BackendUnavailableError",
    "BiLevelRouting",
    "ConfigError",
    "DiffRate",
    "EViT",
    "FastV",
    "GlobalCom2",
    "Graphed",
    "HiRED",
    "HoloV",
    "Info",
    "LatencyTable",
    "LayerRates",
    "MaxMin",
    "Method",
    "MustDrop",
    "NeighborhoodAttention",
    "NotWrappedError",
    "PSigmoid",
    "Pool",
    "PoolTokens",
    "PyramidDrop",
    "RandomDrop",
    "RandomTokens",
    "RecomputeError",
    "Schedule",
    "ScheduleError",
    "SourceMap",
    "TapError",
    "ToFu",
    "ToMe",
    "Trace",
    "UnsupportedBackboneError",
    "UnsupportedMethodError",
    "VisionZip",
    "VistokenError",
    "ZeroTPrune",
    "__version__",
    "accelerate",
    "attention",
    "compile",
    "flops",
    "info",
    "methods",
    "parse",
    "trace",
    "unwrap",
    "view",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """What needs more than torch, on first use."""
    if name == "view":
        return import_module("vistoken.view")
    if name == "accelerate":
        return import_module("vistoken.vlm.accelerate").accelerate
    raise AttributeError(f"module 'vistoken' has no attribute {name!r}")
