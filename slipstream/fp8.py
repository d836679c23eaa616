"""FP8 training: which GEMMs run in FP8, on what, and how.

The output and the input's gradient are e4m3 GEMMs with one scale a row and a column; the weight's gradient keeps 16
bits: torchao's most accurate recipe, "rowwise_with_gw_hp". Operands are made from 16 bits each time, so nothing of FP8
is kept from forward to backward, and parameters, optimizer and checkpoints know nothing of it.

Dims: R rows, E experts, A the summed dimension, B columns.
"""

import functools

import torch
from torch import Tensor

from slipstream.kernels.fp8 import Operand, quantize_columns, quantize_rows

# Sums of e4m3 products stay in the tensor cores, with some 14 bits: the only way in which rowwise GEMMs are fast there.
_FAST_SUMS = True
_MULTIPLE = 16  # of which widths have to be: bytes that the copies into shared memory are aligned to


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why there are no FP8 GEMMs on `device`, or None."""
    if device.type != "cuda":
        return f"FP8 GEMMs need a Hopper GPU, and this runs on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    # torch's grouped FP8 GEMM with rowwise scales is built for this architecture alone, and traps on the next.
    if torch.version.hip is not None or (major, minor) != (9, 0):
        name = torch.cuda.get_device_name(device)
        return f"FP8 GEMMs need a Hopper GPU (compute capability 9.0), and {name} has {major}.{minor}"
    return None


def device_obstacle(weight: Tensor) -> str | None:
    """Why there will be no FP8 GEMMs with `weight`, which may still move to a GPU from elsewhere, or None."""
    device = weight.device
    if device.type != "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return obstacle(device)


def width_obstacle(*widths: int) -> str | None:
    """Why a weight with these dims cannot be in FP8, or None."""
    if all(width % _MULTIPLE == 0 for width in widths):
        return None
    return f"FP8 GEMMs take widths that are multiples of {_MULTIPLE}, not {' x '.join(map(str, widths))}"


def grouped_mm_fp8(rows_RA: Tensor, weight_EAB: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped_mm` of `[R, A]` and `[E, A, B]` in FP8, `[R, B]` bf16; weights of either layout in memory.

    Raises:
        ValueError: a device, dtype or width that cannot.
    """
    _check("experts", rows_RA, weight_EAB)
    if not rows_RA.shape[0]:
        return rows_RA.new_empty(0, weight_EAB.shape[2])
    left, right = quantize_rows(rows_RA, ends_E), quantize_columns(weight_EAB)
    if not rows_RA.is_cuda:
        return grouped_product_reference(left, right, ends_E)
    return torch._scaled_grouped_mm(
        left.values, right.values.transpose(1, 2), left.scale, right.scale, offs=ends_E, out_dtype=torch.bfloat16,
        use_fast_accum=_FAST_SUMS,
    )  # fmt: skip


def mm_fp8(rows_RA: Tensor, weight_AB: Tensor) -> Tensor:
    """`[R, A] @ [A, B]` in FP8, `[R, B]` bf16; a weight of either layout in memory.

    Raises:
        ValueError: a device, dtype or width that cannot.
    """
    _check("linear", rows_RA, weight_AB)
    if not rows_RA.shape[0]:
        return rows_RA.new_empty(0, weight_AB.shape[1])
    left, right = quantize_rows(rows_RA), quantize_columns(weight_AB[None])
    if not rows_RA.is_cuda:
        ends_1 = torch.tensor([rows_RA.shape[0]], dtype=torch.int32)
        return grouped_product_reference(left, right, ends_1)
    return torch._scaled_mm(
        left.values, right.values[0].t(), scale_a=left.scale[:, None], scale_b=right.scale, out_dtype=torch.bfloat16,
        use_fast_accum=_FAST_SUMS,
    )  # fmt: skip


def grouped_product_reference(left: Operand, right: Operand, ends_E: Tensor) -> Tensor:
    """What the grouped GEMM computes, in fp32 up to the result. Reads `ends_E` back to the host; for tests."""
    rows_RA = left.values.float() * left.scale[:, None]
    weight_EBA = right.values.float() * right.scale[:, :, None]
    out_RB = rows_RA.new_zeros(rows_RA.shape[0], weight_EBA.shape[1])
    ends = ends_E.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        out_RB[start:end] = rows_RA[start:end] @ weight_EBA[expert].t()
    return out_RB.bfloat16()


def _check(operation: str, rows: Tensor, weight: Tensor) -> None:
    problem = obstacle(rows.device) or width_obstacle(*weight.shape[-2:])
    if problem is None and (rows.dtype, weight.dtype) != (torch.bfloat16, torch.bfloat16):
        problem = f"FP8 GEMMs compute for bfloat16, not {weight.dtype}; load with dtype=torch.bfloat16, or use autocast"
    if problem is not None:
        raise ValueError(f"BackendConfig({operation}='fp8'): {problem}; or use {operation}='auto'")
