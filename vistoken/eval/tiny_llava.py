"""The tiny LLaVA-NeXT: transformers' own classes, small enough to train and ship."""

from __future__ import annotations

import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from vistoken.errors import ConfigError
from vistoken.eval.vqa_scenes import CANVAS, MEAN, PATCH, STD, TILE
from vistoken.eval.vqa_words import BOS, EOS, ID, IMAGE, PAD, UNKNOWN, WORDS

WEIGHTS_FILE = "llava_tiny_scenes.safetensors"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

VISION = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 4,
    "image_size": TILE, "patch_size": PATCH, "projection_dim": 256,
}  # fmt: skip
TEXT = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip


def tiny_config(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Any:
    """The `LlavaNextConfig`; sizes given replace those of the shipped model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    tower = CLIPVisionConfig(**{**VISION, **(vision or {})})
    language = LlamaConfig(
        vocab_size=len(WORDS), bos_token_id=ID[BOS], eos_token_id=ID[EOS], pad_token_id=ID[PAD],
        tie_word_embeddings=False, **{**TEXT, **(text or {})},
    )  # fmt: skip
    return LlavaNextConfig(
        vision_config=tower, text_config=language, image_token_id=ID[IMAGE],
        image_token_index=ID[IMAGE], image_grid_pinpoints=[[CANVAS, CANVAS]],
        vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip


def make_tiny_llava(config: Any = None) -> Any:
    """A `LlavaNextForConditionalGeneration` with random weights, float32, SDPA attention."""
    from transformers import LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration._from_config(
        tiny_config() if config is None else config, attn_implementation="sdpa"
    )
    model.generation_config.bos_token_id = ID[BOS]
    model.generation_config.eos_token_id = ID[EOS]
    model.generation_config.pad_token_id = ID[PAD]
    return model


def make_processor() -> Any:
    """The `LlavaNextProcessor`: word-level tokenizer, thumbnail and four crops."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(ID, unk_token=UNKNOWN))
    words.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("?", " ?")]
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ID[BOS])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE], padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    images = LlavaNextImageProcessor(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[CANVAS, CANVAS]], image_mean=[MEAN] * 3, image_std=[STD] * 3,
    )  # fmt: skip
    return LlavaNextProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, image_token=IMAGE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def load_tiny_llava(weights: str | Path | None = None) -> Any:
    """The trained model, float32, on the CPU, in eval mode.

    Args:
        weights: safetensors file with the weights, or a folder that `save_tiny_llava` wrote; None
            means the file in the package.

    Raises:
        ConfigError: there is no such file, or its weights are of other sizes.
    """
    from safetensors.torch import load_file
    from transformers import LlavaNextForConditionalGeneration

    if weights is not None and Path(weights).is_dir():
        folder = LlavaNextForConditionalGeneration.from_pretrained(str(weights))
        return folder.float().eval()
    source: Any = files("vistoken.assets") / WEIGHTS_FILE if weights is None else Path(weights)
    if not source.is_file():
        raise ConfigError(f"weights {source}: there is no such file")
    model = make_tiny_llava()
    with as_file(source) as path:
        state = {name: value.float() for name, value in load_file(path).items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f"weights {source}: not of the shipped model's sizes; load them into "
            "make_tiny_llava(tiny_config(vision, text)), and save_tiny_llava writes a folder"
        ) from error
    return model.eval()


def save_tiny_llava(model: Any, folder: str | Path) -> Path:
    """Write model, tokenizer and processor as a folder that `from_pretrained` reads."""
    path = Path(folder)
    model.save_pretrained(path)
    make_processor().save_pretrained(path)
    return path


def main() -> None:
    """`python -m vistoken.eval.tiny_llava FOLDER` writes the packaged model as a folder."""
    (folder,) = sys.argv[1:] or ("tiny-llava",)
    print(f"wrote {save_tiny_llava(load_tiny_llava().half(), folder)}")


if __name__ == "__main__":
    main()
