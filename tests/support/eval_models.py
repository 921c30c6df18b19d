"""Small classifiers and pictures for the tests of evaluation, command line and view."""

import timm
import torch
from PIL import Image
from timm.data import create_transform

from vistoken.models.load import Classifier

SIDE = 64


def tiny_vit(classes=10, seed=0):
    """A ViT with 4 blocks and 4 x 4 patches whose logits differ clearly between images."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, embed_dim=48, depth=4, num_heads=3,
        num_classes=classes,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


def tiny_classifier(classes=10, seed=0):
    """The same as `load_classifier` would return it."""
    return Classifier(
        name="tiny",
        model=tiny_vit(classes, seed),
        transform=create_transform(SIDE, mean=(0.5,) * 3, std=(0.5,) * 3),
        num_classes=classes,
        image_size=(SIDE, SIDE),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def picture(seed, side=80):
    """A random PIL image of coarse colour fields."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((side, side), Image.Resampling.BICUBIC)
