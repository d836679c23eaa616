"""The experts' MLP as grouped GEMMs: gather rows, up, activation, down, weighted sum per token.

Saves only the input and the pre-activation for backward, after SonicMoE (Guo et al. 2025, arXiv 2512.14080): the
activation is recomputed, and the routing weights' gradient comes from the down projection's input gradient, so that
neither the gathered rows nor the down projection's output are kept.

Dims: T tokens, H hidden, K experts per token, E experts, R = T * K rows sorted by expert, I intermediate,
N = I, or 2I where gate and up are fused. Weights are `[E, in, out]` views, whatever their layout in memory.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from slipstream.kernels.sum_rows import sum_rows, sum_rows_reference
from slipstream.moe.routing import Routing

Activation = Callable[[torch.Tensor], torch.Tensor]


def grouped_mlp(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    routing: Routing,
    up_EHN: torch.Tensor,
    down_EIH: torch.Tensor,
    activation: Activation,
    up_bias_EN: torch.Tensor | None = None,
    down_bias_EH: torch.Tensor | None = None,
    unowned_rows: bool = False,
) -> torch.Tensor:
    """Weighted sum of each token's experts, `[T, H]` in the dtype of `x_TH`. Oracle: `reference.experts_reference`.

    `activation` maps `[R, N] -> [R, I]` row by row and has no trainable parameters. The GEMMs run in the weights'
    dtype, sums over experts in fp32. `unowned_rows` says that some rows may lie behind `routing.ends_E[-1]`; they
    contribute nothing.
    """
    return _GroupedMLP.apply(
        x_TH, weights_TK, up_EHN, down_EIH, up_bias_EN, down_bias_EH, routing, activation, unowned_rows
    )


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        up_EHN: torch.Tensor,
        down_EIH: torch.Tensor,
        up_bias_EN: torch.Tensor | None,
        down_bias_EH: torch.Tensor | None,
        routing: Routing,
        activation: Activation,
        unowned_rows: bool,
    ) -> torch.Tensor:
        rows_RH = x_TH[routing.token_R].to(up_EHN.dtype)
        hidden_RN = _grouped_linear(rows_RH, up_EHN, up_bias_EN, routing)
        y_RH = _grouped_linear(activation(hidden_RN), down_EIH, down_bias_EH, routing)
        if unowned_rows:
            y_RH = zero_unowned(y_RH, routing)
        ctx.save_for_backward(x_TH, weights_TK, hidden_RN, up_EHN, down_EIH, down_bias_EH, *routing)
        ctx.activation, ctx.unowned_rows = activation, unowned_rows
        return sum_rows(y_RH, routing.row_TK, weights_TK, x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, weights_TK, hidden_RN, up_EHN, down_EIH, down_bias_EH, *rest = ctx.saved_tensors
        routing = Routing(*rest)
        need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weights = grad_up = grad_down = grad_up_bias = grad_down_bias = None

        weight_R1 = weights_TK.flatten()[routing.slot_R, None]
        grad_RH = grad_TH[routing.token_R].to(down_EIH.dtype)
        # Unweighted: the weights enter after the product with the activation, so one GEMM serves both gradients.
        grad_act_RI = grouped_mm(grad_RH, down_EIH.transpose(1, 2), routing.ends_E)
        if ctx.unowned_rows:
            grad_act_RI = zero_unowned(grad_act_RI, routing)
            hidden_RN = zero_unowned(hidden_RN, routing)
        with torch.enable_grad():
            hidden_RN = hidden_RN.detach().requires_grad_()
            act_RI = ctx.activation(hidden_RN)

        if need_weights:
            grad_weight_R = torch.linalg.vecdot(grad_act_RI.float(), act_RI.detach().float())
            if down_bias_EH is not None:
                bias_RH = _rows_of(down_bias_EH, routing)
                if ctx.unowned_rows:
                    bias_RH = zero_unowned(bias_RH, routing)
                grad_weight_R = grad_weight_R + torch.linalg.vecdot(grad_RH.float(), bias_RH.float())
            # One 0 more, for the slots whose row was left out.
            row_TK = routing.row_TK.clamp(max=grad_weight_R.shape[0])
            grad_weights = F.pad(grad_weight_R, (0, 1))[row_TK].to(weights_TK.dtype)
        if need_down:
            weighted_RI = (act_RI.detach() * weight_R1).to(down_EIH.dtype)
            grad_down = _weight_grad(weighted_RI, grad_RH, routing, down_EIH)
        if need_down_bias:
            grad_down_bias = _bias_grad((grad_RH * weight_R1).to(down_EIH.dtype), routing)
        if need_x or need_up or need_up_bias:
            (grad_hidden_RN,) = torch.autograd.grad(act_RI, hidden_RN, (grad_act_RI * weight_R1).to(act_RI.dtype))
            del act_RI, grad_act_RI, grad_RH
            if need_up:
                grad_up = _weight_grad(x_TH[routing.token_R].to(up_EHN.dtype), grad_hidden_RN, routing, up_EHN)
            if need_up_bias:
                grad_up_bias = _bias_grad(grad_hidden_RN, routing)
            if need_x:
                grad_rows_RH = grouped_mm(grad_hidden_RN, up_EHN.transpose(1, 2), routing.ends_E)
                if ctx.unowned_rows:
                    grad_rows_RH = zero_unowned(grad_rows_RH, routing)
                grad_x = sum_rows(grad_rows_RH, routing.row_TK, None, x_TH.dtype)
        return grad_x, grad_weights, grad_up, grad_down, grad_up_bias, grad_down_bias, None, None, None


def grouped_mlp_autograd(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    routing: Routing,
    up_EHN: torch.Tensor,
    down_EIH: torch.Tensor,
    activation: Activation,
    up_bias_EN: torch.Tensor | None = None,
    down_bias_EH: torch.Tensor | None = None,
    unowned_rows: bool = False,
    post_norm: Activation | None = None,
) -> torch.Tensor:
    """What `grouped_mlp` computes, left to autograd: for activations and post-expert norms with trainable parameters.

    Keeps every intermediate for backward.
    """
    # Zeroed rows on the way in have zeroed gradients on the way back, where grouped_mm leaves memory as it was.
    clean = (lambda rows: zero_unowned(rows, routing)) if unowned_rows else (lambda rows: rows)
    rows_RH = clean(x_TH[routing.token_R].to(up_EHN.dtype))
    hidden_RN = clean(_grouped_linear(rows_RH, up_EHN, up_bias_EN, routing))
    y_RH = clean(_grouped_linear(clean(activation(hidden_RN)), down_EIH, down_bias_EH, routing))
    if post_norm is not None:
        y_RH = post_norm(y_RH)
    return sum_rows_reference(y_RH, routing.row_TK, weights_TK, x_TH.dtype)


def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """One GEMM per expert over row groups: `[R, A] x [E, A, B] -> [R, B]`, or `[A, R] x [R, B] -> [E, A, B]`.

    torch's kernel wants every leading stride to be a multiple of 16 bytes; other widths take a loop that reads
    `ends_E` back to the host. Rows behind ends_E[-1] come out undefined.
    """
    if all(_is_aligned(tensor) for tensor in (a, b)):
        return F.grouped_mm(a, b, offs=ends_E)
    ends = ends_E.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if b.dim() == 2:
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])
    out = a.new_zeros(a.shape[0], b.shape[-1])
    for expert, (start, end) in enumerate(spans):
        out[start:end] = a[start:end] @ b[expert]
    return out


def zero_unowned(rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    """`rows [R, …]` with those that belong to no expert here set to zero (out of place, differentiable)."""
    unowned_R = routing.expert_R >= routing.ends_E.shape[0]
    return rows.masked_fill(unowned_R.view(-1, *[1] * (rows.dim() - 1)), 0)


def _is_aligned(tensor: torch.Tensor) -> bool:
    leading = [stride for stride in tensor.stride() if stride != 1]
    return all(stride * tensor.element_size() % 16 == 0 for stride in leading) and tensor.data_ptr() % 16 == 0


def _rows_of(bias_EN: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The bias of each row's expert, `[R, N]`; rows of no expert get the last one's."""
    return bias_EN[routing.expert_R.clamp(max=bias_EN.shape[0] - 1)]


def _grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> torch.Tensor:
    out = grouped_mm(rows, weight, routing.ends_E)
    return out if bias is None else out + _rows_of(bias, routing)


def _weight_grad(inputs: torch.Tensor, grads: torch.Tensor, routing: Routing, weight: torch.Tensor) -> torch.Tensor:
    """`inputs^T @ grads` per expert, `[E, in, out]`, computed in the memory order of `weight` so that the gradient
    needs no copy where it meets the parameter."""
    inputs, grads = inputs.contiguous(), grads.contiguous()
    if weight.stride(-1) == 1:
        return grouped_mm(inputs.t(), grads, routing.ends_E)
    return grouped_mm(grads.t(), inputs, routing.ends_E).transpose(1, 2)


def _bias_grad(grads: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sum of each expert's rows, `[E, N]`, as a grouped GEMM with ones: deterministic, accumulated in fp32."""
    ones = grads.new_ones(grads.shape[0], 8)  # 8 columns: the fewest that are 16 bytes in bf16
    return grouped_mm(ones.t(), grads.contiguous(), routing.ends_E)[:, 0]
