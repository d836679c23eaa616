"""Where kernels can run: compiled on a GPU, or interpreted where TRITON_INTERPRET was set before Triton's import."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
compiled_or_interpreted = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="run by test_interpreted.py, or on a GPU"
)
