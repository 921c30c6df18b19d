"""Documentation pages as programs: their code blocks, and small local models in place of hubs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
import vlm_models
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def code_blocks(page: str, language: str = "python") -> list[str]:
    """The code blocks of a page in one language, in order."""
    text = (ROOT / page).read_text()
    return [code for found, code in BLOCK.findall(text) if found == language]


def commands(page: str) -> Iterator[str]:
    """Shell lines of a page, continuation lines joined."""
    for block in code_blocks(page, ""):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())


def tiny_processor(model: Any) -> transformers.LlavaNextProcessor:
    """A processor for the tiny LLaVA-NeXT, with words of a made-up vocabulary."""
    words = {f"w{number}": number for number in range(97)} | {"<unk>": 97, "<pad>": 98}
    words["<image>"] = vlm_models.IMAGE
    word_level = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_level, unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = model.config.vision_config.image_size
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=model.config.image_grid_pinpoints,
        ),
        tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def stand_ins(monkeypatch: Any) -> dict[str, Any]:
    """Hub calls replaced by small random models; the names that pages take as given."""
    make, llava = timm.create_model, vlm_models.llava_next()

    def create(name: str, pretrained: bool = False, checkpoint_path: str = "", **more: Any) -> Any:
        return make(name, pretrained=False, **more)

    def loads(found: Any) -> Any:
        return classmethod(lambda cls, name, **settings: found)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(
        transformers.LlavaNextForConditionalGeneration, "from_pretrained", loads(llava)
    )
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", loads(tiny_processor(llava)))
    torch.manual_seed(0)
    return {
        "timm": timm,
        "images": torch.randn(2, 3, 224, 224),
        "image": Image.effect_noise((56, 40), 80).convert("RGB"),
        "prompt": "w1 w2 <image> w5 what is this ?",
        "name": "a local folder",
        "llava": llava,
    }


def run(code: str, names: dict[str, Any], where: str = "page") -> None:
    """Run code in a namespace, as a file of its own would."""
    exec(compile(code, where, "exec", dont_inherit=True), names)


def run_page(page: str, names: dict[str, Any], skip: str = r"\.cuda\(\)") -> int:
    """Run a page's blocks one after the other in one namespace; the number that ran."""
    ran = 0
    for number, code in enumerate(code_blocks(page)):
        if not re.search(skip, code):
            run(code, names, f"{page} block {number}")
            ran += 1
    return ran
