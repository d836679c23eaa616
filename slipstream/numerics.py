"""Precision rules shared by our operations."""

import torch


def compute_dtype(tensor: torch.Tensor, stored: torch.dtype | None = None) -> torch.dtype:
    """What an operation on `tensor` computes in: the dtype of autocast where it is on, or the tensor's own, or what the
    tensor is `stored` for.

    For operations that autocast does not know: grouped GEMMs and autograd functions of ours.
    """
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else stored or tensor.dtype
