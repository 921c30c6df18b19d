"""Counts learned on several GPUs: whether all ranks hold the same, and what a step costs.

torchrun --standalone --nproc_per_node 2 benchmarks/rates_ranks.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from vistoken.eval.record import make_record, write_json
from vistoken.train.learn import RateLearning
from vistoken.train.scenes_data import ScenesData

EVERY, WARM = 20, 60
"""Steps between looks at the clock, and steps before the first."""


class Compare(Callback):
    """Times steps, and gathers what the ranks hold at the end."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.last: float | None = None
        self.same: dict[str, bool] = {}

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.global_step % EVERY:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last is not None and trainer.global_step > WARM:
            self.times.append((now - self.last) / EVERY * 1e3)
        self.last = now

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        held = {
            "logits": module.rates.logits.data,
            "counts": module.rates.counts,
            "expected": module.rates.expected().detach(),
        }
        for name, value in held.items():
            ranks = module.all_gather(value).view(trainer.world_size, *value.shape)
            self.same[name] = all(torch.equal(ranks[0], other) for other in ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=128, help="scenes per GPU")
    parser.add_argument("--plain", action="store_true", help="without CUDA graphs")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results file")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    module = RateLearning(
        "reference", target_gflops=0.6897, cost_unit="share", cost_weight=0.1, carry="active",
        lr=0.05, lr_min=0.005, distill=1.0, graph=not given.plain,
    )  # fmt: skip
    data = ScenesData(root="embedded", batch_size=given.batch, repeats=128)
    compare = Compare()
    gpu = torch.cuda.is_available()
    trainer = Trainer(
        accelerator="gpu" if gpu else "cpu", devices=devices, max_epochs=-1,
        strategy="ddp" if devices > 1 else "auto", max_steps=given.steps,
        precision="bf16-mixed" if gpu else "32-true", limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[compare],
    )  # fmt: skip
    trainer.fit(module, data)
    if not trainer.is_global_zero:
        return
    assert module.cost is not None
    schedule, ms = module.rates.schedule(), statistics.median(compare.times or [float("nan")])
    row = {
        "case": "reference scenes", "gpus": devices, "batch": given.batch, "steps": given.steps,
        "graphs": gpu and not given.plain, "ms": ms, "per_second": given.batch * devices / ms * 1e3,
        "identical": compare.same, "gflops": module.cost.exactly(schedule),
        "kept": list(schedule.kept),
    }  # fmt: skip
    print(row, flush=True)
    if given.out is not None:
        name = torch.cuda.get_device_name().split()[1].lower() if gpu else "cpu"
        path = given.out / f"rates-ranks-{name}.json"
        old = json.loads(path.read_text())["rows"] if path.exists() else []
        old = [r for r in old if (r["gpus"], r["graphs"]) != (row["gpus"], row["graphs"])]
        command = " ".join(["torchrun", "--nproc_per_node", str(devices), *sys.argv])
        write_json(make_record(module.device, [*old, row], command), path)


if __name__ == "__main__":
    main()
