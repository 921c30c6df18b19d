"""Pictures of what a method did to an image's tokens, and of which patches attend to which."""

from vistoken.view.images import draw_images, kept_tokens
from vistoken.view.regions import draw_regions
from vistoken.view.tokens import View, draw, look
from vistoken.view.windows import Query, draw_windows

__all__ = [
    "Query",
    "View",
    "draw",
    "draw_images",
    "draw_regions",
    "draw_windows",
    "kept_tokens",
    "look",
]
