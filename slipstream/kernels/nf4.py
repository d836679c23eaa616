"""NF4, the 4-bit data type of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): blocks of 64 values, each the nearest of
16 quantiles of the normal distribution times the block's largest magnitude, which is kept in fp32. 4.5 bits a value.

Values and the order of codes are those of bitsandbytes. Each slice along the first dimension is packed for itself.

Dims: E slices, P bytes of one: 32 bytes of codes a block, the first of two values in the high bits, then 4 a block.
"""

import functools
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F

from slipstream.kernels import HAS_TRITON, runs_on

BLOCK = 64
BYTES = BLOCK // 2 + 4  # of a block
# The paper's appendix E: 7 quantiles below zero and 8 above, evenly spaced in probability, and zero.
QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_VALUES = 4096  # that a program of the kernel writes


def quantize_nf4(weight: torch.Tensor) -> torch.Tensor:
    """`[E, ...]` of any floating-point dtype, each of the E slices in blocks of its own -> bytes `[E, P]`.

    Computes on the device of `weight`, one slice at a time. Example: 64 values of which the largest is 2 and the first
    two are 2 and -0.9 -> first byte 0xF3 (1.0 and -0.39 of 2).
    """
    slices, size = weight.shape[0], prod(weight.shape[1:])
    blocks = _blocks(size)
    packed_EP = torch.empty(slices, blocks * BYTES, dtype=torch.uint8, device=weight.device)
    table = _quantiles(weight.device)
    middles = (table[1:] + table[:-1]) / 2
    for one, packed in zip(weight, packed_EP, strict=True):
        values = F.pad(one.detach().float().flatten(), (0, blocks * BLOCK - size)).view(blocks, BLOCK)
        largest = values.abs().amax(1)
        scaled = values / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
        packed[: blocks * BLOCK // 2] = (codes[:, ::2] << 4 | codes[:, 1::2]).flatten()
        packed[blocks * BLOCK // 2 :] = largest.view(torch.uint8)
    return packed_EP


def dequantize_nf4(packed_EP: torch.Tensor, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What `quantize_nf4` packed, as `[E, ...]` of `size` in `dtype`, multiplied in fp32.

    Example: the byte 0xF3 of a block whose largest is 2 -> 2.0, -0.79.
    """
    if not runs_on(packed_EP):
        return dequantize_nf4_reference(packed_EP, size, dtype)
    out = torch.empty(*size, dtype=dtype, device=packed_EP.device)
    values = prod(size[1:])
    if out.numel():
        grid = (-(-values // _VALUES), size[0])
        packed = packed_EP.contiguous()
        table = _quantiles(packed.device)
        _dequantize_kernel[grid](
            packed, packed.view(torch.float32), table, out, values, _blocks(values), VALUES=_VALUES, num_warps=8
        )
    return out


def dequantize_nf4_reference(packed_EP: torch.Tensor, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What `dequantize_nf4` computes."""
    values = prod(size[1:])
    blocks = _blocks(values)
    codes = packed_EP[:, : blocks * BLOCK // 2].int()
    largest = packed_EP[:, blocks * BLOCK // 2 :].contiguous().view(torch.float32)
    units = _quantiles(packed_EP.device)[torch.stack([codes >> 4, codes & 15], dim=-1)].view(-1, blocks, BLOCK)
    return (units * largest[:, :, None]).flatten(1)[:, :values].reshape(*size).to(dtype)


def _blocks(values: int) -> int:
    return -(-values // BLOCK)


@functools.cache
def _quantiles(device: torch.device) -> torch.Tensor:
    return torch.tensor(QUANTILES, dtype=torch.float32, device=device)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _dequantize_kernel(packed, largest, table, out, values, blocks, VALUES: tl.constexpr):
        one = tl.program_id(1).to(tl.int64)
        first = tl.program_id(0) * VALUES
        byte = first // 2 + tl.arange(0, VALUES // 2)
        inside = byte < blocks * 32
        codes = tl.load(packed + one * blocks * 36 + byte, mask=inside, other=0).to(tl.int32)
        scale = tl.load(largest + one * blocks * 9 + blocks * 8 + byte // 32, mask=inside, other=0.0)
        high = tl.load(table + (codes >> 4)) * scale
        low = tl.load(table + (codes & 15)) * scale
        at = first + tl.arange(0, VALUES)
        both = tl.interleave(high, low).to(out.dtype.element_ty)
        tl.store(out + one * values + at, both, mask=at < values)
