"""The options of an evaluation: one dataclass, read by the command line, YAML files and code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from vistoken.errors import ConfigError
from vistoken.state import Fill

BUDGETS = (0.85, 0.7, 0.55)
"""Default costs, as shares of the dense model's GFLOPs."""

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true")
"""Lightning's names of number formats."""


def option(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class EvalOptions:
    """What to evaluate, on what, and how; the help text of each field says what it takes.

    Raises:
        ConfigError: a value that no evaluation could use.
    """

    model: str = option(
        "reference",
        "timm name, open_clip:NAME[/TAG], hf:FOLDER_OR_ID, vlm:FOLDER_OR_ID (answers questions), "
        "vlm:tiny (the embedded one), or reference (the embedded model)",
    )
    pretrained: bool = option(False, "fetch the weights of a timm model")
    checkpoint: str | None = option(None, "local weights of a timm or open_clip model")
    num_classes: int | None = option(None, "classes of a timm model with a head of its own")
    image_size: int | None = option(None, "side in pixels; the model's own if left out")
    class_names: str | None = option(
        None, "zero-shot classes: a file with one name a line, or imagenet"
    )
    data: str = option(
        "reference",
        "image folder, tar file, wds/..., hfds/..., torch/..., or reference (embedded scenes); "
        "for vlm: fashion_vqa[:FOLDER], easy_vqa[:FOLDER], or lines of JSON with image, question "
        "and answer",
    )
    data_dir: str | None = option(None, "folder that wds/, hfds/ and torch/ data sets live in")
    split: str = option("validation", "split of the data set")
    class_map: str | None = option(None, "text file that orders the classes of an image folder")
    download: bool = option(False, "let torch/ data sets fetch their files")
    limit: int | None = option(
        None, "use the first so many images; all if left out (250 of the embedded scenes on a CPU)"
    )
    method: list[str] = field(
        default_factory=list,
        metadata={
            "help": "repeatable; a bare name (tome) is set to every budget, with settings "
            "(tome:r=13) it is taken as it is; all methods if left out"
        },
    )
    budgets: list[float] = field(
        default_factory=lambda: list(BUDGETS),
        metadata={
            "help": "costs as shares of the dense GFLOPs, in (0, 1); for vlm: mean shares of image "
            "tokens over the decoder's layers"
        },
    )
    fill: str = option("nearest", "what pruned cells get in dense outputs: nearest or zeros")
    batch_size: int = option(25, "images per step and device")
    num_workers: int = option(0, "processes that read images")
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, cuda (or gpu), mps")
    devices: str = option("1", "number of devices, a list such as 0,1, or auto")
    precision: str = option("32-true", f"one of {', '.join(PRECISIONS)}")
    seed: int = option(0, "seed of everything random")
    speed_repeats: int = option(3, "rounds of the speed measurement; 0 leaves it out")
    speed_batch: int | None = option(None, "its batch size; 16 on a CPU, else batch_size")
    mode: str = option("eager", "what is timed: eager, graph (CUDA) or compiled")
    max_new_tokens: int = option(4, "length of an answer of a vlm: model")
    out: str = option("results", "folder for eval.json, eval.md and eval.png")

    def __post_init__(self) -> None:
        self._require("budgets", all(0 < b < 1 for b in self.budgets), "shares in (0, 1)")
        self._require("fill", self.fill in get_args(Fill), f"one of {get_args(Fill)}")
        self._require("precision", self.precision in PRECISIONS, f"one of {PRECISIONS}")
        modes = ("eager", "graph", "compiled")
        self._require("mode", self.mode in modes, f"one of {modes}")
        for name in (
            "batch_size",
            "max_new_tokens",
            "limit",
            "speed_batch",
            "num_classes",
            "image_size",
        ):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "a whole number >= 1")
        for name in ("num_workers", "speed_repeats"):
            self._require(name, getattr(self, name) >= 0, "a whole number >= 0")
        known = self.model == "reference" or self.model.startswith("vlm:")
        if self.data == "reference" and not known and self.num_classes != 10:
            raise ConfigError(
                f"--model {self.model} needs --data: only the reference model (or a timm model "
                "with --num_classes 10) knows the classes of the embedded scenes"
            )

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        """Raise `ConfigError` in the words of the command line."""
        if not ok:
            raise ConfigError(f"--{name} {getattr(self, name)!r}: must be {allowed}")
