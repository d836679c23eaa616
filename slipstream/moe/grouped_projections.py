"""JetMoE's mixtures, of attention heads too, without their loops over experts and without a wait for the GPU.

Transformers counts the rows of each expert on the host, splits by the counts and calls one GEMM an expert. Here the
counts stay on the device and one grouped GEMM takes all experts. Parameters stay as they are: only forwards change.

Dims: T tokens, H hidden, K experts per token, E experts, R = T·K rows sorted by expert, A and B a projection's inputs
and outputs.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from slipstream import hf_recurrent
from slipstream.moe.grouped_mm import grouped_mm, weight_grad
from slipstream.numerics import compute_dtype
from slipstream.parallel.units import class_of


def adapt(model: nn.Module) -> int:
    """Change the mixtures of `model` in place; returns how many sets of projections they have."""
    found = 0
    for module in model.modules():
        if class_of(module).__name__ == hf_recurrent.JETMOE_EXPERTS:
            module.forward = MethodType(_project, module)
            found += 1
        elif class_of(module).__name__ == hf_recurrent.JETMOE_ROUTER:
            module.forward = MethodType(_route, module)
    return found


def _project(self: Any, rows_RA: Tensor, ends_E: Tensor) -> Tensor:
    dtype = compute_dtype(self.weight)
    return torch.ops.slipstream.project_rows(rows_RA.to(dtype), self.weight.to(dtype).transpose(1, 2), ends_E)


def _route(self: Any, hidden_TH: Tensor) -> tuple[Tensor, ...]:
    """Choices in the order of the rows `[R]`, their tokens `[R]` and weights `[R]`, the end of each expert's rows
    `[E]`, which the projections take in the place of sizes, and the logits `[T, E]`."""
    logits_TE = self.layer(hidden_TH).float()
    chosen_TK, idx_TK = logits_TE.topk(self.top_k, dim=1)
    weights_TK = chosen_TK.softmax(1).type_as(hidden_TH)
    expert_R, order_R = idx_TK.flatten().sort()
    ends_E = torch.searchsorted(expert_R, torch.arange(self.num_experts, device=expert_R.device), right=True)
    return order_R, order_R // self.top_k, weights_TK.flatten()[order_R], ends_E.to(torch.int32), logits_TE


for _function in (_project, _route):  # bound functions named forward survive deepcopy, and pickle restores the class's
    _function.__name__ = "forward"

# Operators, because torch has no fake of grouped_mm but for bf16.
torch.library.define("slipstream::project_rows", "(Tensor rows_RA, Tensor weight_EAB, Tensor ends_E) -> Tensor")
torch.library.define(
    "slipstream::project_rows_weight_grad",
    "(Tensor rows_RA, Tensor grads_RB, Tensor ends_E, Tensor weight_EAB) -> Tensor",
)
torch.library.impl("slipstream::project_rows", "default", grouped_mm)
torch.library.impl("slipstream::project_rows_weight_grad", "default", weight_grad)


@torch.library.register_fake("slipstream::project_rows")
def _(rows_RA: Tensor, weight_EAB: Tensor, ends_E: Tensor) -> Tensor:
    return rows_RA.new_empty(rows_RA.shape[0], weight_EAB.shape[2])


@torch.library.register_fake("slipstream::project_rows_weight_grad")
def _(rows_RA: Tensor, grads_RB: Tensor, ends_E: Tensor, weight_EAB: Tensor) -> Tensor:
    return torch.empty_like(weight_EAB)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grads_RB: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows_RA, weight_EAB, ends_E = ctx.saved_tensors
    for_rows, for_weight, _ = ctx.needs_input_grad
    ops, grads_RB = torch.ops.slipstream, grads_RB.contiguous()
    grad_rows = ops.project_rows(grads_RB, weight_EAB.transpose(1, 2), ends_E) if for_rows else None
    grad_weight = ops.project_rows_weight_grad(rows_RA, grads_RB, ends_E, weight_EAB) if for_weight else None
    return grad_rows, grad_weight, None


torch.library.register_autograd("slipstream::project_rows", _backward, setup_context=_save)
