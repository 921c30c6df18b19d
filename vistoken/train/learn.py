"""Learning how many tokens every block keeps, with Lightning (DiffRate, Chen et al., ICCV 2023).

The paper learns the counts of its own operator. Here they can also be those of ToMe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from vistoken.api import attachment_of, shape_of, unwrap, wrap
from vistoken.errors import ConfigError
from vistoken.latency import LatencyTable
from vistoken.methods import DiffRate, Method
from vistoken.schedule import Schedule
from vistoken.train.backbone import layer_groups, make_backbone
from vistoken.train.costs import Cost, FlopsCost, LatencyCost, check_reachable, resolve_target
from vistoken.train.graphed import GraphedLosses
from vistoken.train.masked import simulate, twin
from vistoken.train.matching import Matching
from vistoken.train.operators import operator_named
from vistoken.train.order import StepSeeds
from vistoken.train.rates import Carry, initial_schedule
from vistoken.train.report import DataWait, RateReport
from vistoken.train.schedules import cosine_factor, time_progress

Batch = tuple[Tensor, Tensor]
LrSchedule = Literal["cosine", "step", "constant"]
HALVES = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")


class RateLearning(LightningModule):  # type: ignore[misc]
    """Learns token counts per block towards a cost, by default with the backbone frozen.

    The loss is `labels * CE + distill * KL(dense, reduced) + cost_weight * gap^2`. In training
    tokens are masked, in validation they are really removed.

    Args:
        model_name: a timm name, or `reference` for the embedded model.
        pretrained: fetch timm's weights.
        checkpoint: local weights.
        num_classes: classes, where they differ from those of the weights.
        model_args: further arguments of `timm.create_model`.
        operator: whose counts are learned: `diffrate` prunes and merges what the class token
            attends least, `tome` merges what is most alike.
        cost: what is to be met, `flops` or measured `latency`.
        target_gflops: wanted GFLOPs of one image.
        target_speedup: wanted speed-up over the dense model, of FLOPs or of milliseconds.
        latency_table: file of a `LatencyTable`; None takes this machine's, measured if need be.
        latency_batch: images per batch that the speed-up is wanted for.
        cost_weight: weight of the squared gap.
        cost_unit: `g`, the gap counts in GFLOPs or ms; `share`, in hundredths of the dense cost.
        blocks: blocks whose counts are learned; None takes all but the first (`tome`: all), and but
            the last where the head averages patches.
        granularity: distance of the candidate counts.
        init: `target`, `uniform`, `identity`, a schedule file, or a method such as `tome:r=13`.
        spread: width in patches of the distributions around the first counts.
        carry: whose counts get the gradient of the running minimum, `both` or the `active` one.
        lr: learning rate of the logits.
        lr_min: where their schedule ends.
        lr_schedule: `cosine`, `step` (a tenth after two thirds) or `constant`.
        free_epochs: epochs at the start without cost loss.
        labels: weight of the cross-entropy.
        distill: weight of the divergence from the dense model's outputs.
        label_smoothing: probability mass spread over all classes, in 0..1.
        matching: channels of learned matching features (DTEM); 0 matches the residual stream.
        matching_lr: their learning rate.
        finetune: train the backbone too.
        backbone_lr: learning rate of its head; falls by `layer_decay` a layer below.
        layer_decay: see there.
        weight_decay: of the backbone.
        drop_path: greatest stochastic-depth rate, with `finetune`.
        graph: on a GPU, replay loss and gradient as CUDA graphs; without effect where the backbone
            is trained, gradients accumulate, or batches differ in shape.
        backbone: a classifier of your own in place of `model_name` and what builds it. It is taken
            over, not copied.
    """

    def __init__(
        self,
        model_name: str = "deit_small_patch16_224",
        pretrained: bool = False,
        checkpoint: str | None = None,
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
        operator: Literal["diffrate", "tome"] = "diffrate",
        cost: Literal["flops", "latency"] = "flops",
        target_gflops: float | None = None,
        target_speedup: float | None = None,
        latency_table: str | None = None,
        latency_batch: int = 256,
        cost_weight: float = 5.0,
        cost_unit: Literal["g", "share"] = "g",
        blocks: Sequence[int] | None = None,
        granularity: int = 1,
        init: str = "target",
        spread: float = 8.0,
        carry: Carry = "both",
        lr: float = 0.01,
        lr_min: float = 0.001,
        lr_schedule: LrSchedule = "cosine",
        free_epochs: int = 0,
        labels: float = 1.0,
        distill: float = 0.0,
        label_smoothing: float = 0.0,
        matching: int = 0,
        matching_lr: float = 1e-3,
        finetune: bool = False,
        backbone_lr: float = 2e-5,
        layer_decay: float = 0.75,
        weight_decay: float = 0.05,
        drop_path: float = 0.0,
        graph: bool = True,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self._check()
        self.operator = operator_named(operator)
        if backbone is None:
            more = {"drop_path_rate": drop_path} if drop_path else {}
            options = {**(model_args or {}), **more}
            backbone = make_backbone(model_name, pretrained, checkpoint, num_classes, **options)
        self.backbone = backbone.eval().requires_grad_(finetune)
        shape = shape_of(self.backbone)
        self.rates = self.operator.rates(shape, blocks, granularity, spread, carry)
        self.matching = Matching(self.rates, matching) if matching else None
        # Not submodules: neither is part of a checkpoint, or of what optimisers and DDP see.
        self._aside = {
            "evaluator": twin(self.backbone),
            "teacher": twin(self.backbone, shared=not finetune),
        }
        simulate(self.backbone, self.rates, self.matching, self.operator.simulation)
        self.register_buffer("weight", torch.tensor(float(cost_weight)), persistent=False)
        self._graphed: GraphedLosses | None = None
        self.cost: Cost | None = None
        self.target = 0.0
        classes = getattr(self.backbone, "num_classes", num_classes)
        self.hits = MulticlassAccuracy(classes, average="micro", validate_args=False)

    def _check(self) -> None:
        """Raise `ConfigError` for settings that are wrong whatever the model."""
        given = self.hparams
        for name in ("lr", "matching_lr", "backbone_lr", "layer_decay"):
            if not 0 < given[name] < math.inf:
                raise ConfigError(f"{name}={given[name]}: must be larger than 0, and finite")
        for name in ("cost_weight", "labels", "distill", "lr_min", "drop_path", "matching"):
            if not 0 <= given[name] < math.inf:
                raise ConfigError(f"{name}={given[name]}: must be 0 or larger, and finite")
        if given["labels"] == given["distill"] == 0:
            raise ConfigError("labels=0 and distill=0: nothing is left that speaks for keeping")
        if given["drop_path"] and not given["finetune"]:
            raise ConfigError("drop_path is for finetune=true; a frozen backbone runs as it is")
        if given["matching"] and given["operator"] != "diffrate":
            raise ConfigError(
                f"matching={given['matching']}: features are learned for operator='diffrate' only; "
                f"{given['operator']!r} matches by keys"
            )
        allowed = {
            "cost": ("flops", "latency"),
            "cost_unit": ("g", "share"),
            "lr_schedule": ("cosine", "step", "constant"),
        }
        for name, names in allowed.items():
            if given[name] not in names:
                raise ConfigError(f"{name}={given[name]!r}: must be one of {', '.join(names)}")

    # Before the run -------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Fix the target, refuse what cannot be reached, and set the first counts.

        Raises:
            ConfigError: not exactly one target, a target that this cost does not have, times of
                another model or operator, or a trainer that keeps the logits in half precision.
            ScheduleError: the target, or the first counts, are out of reach.
        """
        given = self.hparams
        if self._trainer is not None and str(self._trainer.precision) in HALVES:
            raise ConfigError(
                f"precision={str(self._trainer.precision)!r}: counts above 256 and steps of the "
                "logits are lost in half precision; use 'bf16-mixed', '16-mixed' or '32-true'"
            )
        if self.cost is None:
            self.cost = self._make_cost().to(self.device)
            self.target = resolve_target(self.cost, given["target_gflops"], given["target_speedup"])
            check_reachable(self.cost, self.rates, self.target)
            shape = self.rates.shape
            if given["init"] == "target":
                start: Schedule | None = self.cost.closest(self.target, self.operator.method)
            else:
                start = initial_schedule(shape, given["init"])
            if start is not None:
                # Counts of another model are left as they are, for `load` to refuse.
                fits = (start.tokens, start.depth) == (shape.tokens, shape.depth)
                self.rates.load(self.rates.allowed(start) if fits else start)

    def _make_cost(self) -> Cost:
        """The cost model; a latency table is measured by one process for all."""
        given = self.hparams
        if given["cost"] == "flops":
            return FlopsCost(self.rates.shape)
        table = None
        if self.trainer.is_global_zero:
            table = self._latency_table()
        table = self.trainer.strategy.broadcast(table)
        self._check_table(table)
        return LatencyCost(table)

    def _check_table(self, table: LatencyTable) -> None:
        """Raise `ConfigError` for times of another operator or model."""
        operator, own, timed = self.hparams["operator"], self.rates.shape, table.shape
        alike = (timed.grid, timed.prefix, timed.blocks) == (own.grid, own.prefix, own.blocks)
        if table.case.method != operator or not alike:
            raise ConfigError(
                f"the latency table times {table.case.method!r} on {timed.depth} blocks with "
                f"{timed.tokens} tokens of {timed.width} channels; needed are times of "
                f"{operator!r} on {own.depth} blocks with {own.tokens} tokens of {own.width}"
            )

    def _latency_table(self) -> LatencyTable:
        """The given table, or this machine's in the number format of inference."""
        given = self.hparams
        if given["latency_table"] is not None:
            return LatencyTable.load(given["latency_table"])
        device = self.trainer.strategy.root_device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = twin(self._aside["evaluator"], shared=False).to(device, dtype)
        return LatencyTable.cached(model, batch=given["latency_batch"], method=given["operator"])

    def train(self, mode: bool = True) -> RateLearning:
        """Training mode, but a frozen backbone stays in eval mode."""
        super().train(mode)
        if not self.hparams["finetune"]:
            self.backbone.eval()
        return self

    def configure_optimizers(self) -> Any:
        """AdamW with the logits' own schedule; everything else follows the cosine."""
        given = self.hparams
        groups = [{"params": [self.rates.logits], "lr": given["lr"], "weight_decay": 0.0}]
        if self.matching is not None:
            weights = [self.matching.weight]
            groups.append({"params": weights, "lr": given["matching_lr"], "weight_decay": 0.0})
        others = len(groups) - 1
        if given["finetune"]:
            options = (given["backbone_lr"], given["weight_decay"], given["layer_decay"])
            more = layer_groups(self.backbone, *options)
            groups, others = groups + more, others + len(more)
        optimizer = torch.optim.AdamW(groups)
        total = max(1.0, float(self.trainer.estimated_stepping_batches))

        @lru_cache(maxsize=1)  # Every group asks at each step, and processes agree on the answer.
        def progress(step: int) -> float:
            return max(step / total, time_progress(self.trainer))

        def of_logits(step: int) -> float:
            floor = min(1.0, given["lr_min"] / given["lr"])
            done = progress(step)
            if given["lr_schedule"] == "constant":
                return 1.0
            if given["lr_schedule"] == "step":
                return 1.0 if done < 2 / 3 else max(floor, 0.1)
            return cosine_factor(done, 0.0, floor)

        factors = [of_logits] + [lambda step: cosine_factor(progress(step), 0.05)] * others
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # Steps ----------------------------------------------------------------------------------------

    def losses(self, images: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """The `loss` of one batch and its parts.

        Args:
            images: normalised, `[B, 3, H, W]`.
            labels: classes `[B]`, or mixed shares `[B, classes]`.
            weight: of the cost, a scalar on the device.
        """
        given, cost = self.hparams, self.cost
        assert cost is not None
        logits = self.backbone(images)
        plan, self.rates.last = self.rates.last, None
        spent = cost(plan)
        scale = cost.dense / 100 if given["cost_unit"] == "share" else 1.0
        parts = {"loss": weight * ((spent - self.target) / scale).square(), "cost": spent}
        if given["labels"]:
            smooth = given["label_smoothing"]
            parts["ce"] = F.cross_entropy(logits, labels, label_smoothing=smooth)
            parts["loss"] = parts["loss"] + given["labels"] * parts["ce"]
        if given["distill"]:
            parts["kl"] = self._divergence(images, logits)
            parts["loss"] = parts["loss"] + given["distill"] * parts["kl"]
        return parts

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        parts = self.graphed()(*batch, self.weight)
        for name, value in parts.items():
            self.log(f"train/{name}", value.detach())
        return parts["loss"]

    def graphed(self) -> Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """`losses`, as CUDA graphs where that is possible."""
        given = self.hparams
        trainer = self._trainer
        accumulates = trainer is not None and trainer.accumulate_grad_batches != 1
        if not given["graph"] or given["finetune"] or accumulates:
            return self.losses
        if self._graphed is None:
            trained = [p for p in self.parameters() if p.requires_grad]
            self._graphed = GraphedLosses(self.losses, trained)
        return self._graphed

    def _divergence(self, images: Tensor, logits: Tensor) -> Tensor:
        """Divergence of the reduced model's outputs from the dense model's."""
        with torch.no_grad():
            dense = self._aside["teacher"](images).float().log_softmax(-1)
        own = logits.float().log_softmax(-1)
        return F.kl_div(own, dense, log_target=True, reduction="batchmean")

    def configure_callbacks(self) -> list[Any]:
        """Counts over time, the exported schedule, the wait for data, and seeds of every step."""
        return [RateReport(), DataWait(), StepSeeds()]

    def on_train_start(self) -> None:
        """Weigh the cost; a run that resumes inside an epoch does not start that epoch again."""
        free = self.current_epoch < self.hparams["free_epochs"]
        self.weight.fill_(0.0 if free else self.hparams["cost_weight"])

    on_train_epoch_start = on_train_start

    def on_fit_start(self) -> None:
        """Bring the copies that are no submodules to the device."""
        self._to_device()

    def aside(self, name: Literal["evaluator", "teacher"]) -> nn.Module:
        """A copy of the model that is no submodule: for real reduction, or dense."""
        return self._aside[name]

    def _to_device(self) -> None:
        for model in (*self._aside.values(), *([self.cost] if self.cost is not None else [])):
            model.to(self.device)

    def on_validation_start(self) -> None:
        """Put the counts of this moment on the evaluator, as inference would."""
        self._to_device()
        if attachment_of(self._aside["evaluator"]) is not None:  # A validation that was broken off.
            unwrap(self._aside["evaluator"])
        wrap(self._aside["evaluator"], self.method())

    def on_validation_end(self) -> None:
        """Take them off again."""
        unwrap(self._aside["evaluator"])

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of the evaluator: really reduced while validating, else dense."""
        logits: Tensor = self._aside["evaluator"](images)
        return logits

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the hits of the really reduced model."""
        images, labels = batch
        logits = self(images)
        self.hits(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        self.log("val/top1", self.hits, prog_bar=True)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Note what the counts of this moment cost."""
        if self.cost is not None:
            self.log("val/cost", self.cost.exactly(self.rates.schedule()), prog_bar=True)

    # Results --------------------------------------------------------------------------------------

    def method(self) -> Method:
        """The method with the learned counts (and features), as inference runs it."""
        schedule = self.rates.schedule()
        if self.matching is None:
            return self.operator.build(schedule)
        return DiffRate(schedule=schedule, features=self.matching.features())

    def export(self, folder: str | Path) -> Path:
        """Write `schedule.json` (and `features.safetensors`), for `DiffRate(schedule=...)`.

        Counts of ToMe are for `ToMe.from_schedule(...)`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.matching is not None:
            self.matching.save(folder / "features.safetensors")
        self.rates.schedule().save(folder / "schedule.json")
        return folder / "schedule.json"
