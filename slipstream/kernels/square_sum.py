"""The sum of the squares of many large tensors, in one read at the speed of memory; without atomics, so the same every
time."""

from collections.abc import Sequence

import torch

from slipstream.kernels import HAS_TRITON, runs_on

_BLOCK = 4096
_PROGRAMS = 2048  # of a tensor: enough to fill any GPU, few enough that their sums cost nothing


def square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of all squares, an fp32 scalar; the host waits for nothing.

    Example: [[1, 2], [3]] -> 14.

    Args:
        tensors: at least one, of floating-point dtypes, on one device. One that is not contiguous costs a copy.
    """
    if not runs_on(tensors[0]):
        return square_sum_reference(tensors)
    parts = torch.zeros(len(tensors), _PROGRAMS, dtype=torch.float32, device=tensors[0].device)
    with torch.cuda.device_of(parts):
        for row, tensor in zip(parts, tensors, strict=True):
            if size := tensor.numel():
                programs = min(-(-size // _BLOCK), _PROGRAMS)
                _square_sum_kernel[(programs,)](tensor.contiguous(), row, size, BLOCK=_BLOCK, num_warps=8)
    return parts.sum()


def square_sum_reference(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """What `square_sum` computes."""
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).sum()


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _square_sum_kernel(tensor, out, size, BLOCK: tl.constexpr):
        first = tl.program_id(0).to(tl.int64) * BLOCK
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(first, size, tl.num_programs(0).to(tl.int64) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            values = tl.load(tensor + offsets, mask=offsets < size, other=0.0).to(tl.float32)
            total += values * values
        tl.store(out + tl.program_id(0), tl.sum(total))
