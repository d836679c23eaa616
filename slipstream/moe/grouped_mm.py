"""One GEMM per expert over groups of rows, and what follows from it.

Dims: R rows sorted by expert, E experts, A and B the widths of a projection.
"""

import torch
import torch.nn.functional as F

from slipstream.fp8 import grouped_mm_fp8

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of torch's kernel


def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends_E: torch.Tensor, fp8: bool = False) -> torch.Tensor:
    """One GEMM per expert over row groups: `[R, A] x [E, A, B] -> [R, B]`, or `[A, R] x [R, B] -> [E, A, B]`.

    torch's kernel wants every leading stride to be a multiple of 16 bytes; other widths, and fp64, take a loop that
    reads `ends_E` back to the host. Rows behind ends_E[-1] come out undefined. `fp8`, of the first form only, rounds
    both operands to e4m3.
    """
    if fp8:
        return grouped_mm_fp8(a, b, ends_E)
    if a.dtype in _DTYPES and all(_is_aligned(tensor) for tensor in (a, b)):
        return F.grouped_mm(a, b, offs=ends_E).contiguous()  # torch pads rows to 16 bytes; our kernels know of none
    ends = ends_E.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if b.dim() == 2:
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])
    out = a.new_zeros(a.shape[0], b.shape[-1])
    for expert, (start, end) in enumerate(spans):
        out[start:end] = a[start:end] @ b[expert]
    return out


def weight_grad(inputs: torch.Tensor, grads: torch.Tensor, ends_E: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`inputs^T @ grads` per expert, `[E, in, out]`, computed in the memory order of `weight` so that the gradient
    needs no copy where it meets the parameter."""
    inputs, grads = inputs.contiguous(), grads.contiguous()
    if weight.stride(-1) == 1:
        return grouped_mm(inputs.t(), grads, ends_E)
    return grouped_mm(grads.t(), inputs, ends_E).transpose(1, 2)


def bias_grad(grads: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Sum of each expert's rows, `[E, N]`, as a grouped GEMM with ones: deterministic, accumulated in fp32."""
    ones = grads.new_ones(grads.shape[0], 8)  # 8 columns: the fewest that are 16 bytes in bf16
    return grouped_mm(ones.t(), grads.contiguous(), ends_E)[:, 0].contiguous()


def _is_aligned(tensor: torch.Tensor) -> bool:
    leading = [stride for stride in tensor.stride() if stride != 1]
    return all(stride * tensor.element_size() % 16 == 0 for stride in leading) and tensor.data_ptr() % 16 == 0
