"""Classifiers by name, from local files only."""

import json

import pytest
import timm
import torch
from eval_models import picture, tiny_classifier

from vistoken.errors import ConfigError, VistokenError
from vistoken.models.load import load_classifier


def test_timm_reads_a_local_checkpoint_and_brings_its_transform(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("test_vit", num_classes=3).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    loaded = load_classifier("test_vit", checkpoint=tmp_path / "w.pth", num_classes=3)
    image = loaded.transform(picture(1, 200))
    assert loaded.num_classes == 3
    assert image.shape[1:] == loaded.image_size == (160, 160)
    with torch.inference_mode():
        assert torch.equal(loaded.logits(image[None]), source(image[None]))
    assert not loaded.model.training


def test_timm_image_size_moves_model_and_transform():
    loaded = load_classifier("test_vit", image_size=96)
    assert loaded.image_size == (96, 96)
    assert loaded.logits(loaded.transform(picture(1, 200))[None]).shape == (1, 1000)


def test_reference_is_handed_in():
    made = tiny_classifier()
    assert load_classifier("reference", reference=lambda: made) is made
    with pytest.raises(ConfigError, match="no option num_classes"):
        load_classifier("reference", num_classes=3, reference=lambda: made)
    with pytest.raises(ConfigError, match="is known to"):
        load_classifier("reference")


def test_transformers_folder(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=48, patch_size=16, num_labels=4,
    )  # fmt: skip
    source = ViTForImageClassification(config).eval()
    source.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 48, "width": 48}, image_mean=[0.4] * 3)
    processor.save_pretrained(tmp_path)
    loaded = load_classifier(f"hf:{tmp_path}")
    image = loaded.transform(picture(2))
    assert (loaded.num_classes, loaded.image_size) == (4, (48, 48))
    assert loaded.mean == (0.4, 0.4, 0.4)
    with torch.inference_mode():
        expected = source(pixel_values=image[None]).logits
    torch.testing.assert_close(loaded.logits(image[None]), expected)
    with pytest.raises(ConfigError, match="not from num_classes"):
        load_classifier(f"hf:{tmp_path}", num_classes=3)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-clip-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny-clip-test").eval()
    torch.save(clip.state_dict(), folder / "clip.pt")
    return clip, folder / "clip.pt"


def test_open_clip_is_a_zero_shot_classifier(tiny_clip):
    import open_clip

    clip, path = tiny_clip
    names = ["cat", "dog", "ankle boot"]
    loaded = load_classifier("open_clip:tiny-clip-test", checkpoint=path, class_names=names)
    image = loaded.transform(picture(3))[None]
    tokenizer = open_clip.get_tokenizer("tiny-clip-test")
    with torch.inference_mode():
        feature = clip.encode_image(image)[0]
        feature = feature / feature.norm()
        expected = []
        for name in names:
            prompts = [make(name) for make in open_clip.SIMPLE_IMAGENET_TEMPLATES]
            texts = [clip.encode_text(tokenizer([prompt]))[0] for prompt in prompts]
            mean = sum(text / text.norm() for text in texts) / len(texts)
            expected.append(clip.logit_scale.exp() * feature @ (mean / mean.norm()))
    torch.testing.assert_close(loaded.logits(image)[0], torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert (loaded.num_classes, loaded.image_size) == (3, (32, 32))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("deit_smal_patch16_224", {}, "did you mean deit_small_patch16_224"),
        ("test_vit", {"checkpoint": "absent.pth"}, "there is no such file"),
        ("open_clip:ViT-B-33", {"class_names": ["a"]}, "near it: ViT-B-32"),
        ("open_clip:ViT-B-32", {}, "needs class names"),
        ("open_clip:ViT-B-32", {"pretrained": True, "class_names": ["a"]}, "laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32/nope", {"class_names": ["a"]}, "with one of"),
        ("open_clip:ViT-B-32", {"num_classes": 3}, "not a number"),
        ("hf:", {}, "write hf: and a folder"),
        ("resnet18", {"image_size": 64}, "does not take"),
    ],
)
def test_wrong_names_and_options(name, options, text):
    with pytest.raises(ConfigError, match=text):
        load_classifier(name, **options)


def test_weights_that_do_not_fit_say_so(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(VistokenError, match="must hold weights of this architecture"):
        load_classifier("test_vit", checkpoint=tmp_path / "w.pth")
    (tmp_path / "hf").mkdir()
    with pytest.raises(VistokenError, match="could not be loaded"):
        load_classifier(f"hf:{tmp_path / 'hf'}")
