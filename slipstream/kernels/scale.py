"""A tensor times a scalar that lies on the device, in place, at next to no cost where the scalar is 1."""

import torch

from slipstream.kernels import HAS_TRITON, runs_on

_BLOCK = 4096
_PROGRAMS = 2048  # enough to fill any GPU, few enough to start and stop in microseconds


def scale_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`tensor *= factor`, multiplied in fp32. The host does not learn `factor`, and where it is 1 nothing is written.

    Example: tensor [1, 2], factor 0.5 -> [0.5, 1].

    Args:
        tensor: of any shape, dense in memory.
        factor: scalar of any floating-point dtype on the same device.
    """
    if not runs_on(tensor):
        return scale_reference_(tensor, factor)
    if size := tensor.numel():
        _scale_kernel[(min(-(-size // _BLOCK), _PROGRAMS),)](tensor, factor, size, BLOCK=_BLOCK, num_warps=8)
    return tensor


def scale_reference_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """What `scale_` computes."""
    return tensor.copy_(tensor.float() * factor.float())


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _scale_kernel(tensor, factor, size, BLOCK: tl.constexpr):
        by = tl.load(factor).to(tl.float32)
        if by != 1:
            first = tl.program_id(0).to(tl.int64) * BLOCK
            for start in range(first, size, tl.num_programs(0).to(tl.int64) * BLOCK):
                offsets = start + tl.arange(0, BLOCK)
                values = tl.load(tensor + offsets, mask=offsets < size).to(tl.float32) * by
                tl.store(tensor + offsets, values.to(tensor.dtype.element_ty), mask=offsets < size)
