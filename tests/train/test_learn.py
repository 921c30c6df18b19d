"""Learning counts through the command line: smoke, resuming, two processes, what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed import TCPStore
from torch.utils.data import IterableDataset

import vistoken
from vistoken.cli.train import main
from vistoken.errors import ConfigError, ScheduleError
from vistoken.schedule import Schedule
from vistoken.train.backbone import make_backbone
from vistoken.train.classifier import Classifier
from vistoken.train.images import ImagesData
from vistoken.train.learn import RateLearning
from vistoken.train.report import DataWait
from vistoken.train.schedules import time_progress

CONFIGS = Path(__file__).parents[2] / "configs" / "rates"
TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 9), ("validation", 3)):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 256, (60, 50, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return root


def command(pictures: Path, out: Path, *extra: str) -> list[str]:
    words = ["fit", "--config", str(CONFIGS / "cifar10.yaml"), "--data.root", str(pictures)]
    words += ["--model.checkpoint", "null", "--model.num_classes", "2"]
    words += ["--model.model_name", "deit_tiny_patch16_224", "--model.model_args", str(TINY)]
    words += ["--model.target_gflops", "null", "--model.target_speedup", "1.3", "--model.lr", "0.3"]
    words += ["--data.val_split", "validation", "--data.image_size", "48", "--data.batch_size", "4"]
    words += ["--data.num_workers", "0", "--data.num_classes", "2"]
    words += ["--trainer.default_root_dir", str(out), "--trainer.accelerator", "cpu"]
    words += ["--trainer.precision", "32-true", "--trainer.logger", "false"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    words += ["--trainer.callbacks", "null", "--trainer.callbacks+=ModelCheckpoint"]
    words += ["--trainer.callbacks.save_last", "true", "--trainer.callbacks.save_top_k", "-1"]
    return [*words, *extra]


def test_smoke_run_leaves_schedule_picture_and_logs(tmp_path: Path) -> None:
    words = ["fit", "--config", str(CONFIGS / "smoke.yaml"), "--data.limit", "8"]
    words += ["--trainer.default_root_dir", str(tmp_path)]
    loggers = [
        {
            "class_path": f"lightning.pytorch.loggers.{name}",
            "init_args": {"save_dir": str(tmp_path)},
        }
        for name in ("CSVLogger", "TensorBoardLogger")
    ]
    cli = main([*words, "--trainer.logger", json.dumps(loggers)])
    schedule = Schedule.load(tmp_path / "schedule.json")
    assert schedule == cli.model.rates.schedule()
    assert (tmp_path / "schedule.png").read_bytes()[:4] == b"\x89PNG"
    (table,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    header = table.read_text().splitlines()[0].split(",")
    assert {"counts/prune_01", "counts/merge_11", "train/data_wait", "val/top1"} <= set(header)
    assert list(tmp_path.rglob("events.out.tfevents*"))
    metrics = cli.trainer.callback_metrics
    assert 0 <= float(metrics["train/data_wait"]) < 1
    assert float(metrics["val/cost"]) == pytest.approx(schedule.gflops(cli.model.rates.shape))


def test_validation_is_what_inference_does_with_the_exported_schedule(
    pictures: Path, tmp_path: Path
) -> None:
    cli = main(command(pictures, tmp_path, "--trainer.max_epochs", "1", "--model.matching", "8"))
    module, data = cli.model, cli.datamodule
    batches = list(data.val_dataloader())
    method = vistoken.parse(
        f"diffrate:schedule={tmp_path / 'schedule.json'},"
        f"features={tmp_path / 'features.safetensors'}"
    )
    torch.manual_seed(0)
    fresh = make_backbone("deit_tiny_patch16_224", num_classes=2, **TINY)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    weights = {k.removeprefix("backbone."): v for k, v in state.items() if "backbone." in k}
    fresh.load_state_dict(weights)
    vistoken.wrap(fresh, method)
    hits = total = 0
    for images, labels in batches:
        hits += int((fresh(images).argmax(1) == labels).sum())
        total += len(labels)
    assert total == 6
    assert hits / total == pytest.approx(float(cli.trainer.callback_metrics["val/top1"]))
    assert module.method().plan(module.rates.shape).kept == method.plan(module.rates.shape).kept


@pytest.mark.parametrize(
    "extra",
    [
        ("--model.matching", "8"),
        ("--model.finetune", "true", "--model.drop_path", "0.2", "--data.mixup", "0.2"),
    ],
)
def test_resumed_run_ends_bit_exactly_where_the_whole_one_does(
    pictures: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    extra = ("--trainer.max_epochs", "3", *extra)
    whole = main(command(pictures, tmp_path / "whole", *extra))
    (first,) = (tmp_path / "whole").glob("epoch=0*.ckpt")
    (tmp_path / "again").mkdir()
    first.rename(tmp_path / "again" / "last.ckpt")
    again = main(command(pictures, tmp_path / "again", *extra, "--ckpt_path", "last"))
    assert again.trainer.global_step == whole.trainer.global_step == 12
    start = torch.load(tmp_path / "again" / "last.ckpt", weights_only=True)["state_dict"]
    assert start.keys() == whole.model.state_dict().keys()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert not torch.equal(whole.model.rates.counts, torch.zeros_like(whole.model.rates.counts))


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_learn import learn_a_little
learn_a_little(sys.argv[2], sys.argv[3], devices=2, batch=2)
"""


class Probe(RateLearning):
    """Adds up the pixels it is shown, and gathers what every process holds at the end."""

    held: dict[str, torch.Tensor]
    seen = 0.0

    def on_train_batch_end(self, outputs, batch, index) -> None:
        self.seen += float(batch[0].sum())

    def on_train_end(self) -> None:
        held = {"logits": self.rates.logits.data, "counts": self.rates.counts}
        held["seen"] = torch.tensor(self.seen)
        self.held = {name: self.all_gather(value) for name, value in held.items()}


def learn_a_little(root: str, out: str, devices: int, batch: int) -> dict[str, torch.Tensor]:
    """Four steps on this many processes; what they hold also goes to a file."""
    seed_everything(0)
    module = Probe("deit_tiny_patch16_224", num_classes=2, model_args=TINY, target_speedup=1.3,
                   cost_unit="share", cost_weight=0.1, lr=0.05)  # fmt: skip
    data = ImagesData(root, batch_size=batch, num_workers=0, image_size=48, num_classes=2)
    strategy = DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=4, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, default_root_dir=f"{out}.d",
    )  # fmt: skip
    trainer.fit(module, data)
    if module.global_rank == 0:
        torch.save(module.held, out)
    return module.held


def test_two_processes_hold_the_same_logits_as_one_with_twice_the_batch(
    pictures: Path, tmp_path: Path
) -> None:
    # The store is up, on a port that is its own, before any process looks for it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {
        "TORCHELASTIC_RUN_ID": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    words = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(pictures)]
    said = [tmp_path / f"rank{rank}.txt" for rank in range(2)]
    runs = []
    for rank in range(2):
        with said[rank].open("w") as out:  # A pipe that nobody reads would fill up and block.
            runs.append(
                subprocess.Popen(
                    [*words, str(tmp_path / "two.pt")],
                    env={**os.environ, **torchrun, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        ends = [run.wait(timeout=400) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert ends == [0, 0], "\n".join(path.read_text()[-2000:] for path in said)
    two = torch.load(tmp_path / "two.pt")
    one = learn_a_little(str(pictures), str(tmp_path / "one.pt"), devices=1, batch=4)
    assert two["logits"].shape[0] == 2
    assert torch.equal(two["logits"][0], two["logits"][1])
    assert torch.equal(two["counts"][0], two["counts"][1])
    assert float(two["seen"][0]) != float(two["seen"][1]), "each process has its own pictures"
    assert float(two["seen"].sum()) == pytest.approx(float(one["seen"].sum()), rel=1e-4)
    assert torch.allclose(two["logits"][0], one["logits"].view_as(two["logits"][0]), atol=2e-3)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code in (0, None)
    assert "RateLearning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"target_gflops": 1e-6}, ScheduleError, "between"),
        ({}, ConfigError, "target"),
        ({"target_gflops": 0.001, "target_speedup": 2.0}, ConfigError, "target"),
        ({"target_speedup": 1.2, "lr": 0.0}, ConfigError, "lr"),
        ({"target_speedup": 1.2, "lr": float("inf")}, ConfigError, "lr=inf: .*finite"),
        ({"target_speedup": 1.2, "distill": float("nan")}, ConfigError, "distill=nan: .*finite"),
        ({"target_speedup": 1.2, "labels": 0.0}, ConfigError, "distill"),
        ({"target_speedup": 1.2, "drop_path": 0.1}, ConfigError, "drop_path"),
        ({"target_speedup": 1.2, "cost": "money"}, ConfigError, "cost"),
    ],
)
def test_wrong_requests_are_refused_before_the_run(options, error, word) -> None:
    with pytest.raises(error, match=word):
        module = RateLearning("deit_tiny_patch16_224", num_classes=2, model_args=TINY, **options)
        module.setup("fit")


def test_a_start_that_drops_tokens_in_blocks_not_learned_waits_for_the_next(tmp_path: Path) -> None:
    module = RateLearning(
        "deit_tiny_patch16_224", num_classes=2, model_args=TINY, target_speedup=1.2, init="tome:r=4"
    )
    module.setup("fit")
    assert module.rates.blocks == (1, 2)
    assert module.rates.schedule().kept == (37, 29, 25)
    Schedule(50, 1, ((50, 50), (40, 40), (30, 30))).save(tmp_path / "other.json")
    other = RateLearning(
        "deit_tiny_patch16_224", num_classes=2, model_args=TINY, target_speedup=1.2,
        init=str(tmp_path / "other.json"),
    )  # fmt: skip
    with pytest.raises(ScheduleError, match="50 tokens"):
        other.setup("fit")


def test_every_process_follows_the_clock_of_the_first() -> None:
    timer = Timer(timedelta(seconds=100))
    timer._offset = 25.0
    said: list[float] = []

    def broadcast(value: float) -> float:
        said.append(value)
        return 0.5

    trainer = SimpleNamespace(callbacks=[timer], strategy=SimpleNamespace(broadcast=broadcast))
    assert time_progress(trainer) == 0.5
    assert said == [pytest.approx(0.25)]


def test_validation_is_no_part_of_the_wait_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, noted = [0.0], {}
    monkeypatch.setattr("vistoken.train.report.time.perf_counter", lambda: clock[0])
    module = SimpleNamespace(log=lambda name, value, **_: noted.update({name: value}))
    wait = DataWait()
    wait.on_train_epoch_start(None, module)
    for _ in range(2):
        clock[0] += 1.0
        wait.on_train_batch_start(None, module, None, 0)
        clock[0] += 3.0
        wait.on_train_batch_end(None, module, None, None, 0)
        clock[0] += 20.0
        wait.on_validation_end(None, module)
    wait.on_train_epoch_end(None, module)
    assert noted == {"train/data_wait": pytest.approx(0.25)}


class Numbers(IterableDataset):
    def __iter__(self):
        return ((Image.new("RGB", (48, 48)), 0) for _ in range(100))


@pytest.mark.parametrize(
    ("workers", "subset", "fits"), [(0, 4, True), (0, 3, False), (2, 6, False)]
)
def test_a_subset_of_a_stream_fills_one_batch_of_every_reader(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, workers: int, subset: int, fits: bool
) -> None:
    data = ImagesData(
        str(pictures), batch_size=4, num_workers=workers, subset=subset, image_size=48
    )
    monkeypatch.setattr(data, "_open", lambda training: Numbers())
    if fits:
        assert len(list(data.train_dataloader())) == 1
    else:
        with pytest.raises(ConfigError, match="fill one batch"):
            data.train_dataloader()


def test_the_embedded_model_takes_no_options_in_fine_tuning_either() -> None:
    with pytest.raises(ConfigError, match="no options"):
        Classifier("reference", model_args={"depth": 3})


def test_validation_starts_again_after_one_that_was_broken_off(pictures: Path) -> None:
    class Breaks(RateLearning):
        broken = False

        def validation_step(self, batch, index) -> None:
            if not self.broken:
                self.broken = True
                raise FloatingPointError("broken off")
            super().validation_step(batch, index)

    module = Breaks(
        "deit_tiny_patch16_224", num_classes=2, model_args=TINY, target_speedup=1.3, blocks=[1]
    )
    data = ImagesData(str(pictures), batch_size=4, num_workers=0, image_size=48)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    with pytest.raises(FloatingPointError):
        trainer.validate(module, data, verbose=False)
    (scores,) = trainer.validate(module, data, verbose=False)
    assert 0.0 <= scores["val/top1"] <= 1.0
    assert vistoken.api.attachment_of(module._aside["evaluator"]) is None
