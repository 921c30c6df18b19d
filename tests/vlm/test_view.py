"""`vistoken view` of a vision-language model: what is dark on the picture is what was dropped."""

import sys

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import vistoken
from tests.support import vlm_models as m
from tests.vlm.test_inside import features_of, masked_run, whole_embeds
from vistoken.cli.main import main
from vistoken.cli.view_vlm import make_inputs
from vistoken.errors import ConfigError, NotWrappedError
from vistoken.models.llava import find_language
from vistoken.view.images import Kept, _spread, draw_images, kept_tokens, maps_of
from vistoken.view.sheet import Cell, origin
from vistoken.vlm.layout import layout_of

METHODS = ["hired:budget=0.3", "fastv:budget=0.4,layer=1", "mustdrop:budget=0.45,after=[1]"]


def make_processor(kind="next"):
    names = ["<pad>", "<s>", "<unk>", *[f"w{i}" for i in range(93)], "what", "is", "it", "<image>"]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    side = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    options = {"patch_size": 7, "vision_feature_select_strategy": "default"}
    options["num_additional_image_tokens"] = 1
    if kind == "next":
        images = t.LlavaNextImageProcessor(**side, image_grid_pinpoints=m.PINPOINTS)
        return t.LlavaNextProcessor(images, tokenizer, **options)
    return t.LlavaProcessor(t.CLIPImageProcessor(**side), tokenizer, **options)


def picture(high, wide):
    """Bright everywhere, so that only dropped cells are dark."""
    noise = np.random.default_rng(0).integers(190, 256, (high, wide, 3))
    return Image.fromarray(noise.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    m.llava_next(4).save_pretrained(path)
    make_processor().save_pretrained(path)
    return path


def drawn(sheet, row, column, cells, size):
    """True at the cells of a panel that are bright `[rows, columns]`, from its pixels."""
    top, left = origin(row, column, Cell(np.zeros((*size, 3), np.uint8), ""))
    panel = np.asarray(sheet.convert("L"), dtype=float)[top : top + size[0], left : left + size[1]]
    found = np.zeros(cells, dtype=bool)
    for r in range(cells[0]):
        for c in range(cells[1]):
            inner = panel[
                size[0] * r // cells[0] + 4 : size[0] * (r + 1) // cells[0] - 4,
                size[1] * c // cells[1] + 4 : size[1] * (c + 1) // cells[1] - 4,
            ]
            assert not 110 < np.median(inner) < 180
            found[r, c] = np.median(inner) > 145
    return found


@pytest.mark.parametrize("shape", [(56, 56), (40, 56), (90, 31)], ids=str)
def test_bright_cells_are_the_kept_tokens(folder, tmp_path, shape):
    picture(*shape).save(tmp_path / "photo.png")
    out = tmp_path / "out.png"
    words = ["view", str(tmp_path / "photo.png"), "--model", str(folder), "--out", str(out)]
    words += ["--prompt", "what is it"]
    assert main(words + [x for name in METHODS for x in ("--method", name)]) == 0
    sheet = Image.open(out)
    model, processor = m.llava_next(4), make_processor()
    inputs = make_inputs(processor, Image.open(tmp_path / "photo.png"), "what is it")
    kept = []
    for name in METHODS:
        vistoken.wrap(model, name)
        kept += kept_tokens(model, dict(inputs))
        vistoken.unwrap(model)
    assert [one.label for one in kept] == [
        METHODS[0], METHODS[1] + ", from layer 1", METHODS[2], METHODS[2] + ", from layer 2"
    ]  # fmt: skip
    high, wide = shape
    size = (round(high * 640 / max(shape)), round(wide * 640 / max(shape)))
    tokens = m.packed_length(model, shape)
    assert int((inputs["input_ids"] == m.IMAGE).sum()) == tokens
    grid = layout_of(find_language(model), tokens, shape, whole=False).mosaic
    for row, one in enumerate(kept):
        stays = set(one.places[0].tolist())
        thumb = np.array([[r * 4 + c in stays for c in range(4)] for r in range(4)])
        assert np.array_equal(drawn(sheet, row, 0, (4, 4), size), thumb)
        mosaic = np.array(
            [[16 + r * (grid[1] + 1) + c in stays for c in range(grid[1])] for r in range(grid[0])]
        )
        assert np.array_equal(drawn(sheet, row, 1, grid, size), mosaic)


@torch.no_grad()
def test_kept_tokens_are_those_of_the_methods():
    model, processor = m.llava_next(4), make_processor()
    inputs = dict(make_inputs(processor, picture(40, 56), "what is it"))
    vistoken.wrap(model, "hired:budget=0.3")
    images = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    index = images.pooler_output[0]._vistoken_reduced.index
    (kept,) = kept_tokens(model, inputs)
    assert torch.equal(kept.places[0], index)
    vistoken.unwrap(model)
    # Inside: against masks at full length.
    x, image = whole_embeds(model, inputs, 0, features_of(model, inputs))
    method = vistoken.parse("pyramiddrop:budgets=[0.5,0.2],layers=[1,3]")
    _, history = masked_run(model, x, image, method, len(x) - 1)
    vistoken.wrap(model, method)
    for layer, stage in zip((1, 3), kept_tokens(model, inputs), strict=True):
        assert stage.places[0].tolist() == history[layer][image].nonzero().flatten().tolist()
        assert f"from layer {layer}" in stage.label
    vistoken.unwrap(model)
    with pytest.raises(NotWrappedError):
        kept_tokens(model, inputs)
    vistoken.wrap(model, "hired:budget=0.3")
    with pytest.raises(ConfigError, match="2 rows"):
        kept_tokens(model, {"input_ids": torch.zeros(2, 3)})


def test_the_mosaic_shows_what_the_model_sees():
    model, processor = m.llava_next(4), make_processor()
    ramp = np.zeros((40, 56, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 56), np.linspace(0, 255, 40)[:, None]
    image = Image.fromarray(ramp)
    inputs = dict(make_inputs(processor, image, "what is it"))
    settings = processor.image_processor

    def shown(tile):
        mean, std = (
            torch.tensor(v).view(3, 1, 1) for v in (settings.image_mean, settings.image_std)
        )
        return ((tile * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

    count = int((inputs["input_ids"] == m.IMAGE).sum())
    ((thumb, crops),) = maps_of(find_language(model), inputs, [count], image, shown)
    for one, limit in ((thumb, 12), (crops, 30)):
        size = one.pixels.shape[1::-1]
        wanted = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(wanted - one.pixels).mean() < limit
    assert crops.pixels.shape[1] / crops.places.shape[1] == 7
    assert (thumb.name, crops.name) == ("thumbnail", "2 x 2 crops")


def test_models_of_one_size_and_many_stages(tmp_path):
    model, processor = m.llava(4), make_processor("plain")
    inputs = dict(make_inputs(processor, picture(28, 28), "what is it"))
    methods = ["random_tokens:budget=0.5", "layer_rates:rates=[1,0.9,0.5,0.2]"]
    path = draw_images(model, inputs, picture(28, 28), methods, tmp_path / "x.png")
    sheet = Image.open(path)
    assert drawn(sheet, 0, 0, (4, 4), (640, 640)).sum() == 8
    assert [drawn(sheet, row, 0, (4, 4), (640, 640)).sum() for row in (1, 2, 3)] == [14, 8, 3]
    stages = [Kept(str(n), ()) for n in range(31)]
    assert [one.label for one in _spread(stages)] == ["0", "10", "20", "30"]


@pytest.mark.parametrize("kind", ["onevision", "internvl", "qwen", "two"])
def test_other_families_are_drawn_on_their_own_grids(kind, tmp_path):
    photo = picture(32, 48)
    if kind == "qwen":
        model, count, grids = m.qwen(), 24, [(4, 6)]
        generator = torch.Generator().manual_seed(0)
        images = {"pixel_values": torch.randn(96, 96, generator=generator)}
        images["image_grid_thw"] = torch.tensor([[1, 8, 12]])
    elif kind == "internvl":
        model, count, grids = m.internvl(), 4, [(2, 2)]
        images = {"pixel_values": torch.full((1, 3, 28, 28), 3.0)}
    elif kind == "two":  # two pictures in one prompt
        model, count, grids = m.llava(), 32, [(4, 4), (4, 4)]
        images = {"pixel_values": torch.full((2, 3, 28, 28), 3.0)}
    else:
        model, size = m.onevision(), (40, 56)
        count, images = m.packed_length(model, size), m.anyres(model, [size])
        grids = [(4, 4), layout_of(find_language(model), count, size, whole=False).mosaic]
        images["pixel_values"] = torch.full_like(images["pixel_values"], 3.0)
    ids = torch.tensor([[5, *[m.IMAGE] * (count // 2), *([6] if kind == "two" else [])]])
    ids = torch.cat([ids, torch.tensor([[m.IMAGE] * (count - count // 2) + [7, 8]])], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    method = "random_tokens:budget=0.4"
    path = draw_images(model, inputs, photo, [method], tmp_path / "x.png")
    (kept,) = kept_tokens(vistoken.wrap(model, method), inputs)
    sheet, square = Image.open(path), kind in ("internvl", "two")
    size = (640, 640) if square else (round(640 * 2 / 3), 640)
    shown = [drawn(sheet, 0, column, grid, size) for column, grid in enumerate(grids)]
    if kind == "onevision":
        assert sum(int(one.sum()) for one in shown) == len(kept.places[0]) - grids[1][0]
    else:
        for one, places, grid in zip(shown, kept.places, grids, strict=True):
            assert one.flatten().nonzero()[0].tolist() == places.tolist(), grid


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "hired"], "give --model a folder or hub name"),
        (["--method", "hired", "--method", "tome:r=2", "--model", "x"], "need a call each"),
        (["--method", "hired", "--model", "FOLDER", "--blocks", "1"], "--blocks"),
        (["--method", "hired", "--model", "no/such/folder"], "transformers cannot load it"),
        (["--method", "hired:budget=7", "--model", "FOLDER"], "budget=7"),
        (["--method", "hired:last=9", "--model", "FOLDER"], "layer 9"),
    ],
)
def test_wrong_words_are_named(folder, tmp_path, capsys, words, message):
    picture(56, 56).save(tmp_path / "photo.png")
    words = [str(folder) if word == "FOLDER" else word for word in words]
    assert main(["view", str(tmp_path / "photo.png"), *words]) != 0
    assert message in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no image")
    assert main(["view", str(tmp_path / "text.png"), "--method", "hired", "--model", "x"]) == 2
    assert "cannot read it" in capsys.readouterr().err


def test_command_starts_without_transformers():
    import subprocess

    code = "import sys, vistoken.cli.view; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
