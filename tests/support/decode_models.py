"""Tiny vision-language models of transformers with random weights, and inputs for them."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE, PAD, VOCAB = 98, 0, 99
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 2048,
    "pad_token_id": PAD, "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.35,
}  # fmt: skip


def _ready(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.35)
            elif "bias" in name:
                weight.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def make_llava(**text):
    """LLaVA-1.5: CLIP and Llama, 16 image tokens."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**{**TEXT, **text}),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return _ready(LlavaForConditionalGeneration(config))


def make_llava_next(**text):
    """LLaVA-NeXT: CLIP and Mistral, thumbnail and crops."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=MistralConfig(**{**TEXT, "sliding_window": None, **text}),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return _ready(LlavaNextForConditionalGeneration(config))


def make_onevision(**text):
    """LLaVA-OneVision: SigLIP and Qwen2, biased projections."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Qwen2Config(**{**TEXT, **text}),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return _ready(LlavaOnevisionForConditionalGeneration(config))


def batch_of(model, rows, seed=0, side="left"):
    """One image per row and `rows[i]` words after it, padded on one side."""
    torch.manual_seed(seed)
    pixels, sizes, ids = [], [], []
    kind = type(model).__name__
    for row, words in enumerate(rows):
        if kind.startswith("LlavaFor"):
            pixels.append(torch.randn(3, 28, 28))
            count = 16
        else:
            height, width = [(56, 56), (28, 56), (40, 56)][row % 3]
            crops = torch.randn(5, 3, 28, 28)
            pixels.append(crops)
            sizes.append([height, width])
            given = {"pixel_values": crops[None], "image_sizes": torch.tensor([[height, width]])}
            with torch.no_grad():
                count = model.model.get_image_features(**given).pooler_output[0].shape[0]
        text = torch.randint(1, IMAGE, (words + 2,))
        ids.append(torch.cat([text[:2], torch.full((count,), IMAGE), text[2:]]))
    longest = max(map(len, ids))
    input_ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, words in enumerate(ids):
        at = longest - len(words) if side == "left" else 0
        input_ids[row, at : at + len(words)] = words
        mask[row, at : at + len(words)] = 1
    out = {"input_ids": input_ids, "attention_mask": mask, "pixel_values": torch.stack(pixels)}
    return out if not sizes else {**out, "image_sizes": torch.tensor(sizes)}


def plain(model, inputs, count, **settings):
    """The ids of the model's own greedy `generate`."""
    return model.generate(**inputs, max_new_tokens=count, do_sample=False, **settings)
