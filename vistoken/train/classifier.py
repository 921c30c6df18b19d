"""The classifier that training runs share: a timm model, its optimiser and its average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from vistoken.api import wrap
from vistoken.train.averaged import Averaged
from vistoken.train.backbone import make_backbone
from vistoken.train.start import load_start

Batch = tuple[Tensor, Tensor]


class Classifier(Averaged):
    """Cross-entropy training of a timm classifier, whole or under a method at fixed counts.

    Args:
        model_name: Name of a timm architecture, or `reference` for the embedded model.
        num_classes: Classes to tell apart.
        model_args: Further arguments of `timm.create_model`.
        drop_path: Greatest stochastic-depth rate, in 0..1.
        label_smoothing: Probability mass spread over all classes, in 0..1.
        optimizer: Name of a timm optimiser, such as `adamw` or `muon`; hybrids like `muon` fall
            back to AdamW for 1-D parameters, embeddings and the head.
        lr: Highest learning rate.
        weight_decay: Decoupled decay, not applied to 1-D parameters and position embeddings.
        warmup: Share of the run in which the learning rate rises linearly, in 0..1.
        ema_decay: Decay of the running average of the weights that validation uses; 0 turns the
            average off.
        compile: Whether to compile the model with `torch.compile` before training.
        pretrained: Start from timm's weights instead of random ones.
        checkpoint: Start from local weights; a classifier for other classes is left out.
        method: Method to train under, such as `diffrate:schedule=schedule.json`; None is none.
        layer_decay: Factor on the learning rate a layer, from the head down; 1 is off.
        weights: File (safetensors) that gets the weights that validation uses, once the fit ends.
    """

    def __init__(
        self,
        model_name: str = "deit_tiny_patch16_224",
        num_classes: int = 10,
        model_args: dict[str, Any] | None = None,
        drop_path: float = 0.05,
        label_smoothing: float = 0.1,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        ema_decay: float = 0.999,
        compile: bool = False,
        pretrained: bool = False,
        checkpoint: str | None = None,
        method: str | None = None,
        layer_decay: float = 1.0,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        options = {"drop_path_rate": drop_path, **(model_args or {})}
        if model_name == "reference":
            options = dict(model_args or {})  # Any is refused; stochastic depth is not for it.
        local = checkpoint if model_name == "reference" else None  # Refused there.
        self.net = make_backbone(model_name, pretrained, local, num_classes, **options)
        if checkpoint is not None:
            load_start(self.net, checkpoint)
        self.net.train()
        if method is not None:
            wrap(self.net, method)
        self.keep_average(ema_decay)
        self.label_smoothing = label_smoothing
        # Argument checks would make the host wait for the device at every batch.
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[B, classes]` of normalised images `[B, 3, H, W]`."""
        logits: Tensor = self.evaluation_net()(images)
        return logits

    def on_fit_start(self) -> None:
        """Compile in place, which keeps the names in the checkpoint."""
        if self.hparams["compile"]:
            self.net.compile()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the smoothed cross-entropy of one batch."""
        images, labels = batch
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss)
        classes = labels if labels.dim() == 1 else labels.argmax(1)  # Mixed pictures: the larger.
        self.log("train/top1", (logits.detach().argmax(1) == classes).float().mean())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the averaged model's hits."""
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val/loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val/top1", self.val_accuracy, prog_bar=True)

    test_step = validation_step

    def on_fit_end(self) -> None:
        """Write the weights, for timm and for `--model.checkpoint` of other runs."""
        path = self.hparams["weights"]
        if path is None or not self.trainer.is_global_zero:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        state = self.evaluation_net().state_dict()
        save_file({name: x.detach().cpu().contiguous() for name, x in state.items()}, path)

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its cosine schedule, which follows steps or `max_time`."""
        options: dict[str, Any] = {"lr": self.hparams["lr"]}
        if "muon" in self.hparams["optimizer"]:
            options |= {"fallback_list": ("head",), "fallback_no_weight_decay": True}
        optimizer = create_optimizer_v2(
            self.net,
            opt=self.hparams["optimizer"],
            weight_decay=self.hparams["weight_decay"],
            layer_decay=None if self.hparams["layer_decay"] == 1 else self.hparams["layer_decay"],
            **options,
        )
        for group in optimizer.param_groups:  # timm leaves the layers' factors to its schedulers.
            group["lr"] *= group.get("lr_scale", 1.0)
        return self.with_cosine(optimizer, self.hparams["warmup"])
