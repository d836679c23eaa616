"""Triton kernels, one file each, with their plain-PyTorch reference beside them. Nothing here imports the rest of us.

Triton comes with CUDA builds of torch. Without it, and for tensors elsewhere, a kernel's public function computes the
reference. TRITON_INTERPRET=1, set before Triton is imported, runs the kernels themselves on a CPU, slowly, for tests.
"""

import os
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None


def runs_on(tensor: torch.Tensor) -> bool:
    """Whether our Triton kernels take `tensor`: it lies on a CUDA device, or kernels are interpreted. They compute in
    fp32, so fp64 is left to the references."""
    reachable = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return HAS_TRITON and reachable and tensor.dtype != torch.float64
