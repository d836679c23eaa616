"""The experts' MLP as grouped GEMMs: gather rows, up, activation, down, weighted sum per token.

One operator, opaque to torch.compile, so that a decoder layer compiles around it; no host synchronisation and the same
launches whatever the routing. Saves only the input and the pre-activation for backward, after SonicMoE (Guo et al.
2025, arXiv 2512.14080): the activation is recomputed, and the routing weights' gradient comes from the down
projection's input gradient, so that neither the gathered rows nor the down projection's output are kept. A frozen
weight costs no gradient; low-rank adapters beside it (`moe/lora.py`) are part of the operator.

Dims: T tokens, H hidden, K experts per token, E experts, R = T * K rows sorted by expert, I intermediate, r rank of an
adapter, N = I, or 2I where gate and up are fused. Weights are `[E, in, out]` views, whatever their layout in memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.kernels.expert_activation import (
    Activation,
    Gradients,
    activation_backward,
    activation_backward_reference,
    activation_forward,
)
from slipstream.kernels.gather_rows import gather_rows
from slipstream.kernels.sum_rows import sum_rows, sum_rows_reference
from slipstream.moe.activation import Function, function_named
from slipstream.moe.grouped_mm import bias_grad, grouped_mm, weight_grad
from slipstream.moe.lora import LowRank, factor_grads, project
from slipstream.moe.routing import Routing, sort_by_expert

_INPUTS = (
    "(Tensor x_TH, Tensor weights_TK, Tensor idx_TK, Tensor up_EHN, Tensor down_EIH, "
    "Tensor? up_bias_EN, Tensor? down_bias_EH, "
    "Tensor? up_a_EHr, Tensor? up_b_ErN, Tensor? down_a_EIr, Tensor? down_b_ErH, str activation, bool fp8"
)
TENSORS = 11  # of them


def grouped_mlp(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHN: Tensor,
    down_EIH: Tensor,
    activation: str,
    up_bias_EN: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    num_rows: int | None = None,
    up_lora: LowRank | None = None,
    down_lora: LowRank | None = None,
    fp8: bool = False,
) -> Tensor:
    """Weighted sum of each token's experts, `[T, H]` in the dtype of `x_TH`. Oracle: `reference.experts_reference`.

    `activation` is a name for `activation.function_named`: `[R, N] -> [R, I]` row by row, without trainable parameters.
    The GEMMs run in the weights' dtype, sums over experts in fp32. An id >= E adds nothing; `num_rows` is how many are
    below E, where the host knows it. The adapters add to `up_EHN` and `down_EIH`, in the same dtype. With `fp8` the
    weights' products with rows and gradients are in FP8 (`slipstream/fp8.py`, which raises); all is bf16 then.
    """
    factors = (*(up_lora or (None, None)), *(down_lora or (None, None)))
    return torch.ops.slipstream.experts(
        x_TH, weights_TK, idx_TK, up_EHN, down_EIH, up_bias_EN, down_bias_EH, *factors, activation, fp8,
        num_rows,
    )[0]  # fmt: skip


# Defined by hand rather than by torch.library.custom_op, whose checks cost the host 0.1 ms a call.
torch.library.define(
    "slipstream::experts", f"{_INPUTS}, SymInt? num_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(
    "slipstream::experts_backward",
    f"(Tensor grad_TH, {_INPUTS[1:]}, Tensor hidden_RN, Tensor[] routing, bool[] needs) -> Tensor[]",
)


def run_experts(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHN: Tensor,
    down_EIH: Tensor,
    up_bias_EN: Tensor | None,
    down_bias_EH: Tensor | None,
    up_a_EHr: Tensor | None,
    up_b_ErN: Tensor | None,
    down_a_EIr: Tensor | None,
    down_b_ErH: Tensor | None,
    activation: str,
    fp8: bool,
    num_rows: int | None,
) -> tuple[Tensor, ...]:
    """The output, and for backward: the pre-activation without its bias, and the routing."""
    routing = sort_by_expert(idx_TK, up_EHN.shape[0], num_rows)
    weights = (up_EHN, down_EIH, up_bias_EN, up_a_EHr, up_b_ErN, down_a_EIr, down_b_ErH)
    y_RH, hidden_RN = mlp_of_rows(x_TH, routing, *weights, activation, fp8)
    out_TH = sum_rows(y_RH, routing.row_TK, weights_TK, x_TH.dtype, down_bias_EH, idx_TK)
    return out_TH, hidden_RN, *routing


def mlp_of_rows(
    x_TH: Tensor,
    routing: Routing,
    up_EHN: Tensor,
    down_EIH: Tensor,
    up_bias_EN: Tensor | None,
    up_a_EHr: Tensor | None,
    up_b_ErN: Tensor | None,
    down_a_EIr: Tensor | None,
    down_b_ErH: Tensor | None,
    activation: str,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    """Each row's output, without weights and the bias of down, and its pre-activation, without that of up."""
    rows_RH = gather_rows(x_TH, routing.slot_R, routing.row_TK.shape[1], routing.ends_E, up_EHN.dtype)
    hidden_RN, _ = project(rows_RH, up_EHN, up_a_EHr, up_b_ErN, routing, fp8)
    del rows_RH
    act_RI = activate(function_named(activation), hidden_RN, up_bias_EN, routing)
    y_RH, _ = project(act_RI, down_EIH, down_a_EIr, down_b_ErH, routing, fp8)
    return y_RH, hidden_RN


@torch.library.register_fake("slipstream::experts")
def _(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHN: Tensor,
    down_EIH: Tensor,
    up_bias_EN: Tensor | None,
    down_bias_EH: Tensor | None,
    up_a_EHr: Tensor | None,
    up_b_ErN: Tensor | None,
    down_a_EIr: Tensor | None,
    down_b_ErH: Tensor | None,
    activation: str,
    fp8: bool,
    num_rows: int | None,
) -> tuple[Tensor, ...]:
    return empty_outputs(x_TH, idx_TK, up_EHN.shape[0], up_EHN.shape[2], up_EHN.dtype, num_rows)


def run_experts_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHN: Tensor,
    down_EIH: Tensor,
    up_bias_EN: Tensor | None,
    down_bias_EH: Tensor | None,
    up_a_EHr: Tensor | None,
    up_b_ErN: Tensor | None,
    down_a_EIr: Tensor | None,
    down_b_ErH: Tensor | None,
    activation: str,
    fp8: bool,
    hidden_RN: Tensor,
    routing: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weights, up, down, the biases and the adapters' factors: those that `needs` asks for, in the
    order of the arguments."""
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias, *need_factors = needs
    of_up, of_down = (need_up, *need_factors[:2]), (need_down, *need_factors[2:])
    route, top_k = Routing(*routing), idx_TK.shape[1]
    grads: dict[int, Any] = {}

    grad_RH = gather_rows(grad_TH, route.slot_R, top_k, route.ends_E, down_EIH.dtype)
    # Unweighted: the weights enter after the product with the activation, so one GEMM serves both gradients.
    grad_act_RI, low_grad_Rr = project(grad_RH, *transposed(down_EIH, down_b_ErH, down_a_EIr), route, fp8)
    through = activation_gradients(function_named(activation), hidden_RN, up_bias_EN, route, grad_act_RI, weights_TK)
    del grad_act_RI
    if need_weights:
        grads[1] = through.weights_TK
        if down_bias_EH is not None:
            grads[1] = grads[1] + bias_products(grad_TH, down_bias_EH, idx_TK).to(grads[1].dtype)
    grads[3], grads[8], grads[9] = projection_grads(
        of_down, through.weighted_RI, grad_RH, low_grad_Rr, down_EIH, down_a_EIr, down_b_ErH, route.ends_E
    )
    del grad_RH
    if need_down_bias:
        grads[5] = weights_by_expert(weights_TK, idx_TK, down_EIH).t() @ grad_TH.to(down_EIH.dtype)
    if need_up_bias:
        grads[4] = bias_grad(through.hidden_RN, route.ends_E)
    low_hidden_Rr = None
    if need_x:
        grad_rows_RH, low_hidden_Rr = project(through.hidden_RN, *transposed(up_EHN, up_b_ErN, up_a_EHr), route, fp8)
        grads[0] = sum_rows(grad_rows_RH, route.row_TK, None, x_TH.dtype)
        del grad_rows_RH
    if any(of_up):
        rows_RH = gather_rows(x_TH, route.slot_R, top_k, route.ends_E, up_EHN.dtype)
        grads[2], grads[6], grads[7] = projection_grads(
            of_up, rows_RH, through.hidden_RN, low_hidden_Rr, up_EHN, up_a_EHr, up_b_ErN, route.ends_E
        )
    return [grads[position] for position, need in enumerate(needs) if need]


def projection_grads(
    needs: Sequence[bool],
    rows_RA: Tensor,
    grads_RB: Tensor,
    low_grads_Rr: Tensor | None,
    weight_EAB: Tensor,
    a_EAr: Tensor | None,
    b_ErB: Tensor | None,
    ends_E: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a projection's weight and of its two factors where `needs` asks for them; of both or no factors.
    The rest is what `weight_grad` and `factor_grads` take."""
    of_weight = weight_grad(rows_RA, grads_RB, ends_E, weight_EAB) if needs[0] else None
    if not any(needs[1:]) or a_EAr is None or b_ErB is None:
        return of_weight, None, None
    return of_weight, *factor_grads(rows_RA, grads_RB, low_grads_Rr, a_EAr, b_ErB, ends_E)


@torch.library.register_fake("slipstream::experts_backward")
def _(
    grad_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHN: Tensor,
    down_EIH: Tensor,
    up_bias_EN: Tensor | None,
    down_bias_EH: Tensor | None,
    up_a_EHr: Tensor | None,
    up_b_ErN: Tensor | None,
    down_a_EIr: Tensor | None,
    down_b_ErH: Tensor | None,
    activation: str,
    fp8: bool,
    hidden_RN: Tensor,
    routing: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    inputs = (x_TH, weights_TK, up_EHN, down_EIH, up_bias_EN, down_bias_EH,
              up_a_EHr, up_b_ErN, down_a_EIr, down_b_ErH)  # fmt: skip
    return empty_gradients(inputs, needs)


def register_autograd(name: str) -> None:
    """Let autograd follow the operator `slipstream::NAME` by `NAME_backward`: inputs and outputs as `run_experts` has
    them, what is no tensor, such as the activation, up to `num_rows`."""
    operator = getattr(torch.ops.slipstream, f"{name}_backward")

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.settings = inputs[:TENSORS], inputs[TENSORS:-1]
        _, hidden_RN, *routing = output
        ctx.mark_non_differentiable(hidden_RN, *routing)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, hidden_RN, *routing)

    def backward(ctx: Any, grad_TH: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, hidden_RN, slot_R, row_TK, ends_E, expert_R = ctx.saved_tensors
        routing = [slot_R, row_TK, ends_E, expert_R]

        def gradients(needs: list[bool]) -> list[Tensor]:
            found: list[Tensor] = operator(grad_TH, *tensors, *ctx.settings, hidden_RN, routing, needs)
            return found

        return needed_gradients(ctx, grad_TH, gradients)

    torch.library.register_autograd(f"slipstream::{name}", backward, setup_context=save)


def needed_gradients(
    ctx: Any, grad_TH: Tensor | None, gradients: Callable[[list[bool]], list[Tensor]]
) -> tuple[Tensor | None, ...]:
    """What the autograd backward of an operator on `_INPUTS` returns.

    Args:
        gradients: from which of the inputs' gradients are needed, the ids left out, to those alone.
    """
    positions = [position for position in range(TENSORS) if position != 2]
    needs = [ctx.needs_input_grad[position] for position in positions]
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_TH is not None and any(needs):
        found = iter(gradients(needs))
        for position, need in zip(positions, needs, strict=True):
            result[position] = next(found) if need else None
    return tuple(result)


def empty_outputs(
    x_TH: Tensor, idx_TK: Tensor, experts: int, width: int, dtype: torch.dtype, num_rows: int | None
) -> tuple[Tensor, ...]:
    """What a fake `run_experts` returns, where the pre-activation has that `width` and `dtype`."""
    rows = idx_TK.numel() if num_rows is None else num_rows

    def int32(*size: Any) -> Tensor:
        return idx_TK.new_empty(size, dtype=torch.int32)

    routing = Routing(int32(rows), int32(*idx_TK.shape), int32(experts), int32(rows))
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty((rows, width), dtype=dtype), *routing


def empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """What an operator's fake backward returns: weights keep the layout in memory that they have."""
    return [
        torch.empty_like(tensor) if tensor.dim() == 3 else tensor.new_empty(tensor.shape)
        for tensor, need in zip(inputs, needs, strict=True)
        if need and tensor is not None
    ]


torch.library.impl("slipstream::experts", "default", run_experts)
torch.library.impl("slipstream::experts_backward", "default", run_experts_backward)
register_autograd("experts")


def transposed(weight: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What projects backwards: the transposes of a weight and of two factors."""
    return weight.transpose(1, 2), None if a is None else a.transpose(1, 2), None if b is None else b.transpose(1, 2)


def activate(function: Function, hidden_RN: Tensor, bias_EN: Tensor | None, routing: Routing) -> Tensor:
    if isinstance(function, Activation):
        return activation_forward(hidden_RN, bias_EN, routing.expert_R, routing.ends_E, function)
    return function(hidden_RN if bias_EN is None else hidden_RN + bias_EN[routing.expert_R])


def activation_gradients(
    function: Function, hidden_RN: Tensor, bias_EN: Tensor | None, routing: Routing, grad_act: Tensor, weights: Tensor
) -> Gradients:
    slot_R, _, ends_E, expert_R = routing
    if isinstance(function, Activation):
        return activation_backward(hidden_RN, bias_EN, expert_R, ends_E, grad_act, slot_R, weights, function)
    return activation_backward_reference(hidden_RN, bias_EN, expert_R, ends_E, grad_act, slot_R, weights, function)


def bias_products(grad_TH: Tensor, down_bias_EH: Tensor, idx_TK: Tensor) -> Tensor:
    """`<grad[t], bias[idx[t, k]]>`, `[T, K]`: what a down projection's bias adds to the routing weights' gradient."""
    products_TE = grad_TH.to(down_bias_EH.dtype) @ down_bias_EH.t()
    elsewhere_TK = idx_TK >= down_bias_EH.shape[0]
    return products_TE.gather(1, idx_TK.masked_fill(elsewhere_TK, 0)).masked_fill(elsewhere_TK, 0)


def weights_by_expert(weights_TK: Tensor, idx_TK: Tensor, down_EIH: Tensor) -> Tensor:
    """The routing weights as a matrix `[T, E]`; one column more takes those of other ranks' experts."""
    experts = down_EIH.shape[0]
    weights_TE = down_EIH.new_zeros(idx_TK.shape[0], experts + 1)
    return weights_TE.scatter_add_(1, idx_TK.clamp(max=experts), weights_TK.to(down_EIH.dtype))[:, :experts]


def grouped_mlp_autograd(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHN: Tensor,
    down_EIH: Tensor,
    activation: Function,
    up_bias_EN: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    num_rows: int | None = None,
    post_norm: Function | None = None,
    up_lora: LowRank | None = None,
    down_lora: LowRank | None = None,
) -> Tensor:
    """What `grouped_mlp` computes, left to autograd: for activations and post-expert norms with trainable parameters.

    Keeps every intermediate for backward.
    """
    routing = sort_by_expert(idx_TK, up_EHN.shape[0], num_rows)
    unowned_R1 = (torch.arange(routing.slot_R.shape[0], device=x_TH.device) >= routing.ends_E[-1])[:, None]

    def clean(rows: Tensor) -> Tensor:
        # Zeroed rows on the way in have zeroed gradients on the way back, where grouped_mm leaves memory as it was.
        return rows.masked_fill(unowned_R1, 0) if num_rows is None else rows

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, lora: LowRank | None) -> Tensor:
        out = clean(grouped_mm(rows, weight, routing.ends_E))
        if lora is not None:
            low_Rr = clean(grouped_mm(rows, lora.a_EAr, routing.ends_E))
            out = out + clean(grouped_mm(low_Rr, lora.b_ErB, routing.ends_E))
        return out if bias is None else out + bias[routing.expert_R]

    rows_RH = clean(x_TH[routing.token_R].to(up_EHN.dtype))
    act_RI = clean(activation(linear(rows_RH, up_EHN, up_bias_EN, up_lora)))
    y_RH = linear(act_RI, down_EIH, down_bias_EH, down_lora)
    if post_norm is not None:
        y_RH = post_norm(y_RH)
    return sum_rows_reference(y_RH, routing.row_TK, weights_TK, x_TH.dtype)
