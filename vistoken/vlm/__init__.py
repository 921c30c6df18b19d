"""Vision-language models: fewer image tokens, and generation without host work."""
