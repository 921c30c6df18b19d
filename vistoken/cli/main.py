"""The `vistoken` console script."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from vistoken._version import __version__
from vistoken.cli.errors import USAGE, guarded

COMMANDS: dict[str, tuple[str, str]] = {
    "methods": ("vistoken.cli.methods", "list the methods, their settings and defaults"),
    "view": ("vistoken.cli.view", "draw kept, merged and pruned regions of an image"),
    "bench": ("vistoken.cli.bench", "time a model dense and reduced"),
    "bench-vlm": ("vistoken.cli.bench_vlm", "time generation of a vision-language model"),
    "search-vlm": ("vistoken.cli.search_vlm", "find keep rates per layer of a language model"),
    "latency": ("vistoken.cli.latency", "measure block time against token count, and cache it"),
    "eval": ("vistoken.cli.eval", "accuracy and fidelity over a data set (= python eval.py)"),
    "train": ("vistoken.cli.train", "train with Lightning (= python train.py)"),
}
"""Subcommand: module with a `main(args)`, and what it does. Imported when it is called."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the first word; everything after it belongs to the subcommand."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{text}" for name, (_, text) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="vistoken",
        description="Token sparsity for vision transformers.",
        epilog="\n".join(["commands:", *lines, "", "vistoken COMMAND --help says more"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vistoken {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        args: arguments to use instead of those of the process.

    Returns:
        The exit code: 0 ok, 1 a run that failed, 2 wrong usage or configuration.
    """
    words = list(sys.argv[1:] if args is None else args)
    command = make_parser().parse_args(words[:1]).command
    module = COMMANDS[command][0]
    try:
        run: Callable[[Sequence[str]], object] = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        extra = "train" if command == "train" else "eval"
        print(
            f"error: vistoken {command} needs the package {error.name!r}; install "
            f"'vistoken[{extra}]'",
            file=sys.stderr,
        )
        return USAGE
    code = 0

    def call() -> None:
        nonlocal code
        result = run(words[1:])
        code = result if isinstance(result, int) else 0

    return guarded(call) or code


if __name__ == "__main__":
    sys.exit(main())
