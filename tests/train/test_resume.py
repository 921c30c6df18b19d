"""Runs that stop inside an epoch go on with the pictures and draws that are left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from vistoken.errors import ConfigError
from vistoken.train.classifier import Classifier
from vistoken.train.images import ImagesData
from vistoken.train.learn import RateLearning
from vistoken.train.memory import MemoryImages
from vistoken.train.order import EpochOrder, ResumableLoader, ShareOrder
from vistoken.train.scenes_data import ScenesData

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


class Recording(RateLearning):
    """Notes the pixels of every batch that it learns on, and the weight of the cost."""

    def on_train_batch_start(self, batch, index) -> None:
        seen = self.__dict__.setdefault("seen", [])
        seen.append((self.global_step, index, batch[0].double().sum().item(), float(self.weight)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        folder = root / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return root


def fit(data, out: Path, resume: Path | None = None, **more) -> Recording:
    """Two epochs, with a checkpoint after every step."""
    seed_everything(3)
    module = Recording(
        "deit_tiny_patch16_224", num_classes=10, model_args=TINY, target_speedup=1.3,
        cost_unit="share", cost_weight=0.1, lr=0.1, free_epochs=1, **more,
    )  # fmt: skip
    keep = ModelCheckpoint(
        out, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=False
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, default_root_dir=out, callbacks=[keep],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    return module


def images(root: Path, workers: int = 0, **more) -> ImagesData:
    return ImagesData(
        str(root), batch_size=4, num_workers=workers, image_size=32, num_classes=10, **more
    )


@pytest.mark.parametrize(
    ("stop", "workers", "more"),
    [
        (2, 0, {"finetune": True, "drop_path": 0.3}),
        (8, 0, {"matching": 8}),
        (7, 2, {}),
    ],
)
def test_a_run_that_stopped_inside_an_epoch_ends_bit_exactly(
    pictures: Path, tmp_path: Path, stop: int, workers: int, more: dict
) -> None:
    mixed = {"mixup": 0.3} if "finetune" in more else {}
    whole = fit(images(pictures, workers, **mixed), tmp_path / "whole", **more)
    checkpoint = tmp_path / "whole" / f"step={stop}.ckpt"
    again = fit(images(pictures, workers, **mixed), tmp_path / "again", checkpoint, **more)
    assert [step for step, *_ in whole.seen] == list(range(10))
    assert [index for _, index, *_ in whole.seen] == [*range(5), *range(5)]
    assert again.seen == whole.seen[stop:], "pictures, draws and weights of the steps that are left"
    assert len({pixels for _, _, pixels, _ in whole.seen}) == 10
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_classifier_draws_alike_after_the_step_that_it_resumes_at(
    pictures: Path, tmp_path: Path
) -> None:
    def train(out: Path, resume: Path | None = None) -> dict[str, torch.Tensor]:
        seed_everything(3)
        module = Classifier(
            num_classes=10, model_args=TINY, drop_path=0.5, lr=0.01, ema_decay=0.9, warmup=0.0
        )
        keep = ModelCheckpoint(out, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, default_root_dir=out, callbacks=[keep],
        )  # fmt: skip
        trainer.fit(module, images(pictures), ckpt_path=resume, weights_only=False)
        return module.state_dict()

    whole = train(tmp_path / "whole")
    again = train(tmp_path / "again", tmp_path / "whole" / "step=3.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


def test_scenes_go_on_inside_an_epoch(tmp_path: Path) -> None:
    def scenes() -> ScenesData:
        return ScenesData("embedded", batch_size=3, size=32, limit=12)

    whole = fit(scenes(), tmp_path / "whole")
    again = fit(scenes(), tmp_path / "again", tmp_path / "whole" / "step=6.ckpt")
    assert len(whole.seen) == 8 and again.seen == whole.seen[6:]
    assert torch.equal(whole.rates.logits, again.rates.logits)


def test_pictures_in_memory_go_on_inside_an_epoch(pictures: Path, tmp_path: Path) -> None:
    def memory() -> MemoryImages:
        return MemoryImages(
            str(pictures), stored=32, image_size=32, batch_size=4, num_workers=0, num_classes=10,
            jitter=0.3, mixup=0.3, cutmix=0.5,
        )  # fmt: skip

    more = {"finetune": True, "drop_path": 0.3}
    whole = fit(memory(), tmp_path / "whole", **more)
    assert len({pixels for _, _, pixels, _ in whole.seen}) == len(whole.seen) == 10
    for stop in (2, 8):
        checkpoint = tmp_path / "whole" / f"step={stop}.ckpt"
        again = fit(memory(), tmp_path / str(stop), checkpoint, **more)
        assert again.seen == whole.seen[stop:], "pictures and draws of the steps that are left"
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name


def test_an_epoch_of_another_layout_is_refused(pictures: Path, tmp_path: Path) -> None:
    fit(images(pictures), tmp_path / "whole")
    other = images(pictures)
    other.hparams["batch_size"] = 2
    with pytest.raises(ConfigError, match=r"batch_size.*4.*batch_size.*2"):
        fit(other, tmp_path / "again", tmp_path / "whole" / "step=3.ckpt")


@pytest.mark.parametrize("kind", [ShareOrder, EpochOrder])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loader_skips_exactly_what_it_handed_out(kind, rank: int) -> None:
    def loader() -> ResumableLoader:
        order = kind(range(25), 2, rank, shuffle=True, seed=5, drop_last=True)
        order.set_epoch(3)
        return ResumableLoader(range(25), order, 2)

    if kind is EpochOrder:  # Items are numbered through all epochs.
        items = [list(batch) for batch in loader().batch_sampler]
        data_order = [[number - 75 for number in batch] for batch in items]
    else:
        data_order = [list(batch) for batch in loader().batch_sampler]
    assert len(data_order) == len(loader()) == 6
    for seen in range(6):
        first, second = loader(), loader()
        stream = iter(first.batch_sampler)
        for _ in range(seen):
            next(stream)
        first.handed_out = seen
        second.load_state_dict(first.state_dict())
        second.order.skip, left = second.behind * 2, []
        for batch in second.batch_sampler:
            left.append([n - 75 if kind is EpochOrder else n for n in batch])
        assert left == data_order[seen:]
        again = [[n - 75 if kind is EpochOrder else n for n in b] for b in second.batch_sampler]
        assert again == data_order, "the pass after that is whole"


def test_a_whole_pass_leaves_nothing_to_skip() -> None:
    loader = ResumableLoader(range(8), ShareOrder(range(8), 1, 0), 2)
    assert sum(1 for _ in loader) == 4
    assert loader.state_dict()["handed_out"] == 0
    next(iter(loader))
    assert loader.state_dict()["handed_out"] == 1
