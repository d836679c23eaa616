"""FP8 operands of GEMMs: e4m3 values beside fp32 scales, one for each row of the left and each column of the right.

A scale is the row's largest magnitude over 448, the largest that e4m3 has (Micikevicius et al. 2022, arXiv 2209.05433).
Tensor cores of Hopper take both operands with the summed dimension contiguous, so the right one is stored transposed.

Dims: R rows, E matrices, A the summed dimension, B columns.
"""

from typing import NamedTuple

import torch

from slipstream.kernels import HAS_TRITON, runs_on

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
_SMALLEST = 1e-30  # a scale, so that its inverse is finite in fp32: rows of zeros stay zeros
_INVERSE = 1 / LARGEST
_FEW_COLUMNS = 512 * 64  # fewer than this make too few blocks of 64 to fill a GPU


class Operand(NamedTuple):
    """What stands for `values * scale[..., None]`."""

    values: torch.Tensor
    scale: torch.Tensor


def quantize_rows(rows_RA: torch.Tensor, ends_E: torch.Tensor | None = None) -> Operand:
    """A left operand: `[R, A]` e4m3 and `[R]` fp32, read once. Rows from `ends_E[-1]` on are undefined.

    Example: [[1, -2], [0, 0]] -> [[224, -448], [0, 0]], [2 / 448, 1e-30].
    """
    if not runs_on(rows_RA):
        return quantize_rows_reference(rows_RA)
    rows_RA = rows_RA.contiguous()
    rows, width = rows_RA.shape
    values_RA = torch.empty(rows, width, dtype=DTYPE, device=rows_RA.device)
    scale_R = torch.empty(rows, dtype=torch.float32, device=rows_RA.device)
    if rows:
        block = 1 << (width - 1).bit_length()
        _quantize_rows_kernel[(rows,)](
            rows_RA,
            rows_RA if ends_E is None else ends_E,
            0 if ends_E is None else ends_E.shape[0],
            values_RA,
            scale_R,
            width,
            GROUPED=ends_E is not None,
            SMALLEST=_SMALLEST,
            INVERSE=_INVERSE,
            BLOCK=block,
            num_warps=min(16, max(1, block // 1024)),
        )
    return Operand(values_RA, scale_R)


def quantize_rows_reference(rows_RA: torch.Tensor) -> Operand:
    """What `quantize_rows` computes."""
    scale_R = (rows_RA.float().abs().amax(1) * _INVERSE).clamp(min=_SMALLEST)
    return Operand((rows_RA.float() * (1 / scale_R)[:, None]).to(DTYPE), scale_R)


def quantize_columns(weight_EAB: torch.Tensor) -> Operand:
    """A right operand, of either layout in memory: `[E, B, A]` e4m3 and `[E, B]` fp32.

    Example: [[[1, 0], [-2, 4]]] -> [[[224, -448], [0, 448]]], [[2 / 448, 4 / 448]].
    """
    experts, inputs, outputs = weight_EAB.shape
    stored_EBA = weight_EAB.transpose(1, 2)
    if stored_EBA.is_contiguous():
        values, scale = quantize_rows(stored_EBA.reshape(experts * outputs, inputs))
        return Operand(values.view(experts, outputs, inputs), scale.view(experts, outputs))
    if not runs_on(weight_EAB):
        return quantize_columns_reference(weight_EAB)
    weight_EAB = weight_EAB.contiguous()
    values_EBA = torch.empty(experts, outputs, inputs, dtype=DTYPE, device=weight_EAB.device)
    scale_EB = torch.empty(experts, outputs, dtype=torch.float32, device=weight_EAB.device)
    block_a, block_b = (512, 16) if experts * outputs < _FEW_COLUMNS else (128, 64)
    _quantize_columns_kernel[(-(-outputs // block_b), experts)](
        weight_EAB,
        values_EBA,
        scale_EB,
        inputs,
        outputs,
        SMALLEST=_SMALLEST,
        INVERSE=_INVERSE,
        BLOCK_A=block_a,
        BLOCK_B=block_b,
    )
    return Operand(values_EBA, scale_EB)


def quantize_columns_reference(weight_EAB: torch.Tensor) -> Operand:
    """What `quantize_columns` computes."""
    scale_EB = (weight_EAB.float().abs().amax(1) * _INVERSE).clamp(min=_SMALLEST)
    values_EAB = (weight_EAB.float() * (1 / scale_EB)[:, None]).to(DTYPE)
    return Operand(values_EAB.transpose(1, 2).contiguous(), scale_EB)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _quantize_rows_kernel(
        rows,
        ends,
        groups,
        values,
        scales,
        width,
        GROUPED: tl.constexpr,
        SMALLEST: tl.constexpr,
        INVERSE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        last = row + 1
        if GROUPED:
            last = tl.load(ends + groups - 1).to(tl.int64)
        if row < last:
            column = tl.arange(0, BLOCK)
            inside = column < width
            row_values = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
            scale = tl.maximum(tl.max(tl.abs(row_values), 0) * INVERSE, SMALLEST)
            quantized = row_values * tl.div_rn(1.0, scale)
            tl.store(values + row * width + column, quantized.to(values.dtype.element_ty), mask=inside)
            tl.store(scales + row, scale)

    @triton.jit
    def _quantize_columns_kernel(
        weight,
        values,
        scales,
        inputs,
        outputs,
        SMALLEST: tl.constexpr,
        INVERSE: tl.constexpr,
        BLOCK_A: tl.constexpr,
        BLOCK_B: tl.constexpr,
    ):
        expert = tl.program_id(1).to(tl.int64)
        b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        weight += expert * inputs * outputs
        values += expert * inputs * outputs
        largest = tl.zeros((BLOCK_B,), tl.float32)
        for start in range(0, inputs, BLOCK_A):
            a = start + tl.arange(0, BLOCK_A)
            inside = (a < inputs)[:, None] & (b < outputs)[None, :]
            tile = tl.load(weight + a[:, None] * outputs + b[None, :], mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(tile), 0))
        scale = tl.maximum(largest * INVERSE, SMALLEST)
        tl.store(scales + expert * outputs + b, scale, mask=b < outputs)
        factor = tl.div_rn(tl.full((BLOCK_B,), 1.0, tl.float32), scale)
        for start in range(0, inputs, BLOCK_A):  # what was read a moment ago is still in the cache
            a = start + tl.arange(0, BLOCK_A)
            inside = (a < inputs)[:, None] & (b < outputs)[None, :]
            tile = tl.load(weight + a[:, None] * outputs + b[None, :], mask=inside, other=0.0).to(tl.float32)
            quantized = tl.trans((tile * factor[None, :]).to(values.dtype.element_ty))
            written = (b < outputs)[:, None] & (a < inputs)[None, :]
            tl.store(values + b[:, None] * inputs + a[None, :], quantized, mask=written)
