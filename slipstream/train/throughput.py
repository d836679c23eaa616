"""How fast and how full: the operations a trained token costs, MFU, and memory."""

import resource
import sys

import torch
from torch import nn
from transformers import PretrainedConfig

from slipstream import hf
from slipstream.description import unwrap
from slipstream.planning.devices import peak_bf16_tflops
from slipstream.planning.flops import forward_flops

GIB = 2**30


def flops_per_token(model: nn.Module, row_length: float) -> float | None:
    """Operations that training `model` on one token needs, in rows of `row_length` tokens; None where not known.

    A forward, as much again for the gradients of activations, and for those of weights the share of the weights that
    trains: 3 forwards for full fine-tuning, little more than 2 for LoRA. Recomputed activations do not count.
    """
    core = unwrap(model)
    config: PretrainedConfig = core.config
    if core.is_remote_code():
        return None  # counting builds the model anew, from the classes of Transformers
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trains = sum(size for size, trained in sizes if trained) / max(1, sum(size for size, _ in sizes))
    try:
        forward = forward_flops(config, max(1, round(row_length))).total
    except (AttributeError, ValueError, hf.PerLayerFieldError):
        return None  # an architecture whose config does not say what is counted from
    return forward * (2 + trains)


def mfu(tokens_per_second: float, flops: float, device: torch.device, ranks: int) -> float | None:
    """Model FLOPs utilisation: useful operations over the bf16 peak of all ranks' GPUs; None where it is not known."""
    if device.type != "cuda":
        return None
    peak = peak_bf16_tflops(torch.cuda.get_device_name(device))
    return None if peak is None else tokens_per_second * flops / (peak * 1e12 * ranks)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that was in use: tensors on the GPU since the last call, or of the whole process on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / GIB
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
