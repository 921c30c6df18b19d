from __future__ import annotations

import pytest
import torch

from vistoken.errors import ConfigError
from vistoken.eval.reference import ReferenceScenes
from vistoken.eval.tiny_llava import make_processor
from vistoken.eval.vqa_plan import LEAST, MOST, plan_layout, sort_garments
from vistoken.eval.vqa_questions import KINDS, MARGIN, ask
from vistoken.eval.vqa_scenes import CANVAS, cut_tiles, draw, patch_names
from vistoken.eval.vqa_sources import FileQuestions
from vistoken.eval.vqa_words import EOS, NAMES, NUMBERS, PAD, PLURALS, REGIONS, WORDS


def table():
    known = ReferenceScenes()
    return sort_garments(known.garments, known.labels)


def scenes(layout):
    """Every scene as a list of (name, region, area)."""
    rows = zip(layout.name.tolist(), layout.cell.tolist(), layout.area.tolist(), strict=True)
    return [
        [(NAMES[n], REGIONS[c], a) for n, c, a in zip(*row, strict=True) if n >= 0] for row in rows
    ]


def answer_of(question, scene):
    """The answer by reading the scene, or None where there is none."""
    names = [name for name, _, _ in scene]
    words = question.split()
    row = {name: REGIONS.index(region) // 3 for name, region, _ in scene}
    if question == "how many garments are there ?":
        return NUMBERS[len(scene)]
    if words[0] == "how":
        return NUMBERS[names.count(NAMES[PLURALS.index(words[2])])]
    if words[:4] == ["what", "is", "at", "the"]:
        return next((name for name, region, _ in scene if region == words[4]), "nothing")
    if words[0] == "where":
        (region,) = [region for name, region, _ in scene if name == words[4]]
        return region
    if words[:3] == ["is", "there", "a"]:
        return "yes" if words[3] in names else "no"
    if "above" in words:
        one, other = words[2], words[5]
        assert names.count(one) == names.count(other) == 1 and row[one] != row[other]
        return "yes" if row[one] < row[other] else "no"
    largest = words[3] == "largest"
    ordered = sorted(scene, key=lambda entry: -entry[2] if largest else entry[2])
    rivals = [area for name, _, area in scene if name != ordered[0][0]]
    for area in rivals:
        ratio = ordered[0][2] / area if largest else area / ordered[0][2]
        assert ratio > MARGIN
    return ordered[0][0]


def test_answers_are_true() -> None:
    index = torch.arange(600)
    layout = plan_layout(index, 5, table())
    asked = ask(layout, index, 5, 8)
    seen = set()
    for scene, rows, kinds in zip(scenes(layout), asked.ids, asked.kind, strict=True):
        assert LEAST <= len(scene) <= MOST
        assert len({region for _, region, _ in scene}) == len(scene)
        for ids, kind in zip(rows, kinds, strict=True):
            words = [WORDS[i] for i in ids.tolist() if WORDS[i] != PAD]
            cut = words.index("assistant:")
            assert words[cut + 2 :] == [EOS]
            assert words[cut + 1] == answer_of(" ".join(words[:cut]), scene)
            seen.add(int(kind))
    assert seen == set(range(len(KINDS)))
    assert ((asked.labels >= 0).sum(-1) == 2).all()
    assert (asked.ids[asked.labels >= 0] == asked.labels[asked.labels >= 0]).all()


def test_scenes_depend_on_their_number_alone_and_wanted_kinds_are_asked() -> None:
    garments, index = table(), torch.arange(64)
    layout = plan_layout(index, 5, garments)
    alone = plan_layout(index[7:8], 5, garments)
    images = draw(layout, garments, index, 5)
    assert torch.allclose(images[7:8], draw(alone, garments, index[7:8], 5), atol=0.5 / 255)
    assert images.shape == (64, 3, CANVAS, CANVAS)
    assert torch.equal(images, (images * 255).round() / 255)
    assert not torch.equal(layout.cell, plan_layout(index, 6, garments).cell)
    wanted = torch.full((64, 1), KINDS.index("total"))
    assert (ask(layout, index, 5, 1, wanted).kind == wanted).all()
    wanted = torch.full((64, 1), KINDS.index("where"))
    kept = ask(layout, index, 5, 1, wanted).kind == wanted
    once = torch.tensor([[any(n == 1 for n in counts(row))] for row in layout.name])
    assert torch.equal(kept, once)


def counts(row):
    return [int((row == name).sum()) for name in range(len(NAMES))]


def test_patches_are_named_by_the_garment_in_their_cell() -> None:
    garments, index = table(), torch.arange(100)
    layout = plan_layout(index, 5, garments)
    patches = patch_names(layout, garments)
    assert patches.shape == (100, 5, 64)
    for b, scene in enumerate(scenes(layout)):
        assert set(patches[b].flatten().tolist()) - {7} <= {NAMES.index(n) for n, _, _ in scene}
    # The mosaic of the four crops, looked at cell by cell.
    mosaic = patches[:, 1:].view(100, 2, 2, 8, 8).permute(0, 1, 3, 2, 4).reshape(100, 16, 16)
    hits = total = 0
    for b, scene in enumerate(scenes(layout)):
        for name, region, _ in scene:
            row, column = divmod(REGIONS.index(region), 3)
            y, x = int((row + 0.5) * 16 / 3), int((column + 0.5) * 16 / 3)
            around = mosaic[b, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            hits += int((around == NAMES.index(name)).any())
            total += 1
    assert hits > 0.97 * total


def test_tiles_are_those_of_the_processor() -> None:
    from PIL import Image

    garments, index = table(), torch.arange(2)
    images = draw(plan_layout(index, 5, garments), garments, index, 5)
    pictures = [
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images
    ]
    made = make_processor()(
        images=pictures, text=["USER: <image> What is at the top?"] * 2, return_tensors="pt"
    )
    tiles = cut_tiles(images)
    assert torch.allclose(made["pixel_values"][:, 1:], tiles[:, 1:], atol=1e-5)
    assert (made["pixel_values"] - tiles).abs().max() < 1.1 / 255 / 0.15
    words = [WORDS[i] for i in made["input_ids"][0].tolist()]
    assert words[:3] == ["<s>", "user:", "<image>"] and words.count("<image>") == 336
    assert words[338:] == ["what", "is", "at", "the", "top", "?"]


def test_lines_and_images_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('\n{"image": "a.png", "question": "what?", "answer": "bag"}\n')
    source = FileQuestions(path)
    with pytest.raises(ConfigError, match=r"cannot read the image .*a\.png"):
        source.items([0])
    path.write_text('\n{"image": "a.png"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        FileQuestions(path)
