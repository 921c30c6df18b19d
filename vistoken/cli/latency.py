"""`vistoken latency MODEL`: time its blocks at many token counts on this machine; cached."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistoken.cli.bench import DTYPES, _device, _embedded
from vistoken.cli.errors import guarded

if TYPE_CHECKING:
    from vistoken.latency import LatencyTable
    from vistoken.models.load import Reference

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def make_parser() -> argparse.ArgumentParser:
    """The options of `vistoken latency`."""
    parser = argparse.ArgumentParser(prog="vistoken latency", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="timm name, open_clip:NAME, hf:FOLDER_OR_ID, or reference")
    add("--batch", "--batch_size", type=int, default=1, help="images per batch, default 1")
    dtypes = (*SHORT, *DTYPES)
    add("--dtype", choices=dtypes, default=None, help="default: fp32 on a CPU, else bf16")
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    add("--image_size", "--image-size", type=int, default=None, help="side in pixels")
    add("--method", default="diffrate", help="what reduces: a name, or settings like tome:r=13")
    add("--mode", choices=("graph", "eager"), default=None, help="default: graph on CUDA")
    add("--steps", type=int, default=None, help="distance of the token counts, default 8 or more")
    add("--repeats", type=int, default=10, help="timings of which the median counts")
    add("--speedup", type=float, default=None, help="also print the settings that reach it")
    add("--round_to", "--round-to", type=int, default=1, help="of those settings")
    add("--refresh", action="store_true", help="measure again even if the table is cached")
    add("--json", type=Path, default=None, help="write the table here too")
    return parser


def run_latency(options: argparse.Namespace, reference: Reference | None = None) -> LatencyTable:
    """Measure or load a table and print it.

    Args:
        options: from `make_parser`.
        reference: builds the model called `reference`; None is the embedded one.

    Raises:
        VistokenError: wrong options or an unsupported model.
    """
    import torch

    from vistoken.eval.report import make_console
    from vistoken.latency import LatencyTable, table_path
    from vistoken.methods import METHODS
    from vistoken.models.load import load_classifier
    from vistoken.probe import at_least

    for name in ("batch", "repeats", "round_to"):
        at_least(f"--{name}", getattr(options, name))
    device = _device(options.device)
    short = options.dtype or ("fp32" if device.type == "cpu" else "bf16")
    classifier = load_classifier(
        options.model,
        False,
        image_size=options.image_size,
        class_names=("object",),
        reference=reference or _embedded,
    )
    model = classifier.model.to(device, getattr(torch, SHORT.get(short, short))).eval()
    table = LatencyTable.cached(
        model,
        batch=options.batch,
        method=options.method,
        mode=options.mode,
        step=options.steps,
        repeats=options.repeats,
        refresh=options.refresh,
    )
    console = make_console()
    console.print(make_table(classifier.name, table))
    console.print(
        f"whole model without a method {table.dense_ms:.4g} ms, outside its blocks "
        f"{table.rest_ms:.4g} ms; wrapped: {table.execution}; measured in {table.seconds:.1f} s",
        highlight=False,
    )
    if options.speedup is not None:
        cls = METHODS[table.case.method]
        method = cls.at_speedup(table, options.speedup, round_to=options.round_to)
        reached = table.speedup(method.plan(table.shape))
        console.print(
            f"{options.speedup:g}x: {method.to_string()} (predicted {reached:.3f}x)",
            markup=False,
            highlight=False,
        )
    console.print(f"cached in {table_path(table.case)}", highlight=False, soft_wrap=True)
    if options.json is not None:
        console.print(f"wrote {table.save(options.json)}", highlight=False, soft_wrap=True)
    return table


def make_table(name: str, table: LatencyTable) -> Any:
    """A rich table with one row per token count."""
    from rich.table import Table

    case = table.case
    shown = Table(
        title=f"{name}, batch {case.batch}, {case.dtype}, {case.mode}, {case.device}",
        title_justify="left",
        header_style="bold",
        caption="milliseconds per block and batch",
    )
    for column in ("tokens", "without method", f"{case.method}, idle", "reducing adds"):
        shown.add_column(column, justify="right")
    rows = zip(
        table.tokens, table.block_ms, table.attn_ms, table.mlp_ms, table.reduce_ms, strict=True
    )
    for tokens, block, attn, mlp, adds in rows:
        shown.add_row(str(tokens), f"{block:.4f}", f"{attn + mlp:.4f}", f"{adds:.4f}")
    return shown


def main(args: Sequence[str] | None = None) -> int:
    """Build, cache and print a table; returns the exit code: 0 ok, 1 failed, 2 wrong options."""
    options = make_parser().parse_args(args)
    return guarded(lambda: run_latency(options))
