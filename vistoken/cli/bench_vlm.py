"""`vistoken bench-vlm --random 7b`: time to first token, decoding speed and memory of a VLM."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vistoken.cli.errors import guarded, loading
from vistoken.errors import ConfigError

SIZES = {
    # hidden, inner, layers, heads, key heads; vision hidden, layers, image side; vocabulary
    "7b": (4096, 11008, 32, 32, 32, 1024, 24, 336, 32064),
    "1b": (2048, 5632, 22, 32, 4, 1024, 24, 336, 32064),
    "tiny": (64, 96, 2, 4, 2, 32, 2, 56, 128),
}
SHAPES = ("llava-next", "llava-1.5")
MODES = ("eager", "static", "graph", "modules")
"""Plain `generate`; transformers' static cache and compile; `vistoken.accelerate`, fused or not."""


def make_parser() -> argparse.ArgumentParser:
    """The options of `vistoken bench-vlm`."""
    parser = argparse.ArgumentParser(prog="vistoken bench-vlm", description=__doc__)
    add = parser.add_argument
    add("model", nargs="?", default=None, metavar="MODEL", help="folder or hub name of a LLaVA")
    add("--random", choices=tuple(SIZES), help="random weights of this size instead of MODEL")
    add("--shape", choices=SHAPES, default=SHAPES[0], help="what --random builds")
    add("--method", action="append", default=[], help="repeatable: hired:budget=0.2, or a name")
    add("--budget", type=float, default=0.2, help="share of image tokens for bare method names")
    add(
        "--mode",
        action="append",
        choices=MODES,
        help="repeatable; default: the first three (cpu: no static)",
    )
    add("--batch", type=int, action="append", help="repeatable; default: 1")
    add("--words", type=int, default=50, help="text tokens per prompt")
    add("--text", type=int, action="append", default=[],
        help="repeatable: also time prompts of this many tokens without an image")  # fmt: skip
    add("--new-tokens", type=int, default=64, help="tokens generated, the end token ignored")
    add("--seconds", type=float, default=5.0, help="time per row for repeated calls")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None)
    add("--device", default=None, help="cpu, cuda, ...; default: cuda where there is one")
    add("--skip-dense", action="store_true", help="time the methods only")
    add("--json", type=Path, default=None, help="write the results file here, row by row")
    return parser


def check(options: argparse.Namespace) -> Any:
    """Fill in defaults; returns the device.

    Raises:
        ConfigError: options that cannot be.
    """
    import torch

    if (options.model is None) == (options.random is None):
        raise ConfigError("MODEL or --random: give exactly one of them")
    for name in ("words", "new_tokens"):
        if getattr(options, name) < 2:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be >= 2")
    if not 0 < options.budget <= 1:
        raise ConfigError(f"--budget {options.budget}: must be a share in (0, 1]")
    if not options.seconds > 0:
        raise ConfigError(f"--seconds {options.seconds}: must be > 0")
    options.batch = options.batch or [1]
    if min(options.batch) < 1:
        raise ConfigError(f"--batch {min(options.batch)}: must be a whole number >= 1")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {options.device}: no CUDA device is there")
    cuda = device.type == "cuda"
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.mode = options.mode or [mode for mode in MODES[:3] if cuda or mode != "static"]
    return device


def make_model(options: argparse.Namespace, device: Any) -> tuple[Any, str]:
    """The model on its device, and its name in the record."""
    import torch
    import transformers

    dtype = getattr(torch, options.dtype)
    if options.model is not None:
        with loading(options.model):
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                options.model, dtype=dtype, attn_implementation="sdpa"
            )
        name = options.model.rstrip("/").split("/")[-1]
    else:
        hidden, inner, layers, heads, groups, wide, depth, side, vocab = SIZES[options.random]
        patch = 14
        vision = transformers.CLIPVisionConfig(
            hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=depth,
            num_attention_heads=max(4, wide // 64), image_size=side, patch_size=patch,
        )  # fmt: skip
        text = transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=groups, vocab_size=vocab,
            max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        both = {"vision_config": vision, "text_config": text, "image_token_id": vocab - 1}
        kind: Any = transformers.LlavaForConditionalGeneration
        config: Any = transformers.LlavaConfig(**both)
        if options.shape == "llava-next":
            kind = transformers.LlavaNextForConditionalGeneration
            pins = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
            config = transformers.LlavaNextConfig(**both, image_grid_pinpoints=pins)
        # Built where it will run: a copy on the host would be as large as the model.
        with torch.device(device):
            model = kind._from_config(config, dtype=dtype, attn_implementation="sdpa")
        name = f"{options.shape}-{options.random}-random"
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = model.generation_config.pad_token_id or 0
    return model, name


def make_inputs(model: Any, batch: int, words: int) -> tuple[dict[str, Any], int]:
    """Random pixels and words for a batch of one image per row; image tokens per row.

    Raises:
        ConfigError: a model whose inputs are not known here.
    """
    import torch

    kind, config = model.config.model_type, model.config
    device, dtype = model.device, model.dtype
    side = config.vision_config.image_size
    if kind == "llava":
        inputs = {"pixel_values": torch.randn(batch, 3, side, side, device=device, dtype=dtype)}
    elif kind in ("llava_next", "llava_onevision"):
        pixels = torch.randn(batch, 5, 3, side, side, device=device, dtype=dtype)
        sizes = torch.tensor([[2 * side, 2 * side]] * batch, device=device)
        inputs = {"pixel_values": pixels, "image_sizes": sizes}
    else:
        raise ConfigError(f"model type '{kind}': must be llava, llava_next or llava_onevision")
    with torch.no_grad():
        one = {name: value[:1] for name, value in inputs.items()}
        features = model.model.get_image_features(**one).pooler_output
    count = int(features[0].shape[0])
    text = torch.randint(1, min(1000, config.image_token_id), (batch, words), device=device)
    image = torch.full((batch, count), config.image_token_id, device=device)
    inputs["input_ids"] = torch.cat([text[:, :1], image, text[:, 1:]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs, count


def run_bench(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Time every row, print it and write it as it comes.

    Returns:
        The results file.
    """
    import torch

    from vistoken.eval.record import make_record, write_json
    from vistoken.vlm.timing import Case, measure_row

    device = check(options)
    print(f"building the model on {device} in {options.dtype} ...", flush=True)
    model, name = make_model(options, device)
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    dense: dict[tuple[int, int], float] = {}
    for case in make_cases(options, Case):
        torch.manual_seed(0)
        row = {
            "case": name, "batch": case.batch, "dtype": options.dtype,
            "method": case.method or "dense", "mode": case.mode,
        }  # fmt: skip
        if case.text:
            words = torch.randint(1, 1000, (case.batch, case.text), device=device) % (
                model.config.image_token_id
            )
            inputs, images = {"input_ids": words, "attention_mask": torch.ones_like(words)}, 0
        else:
            inputs, images = make_inputs(model, case.batch, options.words)
        row |= measure_row(model, inputs, images, case)
        if "ms" in row:
            key = (case.batch, case.text)
            if case.method is None and case.mode == "eager":
                dense[key] = row["ms"]
            if key in dense:
                row |= {"dense_ms": dense[key], "speedup": dense[key] / row["ms"]}
        rows.append(row)
        print(describe(row), flush=True)
        record = make_record(device, rows, command)
        if options.json is not None:
            write_json(record, options.json)
    if options.json is not None:
        print(f"wrote {options.json}", flush=True)
    return record


def make_cases(options: argparse.Namespace, case: Any) -> list[Any]:
    """What is timed, in order."""
    methods = [None] * (not options.skip_dense) + [
        method if ":" in method else f"{method}:budget={options.budget}"
        for method in options.method
    ]
    common = {"new_tokens": options.new_tokens, "seconds": options.seconds}
    found = []
    for batch in options.batch:
        for method in methods:
            # A compiled static cache cannot follow a prompt that shrinks.
            modes = [mode for mode in options.mode if method is None or mode != "static"]
            found += [case(batch, mode, method, 0, **common) for mode in modes]
        found += [
            case(batch, mode, None, text, **common)
            for text in options.text
            for mode in options.mode
        ]
    return found


def describe(row: dict[str, Any]) -> str:
    """One line for one row."""
    head = f"{row['case']} b{row['batch']} {row['method']:<22} {row['mode']:<7}"
    if "error" in row:
        return f"{head} FAILED: {row['error']}"
    gain = f" {row['speedup']:.2f}x" if "speedup" in row else ""
    return (
        f"{head} prompt {row['prompt']:>5} image {row['image_tokens']:>5} -> {row['tokens']:>5} | "
        f"first {row['first_ms']:8.1f} ms, {row['decode_ms']:6.2f} ms/token, "
        f"{row['per_second']:7.1f} tokens/s, total {row['ms']:8.1f} ms, "
        f"{row['peak_mib']:7.0f} MiB, ready {row['ready_s']:5.1f} s{gain}"
        f"{'' if row['execution'] is None else ' | ' + row['execution']}"
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit code: 0 ok, 1 failed, 2 wrong options."""
    import sys

    words = list(sys.argv[1:] if args is None else args)
    options = make_parser().parse_args(words)
    return guarded(lambda: run_bench(options, " ".join(["vistoken bench-vlm", *words])))
