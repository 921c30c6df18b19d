"""One whole evaluation: load, run, time, print, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vistoken.eval.cases import Case, plan_cases
from vistoken.eval.evaluate import evaluate, make_trainer
from vistoken.eval.options import EvalOptions
from vistoken.eval.record import make_record, write_json
from vistoken.eval.report import EVAL_COLUMNS, make_console, make_table, plot, to_markdown
from vistoken.eval.sources import (
    class_names_of,
    open_source,
    reference_classifier,
    with_transform,
)
from vistoken.eval.speed import Timing, measure
from vistoken.models.load import Classifier, Reference, load_classifier

DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}
CPU_SPEED_BATCH = 16
CPU_SCENES = 250


def run_evaluation(
    options: EvalOptions,
    command: str = "",
    *,
    reference: Reference = reference_classifier,
    source: Callable[[EvalOptions], Any] = open_source,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate, print the table, write `eval.json`, `eval.md` and `eval.png`.

    Args:
        options: what to evaluate.
        command: for the record.
        reference: builds the model called `reference`.
        source: opens the data set.
        console: where the table and the progress bar go.

    Returns:
        The results file; empty on every process but the first.

    Raises:
        VistokenError: wrong options, or a model or data set that cannot be read.
    """
    seed_everything(options.seed, workers=True, verbose=False)
    trainer = make_trainer(options)
    console = console or make_console()
    console.quiet = console.quiet or trainer.global_rank > 0
    options, shortened = shorten(options, trainer.strategy.root_device)
    data = source(options)
    classifier = load_classifier(
        options.model,
        options.pretrained,
        options.checkpoint,
        options.num_classes,
        image_size=options.image_size,
        class_names=class_names_of(options, data),
        reference=reference,
    )
    data = with_transform(data, classifier.transform)
    cases, notes = plan_cases(classifier.model, options.method, options.budgets)
    notes = [*shortened, *notes]
    with _progress(console) as progress:
        task = progress.add_task("evaluate", total=_steps(data, options, trainer) * len(cases))
        scores = evaluate(classifier, data, cases, options, trainer, lambda: progress.advance(task))
        if trainer.global_rank > 0:
            return {}
        passes = len(cases) * (options.speed_repeats + 1) if options.speed_repeats else 0
        task = progress.add_task("time", total=passes, visible=passes > 0)
        device = trainer.strategy.root_device
        timings = time_cases(classifier, cases, options, device, lambda: progress.advance(task))
    rows = make_rows(classifier, cases, scores, timings, options, device)
    record = make_record(
        device, rows, command, seed=options.seed, options=dataclasses.asdict(options), notes=notes
    )
    report(record, classifier.name, options, console)
    return record


def shorten(options: EvalOptions, device: torch.device) -> tuple[EvalOptions, list[str]]:
    """On a CPU the first scenes only, unless a number was asked for; and the note that says so."""
    if options.data != "reference" or options.limit is not None or device.type != "cpu":
        return options, []
    note = (
        f"only the first {CPU_SCENES} of the 1,000 embedded scenes were used, to save time on a "
        "CPU; --limit 1000 takes all"
    )
    return dataclasses.replace(options, limit=CPU_SCENES), [note]


def _progress(console: Console) -> Progress:
    """The progress bar."""
    return Progress(
        TextColumn("{task.description:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def _steps(data: Any, options: EvalOptions, trainer: Trainer) -> int:
    """Batches of this process; 1 for a stream of unknown length."""
    if not hasattr(data, "__len__"):
        return -(-options.limit // options.batch_size) if options.limit else 1
    count = len(data) if options.limit is None else min(options.limit, len(data))
    share = len(range(trainer.global_rank, count, trainer.world_size))
    return -(-share // options.batch_size)


def time_cases(
    classifier: Classifier,
    cases: Sequence[Case],
    options: EvalOptions,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> list[Timing | None]:
    """Timings of all cases on random images, at the precision of the evaluation."""
    if options.speed_repeats == 0:
        return [None] * len(cases)
    bits, _, kind = options.precision.partition("-")
    dtype = DTYPES[bits]
    mixed = kind == "mixed"
    batch = speed_batch(options, device)
    model = classifier.model.to(device, torch.float32 if mixed else dtype)
    images = torch.randn(batch, 3, *classifier.image_size, device=device)
    return list(
        measure(
            model,
            [case.method for case in cases],
            images if mixed else images.to(dtype),
            mode=options.mode,  # type: ignore[arg-type]
            repeats=options.speed_repeats,
            warmup=1 if device.type == "cpu" else 3,
            autocast=dtype if mixed else None,
            on_pass=tick,
        )
    )


def speed_batch(options: EvalOptions, device: torch.device) -> int:
    """Images per timed call."""
    if options.speed_batch is not None:
        return options.speed_batch
    return CPU_SPEED_BATCH if device.type == "cpu" else options.batch_size


def make_rows(
    classifier: Classifier,
    cases: Sequence[Case],
    scores: Sequence[dict[str, float | int]],
    timings: Sequence[Timing | None],
    options: EvalOptions,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row of the results file per case; `bound_ms` is dense time scaled by the cost."""
    rows = []
    dense, dense_time = cases[0], timings[0]
    for case, score, timing in zip(cases, scores, timings, strict=True):
        share = case.gflops / dense.gflops
        rows.append(
            {
                "case": classifier.name,
                "batch": speed_batch(options, device),
                "dtype": options.precision,
                "method": case.label,
                "mode": options.mode,
                "ms": timing and timing.ms,
                "per_second": timing and timing.per_second,
                "dense_ms": dense_time and dense_time.ms,
                "speedup": timing and timing.speedup,
                "bound_ms": dense_time and dense_time.ms * share,
                "gflops": case.gflops,
                "dense_gflops": dense.gflops,
                "peak_mib": timing and timing.peak_mib,
                "budget": case.budget,
                "tokens": case.tokens,
                "seed": options.seed,
                **score,
            }
        )
    return rows


def report(record: dict[str, Any], name: str, options: EvalOptions, console: Console) -> None:
    """Print the table and the notes, write the three files."""
    out, rows = Path(options.out), record["rows"]
    title = f"{name} on {options.data}, {rows[0]['n']} images, {options.precision}"
    console.print(make_table(title, EVAL_COLUMNS, rows))
    for note in record["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
    write_json(record, out / "eval.json")
    (out / "eval.md").write_text(to_markdown(title, record, EVAL_COLUMNS))
    plot(title, rows, out / "eval.png")
    console.print(f"wrote eval.json, eval.md and eval.png to {out}/", highlight=False)
