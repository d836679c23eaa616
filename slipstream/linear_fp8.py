"""Dense projections in FP8: the linear layers inside decoder layers, routers left out. The head stays as it is.

One operator, opaque to torch.compile, that is its own backward for the input. See `slipstream/fp8.py` for what is in
FP8 and what is not.

Dims: T tokens, A inputs, B outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slipstream import fp8, hf
from slipstream.compilation import decoder_layers
from slipstream.numerics import compute_dtype

torch.library.define("slipstream::mm_fp8", "(Tensor rows_TA, Tensor weight_AB) -> Tensor")
torch.library.impl("slipstream::mm_fp8", "default", fp8.mm_fp8)


@torch.library.register_fake("slipstream::mm_fp8")
def _(rows_TA: Tensor, weight_AB: Tensor) -> Tensor:
    return rows_TA.new_empty(rows_TA.shape[0], weight_AB.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    rows_TA, weight_AB = inputs
    for_rows, for_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(rows_TA if for_weight else None, weight_AB if for_rows else None)


def _backward(ctx: Any, grad_TB: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows_TA, weight_AB = ctx.saved_tensors
    grad_rows = None if weight_AB is None else torch.ops.slipstream.mm_fp8(grad_TB, weight_AB.t())
    # Transposed twice, so that it lies in memory as the parameter does.
    return grad_rows, None if rows_TA is None else (grad_TB.t() @ rows_TA).t()


torch.library.register_autograd("slipstream::mm_fp8", _backward, setup_context=_save)


class FP8Linear(nn.Linear):
    """A linear layer whose output and input gradient are FP8 GEMMs. Its bias, where it has one, is added in 16 bits."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = compute_dtype(self.weight)
        rows_TA = input.reshape(-1, self.in_features).to(dtype)
        out = torch.ops.slipstream.mm_fp8(rows_TA, self.weight.to(dtype).t()).view(*input.shape[:-1], -1)
        return out if self.bias is None else out + self.bias.to(dtype)


def install(model: PreTrainedModel) -> int:
    """Put the linear layers of `model` in FP8, in place: their class changes, parameters and names do not.

    Returns: how many; those with widths that are no multiples of 16 are left alone.

    Raises:
        ValueError: a device that cannot, a model without such layers, or one whose routers are not known.
    """
    given = "BackendConfig(linear='fp8')"
    kept = {module for _, _, router, _ in hf.routers(model) for module in router.modules()}
    if not kept and hf.num_routed_experts(model.config) is not None:
        raise ValueError(
            f"{given}: which layers of {type(model).__name__} are routers is not known, and those need 16 bits; "
            "use linear='auto'"
        )
    found = [
        module
        for layer in decoder_layers(model)
        for module in layer.modules()
        # Not of a subclass, such as a quantised one.
        if type(module) is nn.Linear and module not in kept and fp8.width_obstacle(*module.weight.shape) is None
    ]
    if not found:
        raise ValueError(f"{given}: {type(model).__name__} has no linear layers for it; use linear='auto'")
    if (problem := fp8.device_obstacle(found[0].weight)) is not None:
        raise ValueError(f"{given}: {problem}; use linear='auto'")
    for module in found:
        module.__class__ = FP8Linear
    return len(found)
