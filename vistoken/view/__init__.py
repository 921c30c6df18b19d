"""Pictures of what a method did to an image's tokens."""
