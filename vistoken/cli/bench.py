"""`vistoken bench MODEL --method A --method B`: dense and reduced speed, cost and memory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistoken.cli.errors import guarded
from vistoken.errors import ConfigError

if TYPE_CHECKING:
    from vistoken.eval.cases import Case
    from vistoken.eval.speed import Timing
    from vistoken.models.load import Reference

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_METHODS = ("tome", "diffrate", "evit")
DEFAULT_BUDGET = 0.7


def make_parser() -> argparse.ArgumentParser:
    """The options of `vistoken bench`."""
    parser = argparse.ArgumentParser(prog="vistoken bench", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="timm name, open_clip:NAME, hf:FOLDER_OR_ID, or reference")
    add(
        "--method",
        action="append",
        help="repeatable: tome:r=13, or a bare name for its setting at --budget of the dense cost; "
        f"default: {', '.join(DEFAULT_METHODS)}",
    )
    add("--budget", type=float, default=DEFAULT_BUDGET, help="share of the dense GFLOPs")
    add("--pretrained", action="store_true", help="fetch weights (speed does not depend on them)")
    add("--batch_size", type=int, default=None, help="default: 16 on a CPU, 128 on CUDA")
    add("--dtype", choices=DTYPES, default=None, help="default: float32 on a CPU, else bfloat16")
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    add("--image_size", type=int, default=None, help="side in pixels")
    add("--mode", choices=("eager", "graph", "compiled"), default="eager", help="what is timed")
    add("--repeats", type=int, default=10, help="rounds; each times every model once")
    add("--json", type=Path, default=None, help="write the results file here")
    return parser


def run_bench(
    options: argparse.Namespace, command: str, reference: Reference | None = None
) -> dict[str, Any]:
    """Time a model, print the table, write JSON where asked.

    Args:
        options: from `make_parser`.
        command: for the record.
        reference: builds the model called `reference`; None is the embedded one.

    Returns:
        The results file.

    Raises:
        VistokenError: wrong options or an unsupported model.
    """
    import torch
    from rich.progress import Progress

    from vistoken.eval.cases import plan_cases
    from vistoken.eval.record import make_record, write_json
    from vistoken.eval.report import BENCH_COLUMNS, make_console, make_table
    from vistoken.eval.speed import measure
    from vistoken.models.load import load_classifier

    device = _device(options.device)
    dtype = _check(options, device)
    classifier = load_classifier(
        options.model,
        options.pretrained,
        image_size=options.image_size,
        class_names=("object",),
        reference=reference or _embedded,
    )
    model = classifier.model.to(device, dtype)
    wanted = options.method or DEFAULT_METHODS
    cases, notes = plan_cases(model, wanted, [options.budget], strict=bool(options.method))
    images = torch.randn(options.batch_size, 3, *classifier.image_size, device=device, dtype=dtype)
    console = make_console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("bench", total=len(cases) * (options.repeats + 1))
        timings = measure(
            model,
            [case.method for case in cases],
            images,
            mode=options.mode,
            repeats=options.repeats,
            on_pass=lambda: progress.advance(task),
        )
    rows = make_rows(classifier.name, cases, timings, options, str(dtype).removeprefix("torch."))
    record = make_record(device, rows, command, notes=notes)
    size = "x".join(map(str, classifier.image_size))
    title = (
        f"{classifier.name}, {size} px, batch {options.batch_size}, {rows[0]['dtype']}, "
        f"{options.mode}, {record['device']}"
    )
    console.print(make_table(title, BENCH_COLUMNS, rows))
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    if options.json is not None:
        write_json(record, options.json)
        console.print(f"wrote {options.json}", highlight=False)
    return record


def make_rows(
    name: str,
    cases: Sequence[Case],
    timings: Sequence[Timing],
    options: argparse.Namespace,
    dtype: str,
) -> list[dict[str, Any]]:
    """Rows of the results file; `bound_ms` is the dense time scaled by the cost."""
    dense, dense_time = cases[0], timings[0]
    return [
        {
            "case": name,
            "batch": options.batch_size,
            "dtype": dtype,
            "method": case.label,
            "mode": options.mode,
            "ms": timing.ms,
            "per_second": timing.per_second,
            "dense_ms": dense_time.ms,
            "dense_per_second": dense_time.per_second,
            "speedup": timing.speedup,
            "bound_ms": dense_time.ms * case.gflops / dense.gflops,
            "gflops": case.gflops,
            "peak_mib": timing.peak_mib,
            "tokens": case.tokens,
        }
        for case, timing in zip(cases, timings, strict=True)
    ]


def _embedded() -> Any:
    """The embedded reference model."""
    from vistoken.eval.sources import reference_classifier

    return reference_classifier()


def _device(name: str | None) -> Any:
    """The device called `name`, checked; CUDA where there is one if it is None."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: no CUDA device is there")
    return device


def _check(options: argparse.Namespace, device: Any) -> Any:
    """Fill in the defaults of this device; returns the dtype."""
    import torch

    on_cpu = device.type == "cpu"
    if options.batch_size is None:
        options.batch_size = 16 if on_cpu else 128
    for name in ("batch_size", "repeats", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be a whole number >= 1")
    if not 0 < options.budget < 1:
        raise ConfigError(f"--budget {options.budget}: must be a share in (0, 1)")
    return getattr(torch, options.dtype or ("float32" if on_cpu else "bfloat16"))


def main(args: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit code: 0 ok, 1 failed, 2 wrong options."""
    import sys

    words = list(sys.argv[1:] if args is None else args)
    options = make_parser().parse_args(words)
    return guarded(lambda: run_bench(options, " ".join(["vistoken bench", *words])))
