"""Accuracy of a vision-language model's answers under every method."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vistoken.api import info, unwrap, wrap
from vistoken.errors import ConfigError, VistokenError
from vistoken.eval.intervals import wilson_interval
from vistoken.eval.options import EvalOptions
from vistoken.eval.record import make_record, write_json
from vistoken.eval.report import make_console, make_table, to_markdown
from vistoken.eval.tiny_llava import load_tiny_llava, make_processor
from vistoken.eval.vqa_cases import VqaCase, case_row, kept_share, plan_vqa_cases
from vistoken.eval.vqa_report import VQA_COLUMNS, plot_budgets
from vistoken.eval.vqa_sources import Item, Source, batches, open_questions

PREFIX = "vlm:"
TINY = "tiny"
DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}

Loader = Callable[[str], tuple[Any, Any]]


def load_model(name: str) -> tuple[Any, Any]:
    """Model and processor behind `--model vlm:NAME`: `tiny`, a weights file of it, or a folder.

    Raises:
        VistokenError: what is there cannot be loaded.
    """
    if name == TINY or name.endswith(".safetensors"):
        return load_tiny_llava(None if name == TINY else name), make_processor()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        return model.eval(), AutoProcessor.from_pretrained(name)
    except Exception as error:
        raise VistokenError(
            f"--model {PREFIX}{name} could not be loaded ({type(error).__name__}: {error})"
        ) from error


def run_vqa(
    options: EvalOptions,
    command: str = "",
    *,
    load: Loader = load_model,
    source: Source | None = None,
    console: Any = None,
) -> dict[str, Any]:
    """Evaluate, print the table, write `eval.json`, `eval.md` and `eval.png`.

    Args:
        options: what to evaluate; `model` begins with `vlm:`.
        command: for the record.
        load: builds model and processor from what follows `vlm:`.
        source: questions to use instead of those of `options.data`.
        console: where table and progress go.

    Returns:
        The results file.

    Raises:
        VistokenError: wrong options, or a model or questions that cannot be read.
    """
    console = console or make_console()
    torch.manual_seed(options.seed)
    device, dtype = place_of(options)
    questions = source or open_questions(options.data, device)
    model, processor = load(options.model.removeprefix(PREFIX))
    if processor.tokenizer.padding_side != "left":
        processor.tokenizer.padding_side = "left"
    model = model.to(device, dtype)
    cases, notes = plan_vqa_cases(model, options.method, options.budgets)
    found = answer_all(model, processor, questions, cases, options, console)
    record = make_record(
        device, make_rows(cases, *found, options), command, seed=options.seed,
        options=dataclasses.asdict(options), notes=notes,
        constant=best_constant(found[1]), questions=len(found[1]),
    )  # fmt: skip
    report(record, options, console)
    return record


def place_of(options: EvalOptions) -> tuple[torch.device, torch.dtype]:
    """Device and number format.

    Raises:
        ConfigError: several devices or a mixed format, which generation does not have.
    """
    if options.devices not in ("1", "auto"):
        raise ConfigError(f"--devices {options.devices}: a vision-language model runs on one")
    bits, _, kind = options.precision.partition("-")
    if kind == "mixed":
        raise ConfigError(
            f"--precision {options.precision}: use 32-true, bf16-true or 16-true to generate"
        )
    name = {"auto": "cuda" if torch.cuda.is_available() else "cpu", "gpu": "cuda"}
    return torch.device(name.get(options.accelerator, options.accelerator)), DTYPES[bits]


@torch.inference_mode()
def answer_all(
    model: Any,
    processor: Any,
    questions: Source,
    cases: Sequence[VqaCase],
    options: EvalOptions,
    console: Any,
) -> tuple[list[list[str]], list[Item], list[tuple[int, int]], list[float], list[float]]:
    """Put every question to every case.

    Returns:
        Answers per case, the questions without their pictures, image tokens before and after per
        case, the share of them that the first question's layers saw, seconds per case.
    """
    from rich.progress import Progress

    answers: list[list[str]] = [[] for _ in cases]
    tokens, seconds, asked = [(0, 0)] * len(cases), [0.0] * len(cases), list[Item]()
    kept: list[float] = []
    count = len(questions) if options.limit is None else min(options.limit, len(questions))
    steps = -(-count // options.batch_size) * len(cases)
    with Progress(console=console) as progress:
        task = progress.add_task("answer", total=steps)
        for items in batches(questions, options.limit, options.batch_size):
            inputs = read(model, processor, items)
            kept = kept or [share_of(model, read(model, processor, items[:1]), c) for c in cases]
            asked += [dataclasses.replace(item, image=None) for item in items]
            for number, case in enumerate(cases):
                begin = time.perf_counter()
                texts, tokens[number] = answer(
                    model, processor, inputs, case, options.max_new_tokens
                )
                answers[number] += texts
                seconds[number] += time.perf_counter() - begin
                progress.advance(task)
    if not asked:
        raise ConfigError(f"--data {options.data} holds no questions")
    return answers, asked, tokens, kept, seconds


def read(model: Any, processor: Any, items: Sequence[Item]) -> Any:
    """The model's inputs for pictures and their questions."""
    return processor(
        images=[item.image for item in items],
        text=[prompt_of(processor, item.question) for item in items],
        padding=True, return_tensors="pt",
    ).to(model.device, model.dtype)  # fmt: skip


def share_of(model: Any, inputs: Any, case: VqaCase) -> float:
    """Mean share of image tokens that the decoder's layers see of one question."""
    if case.method is None:
        return 1.0
    wrap(model, case.method)
    try:
        return kept_share(model, dict(inputs))
    finally:
        unwrap(model)


def prompt_of(processor: Any, question: str) -> str:
    """The prompt of one picture and one question, by the model's own chat template."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


def answer(
    model: Any, processor: Any, inputs: Any, case: VqaCase, new_tokens: int
) -> tuple[list[str], tuple[int, int]]:
    """Greedy answers as text, and image tokens of the first picture before and after."""
    if case.method is not None:
        wrap(model, case.method)
    try:
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        counts = info(model).images if case.method is not None else []
    finally:
        if case.method is not None:
            unwrap(model)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts, counts[0] if counts else (0, 0)


def same(text: str, wanted: str) -> bool:
    """Exact match without case and spaces around."""
    return text.strip().lower() == wanted.strip().lower()


def best_constant(asked: Sequence[Item]) -> float:
    """Accuracy of the best answer that knows the kind of question and nothing else."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for item in asked:
        by_kind[item.kind][item.answer.lower()] += 1
    return sum(counts.most_common(1)[0][1] for counts in by_kind.values()) / len(asked)


def make_rows(
    cases: Sequence[VqaCase],
    answers: Sequence[Sequence[str]],
    asked: Sequence[Item],
    tokens: Sequence[tuple[int, int]],
    kept: Sequence[float],
    seconds: Sequence[float],
    options: EvalOptions,
) -> list[dict[str, Any]]:
    """One row of the results file per case."""
    rows = []
    total = len(asked)
    columns = zip(cases, answers, tokens, kept, seconds, strict=True)
    for case, texts, counts, share, spent in columns:
        right = [same(text, item.answer) for text, item in zip(texts, asked, strict=True)]
        low, high = wilson_interval(sum(right), total)
        kinds: dict[str, list[bool]] = defaultdict(list)
        for hit, item in zip(right, asked, strict=True):
            kinds[item.kind].append(hit)
        agree = sum(map(same, texts, answers[0])) / total
        rows.append(
            {
                "case": options.model, "dtype": options.precision, **case_row(case), "kept": share,
                "accuracy": sum(right) / total, "low": low, "high": high, "n": total,
                "agreement": agree, "image_tokens": counts[0] or None, "tokens": counts[1] or None,
                "kinds": {kind: sum(hits) / len(hits) for kind, hits in sorted(kinds.items())},
                "seconds": spent, "seed": options.seed,
            }
        )  # fmt: skip
    return rows


def report(record: dict[str, Any], options: EvalOptions, console: Any) -> None:
    """Print the table and the notes, write the three files."""
    out, rows = Path(options.out), record["rows"]
    title = f"{options.model} on {options.data}, {rows[0]['n']} questions, {options.precision}"
    console.print(make_table(title, VQA_COLUMNS, rows))
    always = f"the best answer that knows the kind of question alone: {record['constant']:.1%}"
    record["notes"] = [always, *record["notes"]]
    for note in record["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
    write_json(record, out / "eval.json")
    (out / "eval.md").write_text(to_markdown(title, record, VQA_COLUMNS))
    plot_budgets(title, rows, record["constant"], out / "eval.png")
    console.print(f"wrote eval.json, eval.md and eval.png to {out}/", highlight=False)
