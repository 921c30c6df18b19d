"""Training of the tiny LLaVA-NeXT: answers, and labels that teach the tower to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import Tensor
from torchmetrics import MeanMetric

from vistoken.eval.tiny_llava import WEIGHTS_FILE, make_tiny_llava, tiny_config
from vistoken.train.averaged import Averaged
from vistoken.train.vqa_data import VqaBatch
from vistoken.train.vqa_forward import PackedTurns, Pass


class VqaTraining(Averaged):
    """Cross-entropy of answers plus two losses on the tower, which are dropped afterwards.

    A tower from random weights sees nothing, so answers alone teach it slowly. Where the data knows
    them, every patch names the garment under it (`patch_weight`), and the class token of every tile
    names what the tile shows (`tile_weight`), as captions taught CLIP's.

    Args:
        vision: sizes of the tower that replace the shipped model's.
        text: the same of the language model.
        labels: things that the tower tells apart.
        patch_weight: weight of the loss on patches.
        tile_weight: weight of the loss on class tokens.
        optimizer: a timm optimiser, such as `adamw` or `muon` (AdamW for vectors and embeddings).
        lr: highest learning rate.
        weight_decay: decoupled decay.
        warmup: share of the run in which the learning rate rises, in 0..1.
        ema_decay: decay of the running average that is validated and kept; 0 turns it off.
        compile: whether to compile the layers.
        weights: where the fp16 weights go when the run ends; None is the run's folder.
    """

    def __init__(
        self,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        labels: int = 7,
        patch_weight: float = 1.0,
        tile_weight: float = 0.5,
        optimizer: str = "muon",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        ema_decay: float = 0.998,
        compile: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = make_tiny_llava(tiny_config(vision, text))
        wide = self.net.config.vision_config.hidden_size
        self.patch_head = torch.nn.Linear(wide, labels + 1)
        self.tile_head = torch.nn.Linear(wide, labels)
        self.keep_average(ema_decay)
        self.turns = PackedTurns(self.net, compile)
        self.hits = MeanMetric()

    def training_step(self, batch: VqaBatch, batch_idx: int) -> Tensor:
        """The weighted losses of one batch."""
        found = self.turns(batch.tiles, batch.ids)
        answer = answer_loss(found.logits, batch.labels)
        loss: Tensor = answer + self.tower_loss(found, batch)
        self.log_dict({"train/answer": answer, "train/loss": loss}, batch_size=len(batch.tiles))
        return loss

    def tower_loss(self, found: Pass, batch: VqaBatch) -> Tensor:
        """Losses on patches and class tokens; 0 where the data has no such labels."""
        loss = found.pooled.new_zeros(())
        if batch.patches is not None:
            logits = self.patch_head(found.patches)
            patch = F.cross_entropy(logits.flatten(0, 2).float(), batch.patches.flatten())
            self.log("train/patch", patch, batch_size=len(batch.tiles))
            loss = loss + self.hparams["patch_weight"] * patch
        if batch.shown is not None:
            known = batch.shown >= 0
            logits = self.tile_head(found.pooled).float()
            each = F.binary_cross_entropy_with_logits(
                logits, batch.shown.clamp(min=0), reduction="none"
            )
            tile = (each * known).sum() / known.sum().clamp(min=1)
            self.log("train/tile", tile, batch_size=len(batch.tiles))
            loss = loss + self.hparams["tile_weight"] * tile
        return loss

    def validation_step(self, batch: VqaBatch, batch_idx: int) -> None:
        """Count answers of the averaged model that are right to the word."""
        found = PackedTurns(self.evaluation_net())(batch.tiles, batch.ids)
        right = answers_right(found.logits, batch.labels)
        self.hits.update(right.float())
        size = len(batch.tiles)
        self.log("val/answer", answer_loss(found.logits, batch.labels), batch_size=size)
        self.log("val/accuracy", self.hits, prog_bar=True, batch_size=size)

    test_step = validation_step

    def on_fit_end(self) -> None:
        """Write the weights in fp16."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            folder = Path(self.trainer.default_root_dir)
            path = Path(self.hparams["weights"] or folder / WEIGHTS_FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            state = self.evaluation_net().state_dict()
            save_file(
                {name: value.half().cpu().contiguous() for name, value in state.items()}, path
            )
            rank_zero_info(f"wrote {path} after {self.trainer.global_step} steps")

    def configure_optimizers(self) -> Any:
        """The optimiser and its cosine, which follows steps or `max_time`."""
        options: dict[str, Any] = {"lr": self.hparams["lr"]}
        if "muon" in self.hparams["optimizer"]:
            names = ("embed", "lm_head", "patch_head", "tile_head")
            options |= {"fallback_list": names, "fallback_no_weight_decay": True}
        trained = torch.nn.ModuleDict(
            {"net": self.net, "patch_head": self.patch_head, "tile_head": self.tile_head}
        )
        optimizer = create_optimizer_v2(
            trained, opt=self.hparams["optimizer"], weight_decay=self.hparams["weight_decay"],
            **options,
        )  # fmt: skip
        return self.with_cosine(optimizer, self.hparams["warmup"])


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next id where there is a label."""
    return F.cross_entropy(
        logits[..., :-1, :].flatten(0, -2).float(), labels[..., 1:].flatten(), ignore_index=-100
    )


def answers_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether every labelled id of a turn is the most likely one `[B, Q]`."""
    wanted = labels[..., 1:]
    right = (logits[..., :-1, :].argmax(-1) == wanted) | (wanted < 0)
    return right.all(-1)
