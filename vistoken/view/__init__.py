"""Pictures of what a method did to an image's tokens."""

from vistoken.view.tokens import View, draw, look

__all__ = ["View", "draw", "look"]
