"""Settings of every test: one thread per worker, for parallel workers share the cores."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
