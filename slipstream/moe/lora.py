"""Low-rank adapters on the experts' projections (LoRA: Hu et al. 2021, arXiv 2106.09685), as grouped GEMMs over rows
of rank r and a pass that adds their product. `W + A @ B` of an expert never exists.

Dims: R rows sorted by expert, E experts, A and B the widths of a projection, r rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels.add_low_rank import add_low_rank_
from slipstream.moe.grouped_mm import grouped_mm, weight_grad
from slipstream.moe.routing import Routing

_MULTIPLE = 8  # of which the rank has to be, so that rows of bf16 are 16 bytes wide, as grouped GEMMs want


class LowRank(NamedTuple):
    """What is added to each expert's weight `[A, B]`: `a @ b`, the scaling in `b`."""

    a_EAr: Tensor
    b_ErB: Tensor


def low_rank(parts: Sequence[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> LowRank:
    """Adapters that add up, side by side in one of their summed rank, padded with zeros. Differentiable.

    Args:
        parts: of each adapter `[E, r, A]`, `[B, r, E]` (how PEFT orders their elements) and the scaling.
        dtype: what to compute in.
    """
    a_parts, b_parts = [a for a, _, _ in parts], [b.permute(2, 1, 0) * scaling for _, b, scaling in parts]
    a_ErA, b_ErB = (one[0] if len(one) == 1 else torch.cat(one, dim=1) for one in (a_parts, b_parts))
    missing = -a_ErA.shape[1] % _MULTIPLE
    if missing:
        a_ErA, b_ErB = (F.pad(factor, (0, 0, 0, missing)) for factor in (a_ErA, b_ErB))
    return LowRank(a_ErA.to(dtype).contiguous().transpose(1, 2), b_ErB.to(dtype).contiguous())


def project(
    rows_RA: Tensor, weight_EAB: Tensor, a_EAr: Tensor | None, b_ErB: Tensor | None, routing: Routing, fp8: bool
) -> tuple[Tensor, Tensor | None]:
    """`rows @ (weight + a @ b)` of each row's expert, `[R, B]`, and `rows @ a`, `[R, r]`. `fp8` is for the weight; the
    adapter keeps its dtype.

    The input gradient too, from both factors transposed and swapped: then the second is what `factor_grads` takes.
    """
    out_RB = grouped_mm(rows_RA, weight_EAB, routing.ends_E, fp8)
    if a_EAr is None or b_ErB is None:
        return out_RB, None
    low_Rr = grouped_mm(rows_RA, a_EAr, routing.ends_E)
    return add_low_rank_(out_RB, low_Rr, b_ErB, routing.expert_R, routing.ends_E), low_Rr


def factor_grads(
    rows_RA: Tensor, grads_RB: Tensor, low_grads_Rr: Tensor | None, a_EAr: Tensor, b_ErB: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of both factors, from a projection's input rows and its output's gradients; `low_grads_Rr` are
    these times `b`, where they are known."""
    if low_grads_Rr is None:
        low_grads_Rr = grouped_mm(grads_RB, b_ErB.transpose(1, 2), ends_E)
    grad_a = weight_grad(rows_RA, low_grads_Rr, ends_E, a_EAr)
    grad_b = weight_grad(grouped_mm(rows_RA, a_EAr, ends_E), grads_RB, ends_E, b_ErB)
    return grad_a, grad_b
