"""`python eval.py`: accuracy, fidelity, cost and speed of every method on one model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

from vistoken.cli.errors import guarded
from vistoken.eval.options import EvalOptions


def make_parser() -> Any:
    """One option per field of `EvalOptions`, and `--config` for YAML files."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="eval.py",
        description="Evaluate token reduction. Without options: the embedded reference model on "
        "the embedded scenes, every method at three budgets.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    types_of = get_type_hints(EvalOptions)
    for field in dataclasses.fields(EvalOptions):
        kind: Any = types_of[field.name]
        names = [f"--{field.name}", *(["--device"] if field.name == "accelerator" else [])]
        settings: dict[str, Any] = {"help": field.metadata["help"]}
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name == "method":
            settings |= {"type": list[str], "default": []}
        elif get_origin(kind) is list:
            settings |= {"type": get_args(kind)[0], "nargs": "+", "default": default}
        elif kind is bool:
            settings |= {"type": bool, "nargs": "?", "const": True, "default": default}
        else:
            settings |= {"type": kind, "default": default}
        parser.add_argument(*names, **settings)
    return parser


def parse_options(args: Sequence[str] | None = None) -> EvalOptions:
    """The options on a command line.

    Raises:
        SystemExit: with code 2 for an unknown option or a value of the wrong type.
        ConfigError: a value that no evaluation could use.
    """
    words = join_methods(sys.argv[1:] if args is None else args)
    given = vars(make_parser().parse_args(words))
    fields = {field.name for field in dataclasses.fields(EvalOptions)}
    return EvalOptions(**{name: value for name, value in given.items() if name in fields})


def join_methods(words: Sequence[str]) -> list[str]:
    """Every `--method` of a command line as one list, which then replaces that of a file."""
    parser = argparse.ArgumentParser(prog="eval.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--method", action="append", default=[])
    given, rest = parser.parse_known_args(list(words))
    return [*rest, f"--method={json.dumps(given.method)}"] if given.method else rest


def main(args: Sequence[str] | None = None) -> int:
    """Run an evaluation; returns the exit code: 0 ok, 1 failed, 2 wrong options."""

    def run() -> None:
        options = parse_options(args)
        program = "python eval.py" if sys.argv[0].endswith("eval.py") else "vistoken eval"
        command = " ".join([program, *(sys.argv[1:] if args is None else args)])
        if options.model.startswith("vlm:"):
            from vistoken.eval.vqa import run_vqa

            run_vqa(options, command)
            return
        from vistoken.eval.run import run_evaluation

        run_evaluation(options, command)

    return guarded(run)
