"""The gallery's pictures: token maps of every method on three embedded scenes, and shares by depth.

    python benchmarks/gallery.py --out docs/images/gallery

Every method runs at the same share of the model's cost. For photos of your own: `vistoken view`.
`--only vlm` draws what the embedded tiny LLaVA-NeXT keeps of one scene.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import nn

import vistoken
from vistoken.api import shape_of
from vistoken.eval.reference import ReferenceScenes, load_reference_model
from vistoken.eval.scenes import MEAN, STD
from vistoken.eval.tiny_llava import load_tiny_llava, make_processor
from vistoken.eval.vqa import prompt_of
from vistoken.eval.vqa_sources import FashionQuestions
from vistoken.methods import METHODS, Method
from vistoken.models.llava import find_language
from vistoken.view import look
from vistoken.view.images import LEGEND, kept_tokens, maps_of
from vistoken.view.sheet import Cell, compose
from vistoken.view.tokens import to_pixels

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLOCKS = (2, 5, 8, 11)
COLOURS = {"alone": "#4c9f70", "merged": "#e0a43a", "pruned": "#43434a"}
IMAGE_TOKENS, PANEL, VLM_SHADES = 336, 280, 128
VLM = (
    "hired:budget=0.2,positions=original",
    "max_min:budget=0.2,positions=original",
    "random_tokens:budget=0.2,positions=original",
    "fastv:budget=0.1",
)
SHADES = 48
"""Colours of each palette PNG, which is a third of the size of a full one."""


def token_maps(model: nn.Module, method: Method, scenes: list[int], data: Any) -> Any:
    """A sheet with one row per scene: the picture, then what is left of it after some blocks."""
    vistoken.wrap(model, method)
    rows = []
    for number in scenes:
        image = data[number][0]
        view = look(model, image, BLOCKS, mean=MEAN, std=STD)
        row = [Cell(to_pixels(image, MEAN, STD), f"scene {number}")]
        for block, panel in zip(view.blocks, view.panels, strict=True):
            left = f"{block.tokens} of {view.blocks[0].source_map.parent.shape[1]} tokens"
            row.append(Cell(panel.draw(1), f"after block {block.block + 1}", left))
        rows.append(row)
    vistoken.unwrap(model)
    share = view.gflops / view.dense_gflops
    return compose(rows, f"{method.to_string()}: {share:.0%} of the cost")


def shares(model: nn.Module, method: Method, images: torch.Tensor) -> dict[str, list[float]]:
    """Share of patches by depth that are tokens of their own, live in another, or are gone."""
    vistoken.wrap(model, method)
    with torch.inference_mode(), vistoken.trace(model) as trace:
        model(images)
    vistoken.unwrap(model)
    merged = [block.merged[:, 1:].float().mean().item() for block in trace.blocks]
    pruned = [block.pruned[:, 1:].float().mean().item() for block in trace.blocks]
    alone = [1 - m - p for m, p in zip(merged, pruned, strict=True)]
    return {"alone": [1.0, *alone], "merged": [0.0, *merged], "pruned": [0.0, *pruned]}


def draw_depth(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Small multiples of the shares."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 4.6), sharex=True, sharey=True)
    for axis, (name, parts) in zip(axes.flat, found.items(), strict=True):
        depth = range(len(parts["alone"]))
        low = [0.0] * len(depth)
        for part, values in parts.items():
            high = [a + b for a, b in zip(low, values, strict=True)]
            axis.fill_between(depth, low, high, color=COLOURS[part], label=part, step="pre", lw=0)
            low = high
        axis.set(title=name, xlim=(0, len(depth) - 1), ylim=(0, 1), xticks=depth[::3])
    for axis in axes[1]:
        axis.set_xlabel("blocks passed")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of patches")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    words = {"alone": "stands for a token", "merged": "merged into another", "pruned": "pruned"}
    names = [words[label] for label in labels]
    figure.legend(handles, names, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"wrote {path}")


def ask(model: nn.Module, processor: Any, inputs: Any) -> str:
    """The answer in one word."""
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=1)
    return str(processor.decode(ids[0, -1:]))


def vlm_picture(number: int, path: Path) -> None:
    """What methods keep of one scene that the tiny LLaVA-NeXT is asked about."""
    model, processor = load_tiny_llava(), make_processor()
    item = FashionQuestions().items([number])[0]
    prompt = prompt_of(processor, item.question)
    inputs = processor(images=[item.image], text=[prompt], return_tensors="pt")
    settings = processor.image_processor
    (maps,) = maps_of(
        find_language(model), dict(inputs), [IMAGE_TOKENS], item.image,
        lambda tile: to_pixels(tile, settings.image_mean, settings.image_std),
    )  # fmt: skip
    side = (PANEL, PANEL)
    scene = np.asarray(item.image.resize(side))
    small = np.asarray(Image.fromarray(maps[0].pixels).resize(side))
    columns = [[Cell(scene, f"dense: {ask(model, processor, inputs)}"), Cell(small, "thumbnail")]]
    for method in VLM:
        vistoken.wrap(model, method)
        (places,) = kept_tokens(model, dict(inputs))[-1].places
        answer = ask(model, processor, inputs)
        vistoken.unwrap(model)
        crops, thumbnail = (one.cell(places, side) for one in reversed(maps))
        name = vistoken.parse(method).name
        above = Cell(crops.pixels, f"{name}, {len(places)}: {answer}", crops.detail)
        columns.append([above, Cell(thumbnail.pixels, name, thumbnail.detail)])
    title = f"scene {number}: {item.question} {item.answer}"
    sheet = compose(list(zip(*columns, strict=True)), title, LEGEND)
    # Median cut spends its colours on the hatching; an octree keeps those of the scene.
    sheet.quantize(VLM_SHADES, Image.Quantize.FASTOCTREE, dither=0).save(path, optimize=True)
    print(f"wrote {path} ({path.stat().st_size // 1024} KiB)")


def main() -> None:
    """Draw everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/gallery"))
    parser.add_argument("--scenes", type=int, nargs="+", default=[17, 4, 30])
    parser.add_argument("--share", type=float, default=0.6, help="of the dense model's cost")
    parser.add_argument("--images", type=int, default=64, help="scenes in the shares by depth")
    parser.add_argument("--question", type=int, default=23, help="scene of Fashion scenes VQA")
    parser.add_argument("--only", choices=["vit", "vlm"], help="draw these alone")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only != "vit":
        vlm_picture(options.question, options.out / "vlm.png")
    if options.only == "vlm":
        return
    model, data = load_reference_model(), ReferenceScenes()
    shape = shape_of(model)
    budget = options.share * vistoken.flops(model)
    images = torch.stack([data[number][0] for number in range(options.images)])
    found = {}
    for name, cls in METHODS.items():
        torch.manual_seed(0)
        method = cls.at_gflops(shape, budget)
        path = options.out / f"{name}.png"
        sheet = token_maps(model, method, options.scenes, data)
        sheet.quantize(SHADES, dither=0).save(path, optimize=True)
        print(f"wrote {path} ({path.stat().st_size // 1024} KiB)")
        found[name] = shares(model, method, images)
    draw_depth(found, options.out / "depth.png")


if __name__ == "__main__":
    main()
