"""`vistoken search-vlm`: keep rates per decoder layer from a calibration set, into a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vistoken.cli.errors import loading
from vistoken.errors import ConfigError
from vistoken.vlm.search import save_rates, search_rates


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON with `image` (path beside the file) and `prompt`, ready for a processor.

    Raises:
        ConfigError: no such file, a line without these keys, or an image that cannot be read.
    """
    from PIL import Image

    if not path.is_file():
        raise ConfigError(f"--prompts {path}: there is no such file")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, prompt = entry["image"], entry["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}: must be JSON with 'image' and 'prompt' ({error})"
            ) from error
        try:
            picture = Image.open(path.parent / image).convert("RGB")
        except (OSError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}: cannot read image {image!r} ({error})"
            ) from error
        found.append({"images": picture, "text": prompt})
    if not found:
        raise ConfigError(f"--prompts {path}: holds no line")
    return found


class Agreement:
    """Share of prompts that the model answers as it did the first time, token for token.

    Args:
        inputs: processed prompts.
        tokens: new tokens per answer.
    """

    def __init__(self, inputs: list[dict[str, Any]], tokens: int) -> None:
        self.inputs = inputs
        self.tokens = tokens
        self.first: list[torch.Tensor] = []

    def __call__(self, model: nn.Module) -> float:
        """The share, 1.0 on the first call."""
        generate: Any = model.generate
        answers = [
            generate(**one, max_new_tokens=self.tokens, do_sample=False) for one in self.inputs
        ]
        self.first = self.first or answers
        pairs = zip(answers, self.first, strict=True)
        return sum(float(torch.equal(a, b)) for a, b in pairs) / len(answers)


def main(args: Sequence[str] | None = None) -> int:
    """Search and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="vistoken search-vlm", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a transformers model")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines: image, prompt")
    parser.add_argument("--out", type=Path, default=Path("rates.json"), help="file to write")
    parser.add_argument("--tolerance", type=float, default=0.05, help="share of answers to lose")
    parser.add_argument("--steps", type=int, default=16, help="levels of a rate")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="length of an answer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(args)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    prompts = read_prompts(options.prompts)
    with loading(options.model):
        processor = AutoProcessor.from_pretrained(options.model)
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    model = model.to(options.device).eval()
    inputs = [
        processor(**one, return_tensors="pt").to(model.device, model.dtype) for one in prompts
    ]
    with torch.inference_mode():
        rates = search_rates(
            model,
            Agreement(inputs, options.max_new_tokens),
            tolerance=options.tolerance,
            steps=options.steps,
        )
    save_rates(options.out, rates, f"{options.model}, {len(inputs)} prompts")
    print(f"{options.out}: mean rate {sum(rates) / len(rates):.3f}")
    print(f"use it as layer_rates:file={options.out}")
    return 0
