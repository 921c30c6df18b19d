"""Tiny random vision-language models, and prompts for them."""

import torch
import transformers as t

IMAGE = 99
VOCAB = 100


def text_config(layers=3):
    return t.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def clip_config(size=28, layers=4, patch=7):
    return t.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        image_size=size, patch_size=patch, projection_dim=32,
    )  # fmt: skip


def seeded(model, std=0.35, seed=0):
    """Weights large enough that the arg-max is not flat, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "newline" in name or "class_embedding" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def llava(layers=3, attention="sdpa"):
    config = t.LlavaConfig(
        vision_config=clip_config(), text_config=text_config(layers), image_token_id=IMAGE,
        image_token_index=IMAGE, image_seq_length=16,
    )  # fmt: skip
    config._attn_implementation = attention
    return seeded(
        t.LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    )


PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def llava_next(layers=3, attention="sdpa", size=28, patch=7):
    points = [[high * size // 28, wide * size // 28] for high, wide in PINPOINTS]
    config = t.LlavaNextConfig(
        vision_config=clip_config(size, patch=patch), text_config=text_config(layers),
        image_token_id=IMAGE, image_token_index=IMAGE, image_grid_pinpoints=points,
    )  # fmt: skip
    return seeded(
        t.LlavaNextForConditionalGeneration._from_config(config, attn_implementation=attention)
    )


def onevision(layers=3, aspect="anyres_max_9"):
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            image_size=28, patch_size=7, vision_use_head=False,
        ),
        text_config=t.Qwen2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=None,
            pad_token_id=0,
        ),
        image_token_id=IMAGE, image_token_index=IMAGE, video_token_id=98, video_token_index=98,
        image_grid_pinpoints=PINPOINTS, vision_aspect_ratio=aspect,
    )  # fmt: skip
    return seeded(
        t.LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    )


def qwen(layers=3):
    config = t.Qwen2_5_VLConfig(
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4,
            out_hidden_size=32, window_size=16, fullatt_block_indexes=[1],
        ),
        text_config=dict(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=None,
            pad_token_id=0, rope_parameters=dict(
                rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4
            ),
        ),
        image_token_id=IMAGE, video_token_id=98, vision_start_token_id=97, vision_end_token_id=96,
    )  # fmt: skip
    return seeded(
        t.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    )


def internvl(layers=3):
    config = t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=[28, 28], patch_size=[7, 7],
        ),
        text_config=text_config(layers), image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    return seeded(
        t.InternVLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    )


def words(count, seed=0):
    """Random text tokens, never a special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 95, (count,), generator=generator).tolist()


def batch(rows, pad="left"):
    """`input_ids` and `attention_mask` of rows of ids."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = [0] * (width - len(row))
        left = pad == "left"
        ids.append(fill + row if left else row + fill)
        mask.append([0] * len(fill) + [1] * len(row) if left else [1] * len(row) + [0] * len(fill))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def pictures(count, seed=0, size=28):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def packed_length(model, size):
    """Image tokens that the plain model makes of an image of this size."""
    base = model.model
    parts = parts_of(model, size)
    g = base.config.vision_config.image_size // base.config.vision_config.patch_size
    zeros = torch.zeros(parts, g * g, 1)
    options = {"image_newline": torch.zeros(1)}
    if "Onevision" not in type(model).__name__:
        options["vision_feature_select_strategy"] = "default"
    return base.pack_image_features([zeros], torch.tensor([size]), **options)[0][0].shape[0]


def parts_of(model, size):
    from transformers.image_processing_utils import select_best_resolution

    high, wide = select_best_resolution(size, PINPOINTS)
    side = model.config.vision_config.image_size
    return 1 + (high // side) * (wide // side)


def anyres(model, sizes, seed=0):
    """Padded pixels `[images, P, 3, h, w]` and sizes, as the processor makes them."""
    parts = [parts_of(model, size) for size in sizes]
    pixels = torch.zeros(len(sizes), max(parts), 3, 28, 28)
    for index, (count, size) in enumerate(zip(parts, sizes, strict=True)):
        pixels[index, :count] = pictures(count, seed + sum(size))
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
