"""Token sparsity for vision transformers: one call makes an existing model cheaper."""

from vistoken._version import __version__
