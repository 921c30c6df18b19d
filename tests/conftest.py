"""Settings of every test: one thread per worker, and Triton in its interpreter without a GPU."""

import os

import torch

# Triton reads the switch when kernels are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
