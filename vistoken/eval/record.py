"""The results file that every benchmark writes: device, versions, command, date, rows."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vistoken.clock import device_name

PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "timm": "timm",
    "open_clip": "open_clip_torch",
    "transformers": "transformers",
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
}
"""Modules whose versions are noted once they are imported, and their distributions."""


def versions() -> dict[str, str]:
    """Versions of vistoken and of the libraries in use."""
    found = {}
    for module, distribution in {"vistoken": "vistoken", **PACKAGES}.items():
        if module in sys.modules:
            try:
                found[module] = version(distribution)
            except PackageNotFoundError:
                found[module] = str(getattr(sys.modules[module], "__version__", "unknown"))
    return found


def make_record(
    device: torch.device, rows: Sequence[dict[str, Any]], command: str, **more: Any
) -> dict[str, Any]:
    """One results file.

    Args:
        device: where it ran.
        rows: one dictionary per measurement.
        command: the command line.
        more: further top-level fields.
    """
    return {
        "device": device_name(device),
        "versions": versions(),
        "command": command,
        "date": datetime.date.today().isoformat(),
        **more,
        "rows": list(rows),
    }


def write_json(record: dict[str, Any], path: Path) -> Path:
    """Write a results file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
