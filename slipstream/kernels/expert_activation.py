"""The activation between an expert's two projections, and its backward fused with the routing weight's.

Forward reads the pre-activation and writes the activation. Backward recomputes the activation from the pre-activation
and, in one pass, gives the pre-activation's gradient, the weighted activation (the left factor of the down
projection's weight gradient) and the routing weights' gradient, after SonicMoE (arXiv 2512.14080).

Dims: R rows sorted by expert, E experts, I intermediate, N = I or 2I, T tokens, K slots per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from slipstream.kernels import HAS_TRITON, runs_on

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu2", "relu")


@dataclass(frozen=True)
class Activation:
    """`f(min(gate, limit)) * (clamp(up, -limit, limit) + offset)`, or `f(min(h, limit))` without a gate.

    `f` is one of FUNCTIONS; silu is `h * sigmoid(alpha * h)`. Gate and up lie side by side, `[gate; up]`, or
    interleaved. GPT-OSS: silu, alpha 1.702, limit 7, offset 1, interleaved.
    """

    function: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0

    def __call__(self, hidden_RN: torch.Tensor) -> torch.Tensor:
        """`[R, N] -> [R, I]` in plain PyTorch."""
        gate_RI, up_RI = self._clamped(*self._halves(hidden_RN))
        value_RI, _ = _value_and_slope(gate_RI, self)
        return value_RI if up_RI is None else value_RI * (up_RI + self.offset)

    def differentiate(self, hidden_RN: torch.Tensor, grad_RI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The activation `[R, I]`, and what `grad_RI` becomes on the way back through it, `[R, N]`."""
        halves = self._halves(hidden_RN)
        gate_RI, up_RI = self._clamped(*halves)
        value_RI, slope_RI = _value_and_slope(gate_RI, self)
        grad_gate_RI = grad_RI * slope_RI * (halves[0] <= self.limit)
        if up_RI is None:
            return value_RI, grad_gate_RI
        factor_RI = up_RI + self.offset
        grad_up_RI = grad_RI * value_RI * (halves[1].abs() <= self.limit)
        both = (grad_gate_RI * factor_RI, grad_up_RI)
        grad_RN = torch.stack(both, -1).flatten(-2) if self.interleaved else torch.cat(both, -1)
        return value_RI * factor_RI, grad_RN

    def _halves(self, hidden_RN: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.gated:
            return (hidden_RN,)
        return (hidden_RN[..., ::2], hidden_RN[..., 1::2]) if self.interleaved else hidden_RN.chunk(2, dim=-1)

    def _clamped(
        self, gate_RI: torch.Tensor, up_RI: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.limit == math.inf:
            return gate_RI, up_RI
        return gate_RI.clamp(max=self.limit), None if up_RI is None else up_RI.clamp(-self.limit, self.limit)


def _value_and_slope(gate: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """`f(gate)` and `f'(gate)`."""
    if activation.function == "silu":
        sigmoid = torch.sigmoid(activation.alpha * gate)
        return gate * sigmoid, sigmoid * (1 + activation.alpha * gate * (1 - sigmoid))
    if activation.function == "gelu":
        normal = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        return gate * normal, normal + gate * torch.exp(-0.5 * gate**2) / math.sqrt(2 * math.pi)
    if activation.function == "gelu_tanh":
        scale = math.sqrt(2 / math.pi)
        tanh = torch.tanh(scale * (gate + 0.044715 * gate**3))
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh**2) * scale * (1 + 3 * 0.044715 * gate**2)
        return 0.5 * gate * (1 + tanh), slope
    positive = F.relu(gate)
    return (positive**2, 2 * positive) if activation.function == "relu2" else (positive, (gate > 0).to(gate.dtype))


class Gradients(NamedTuple):
    """What `activation_backward` returns; rows from `ends_E[-1]` on are undefined."""

    hidden_RN: torch.Tensor
    weighted_RI: torch.Tensor
    weights_TK: torch.Tensor


def activation_forward(
    hidden_RN: torch.Tensor,
    bias_EN: torch.Tensor | None,
    expert_R: torch.Tensor,
    ends_E: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """`activation(hidden + bias[expert])`, `[R, I]`, fp32 inside; rows from `ends_E[-1]` on are undefined."""
    if not runs_on(hidden_RN):
        return activation_forward_reference(hidden_RN, bias_EN, expert_R, ends_E, activation)
    rows, width = hidden_RN.shape
    inner = width // 2 if activation.gated else width
    act_RI = torch.empty(rows, inner, dtype=hidden_RN.dtype, device=hidden_RN.device)
    if rows:
        block = min(1024, 1 << (inner - 1).bit_length())
        _activation_forward_kernel[(rows, -(-inner // block))](
            hidden_RN.contiguous(),
            hidden_RN if bias_EN is None else bias_EN.contiguous(),
            expert_R,
            ends_E,
            ends_E.shape[0],
            act_RI,
            inner,
            **_constants(activation, bias_EN, block),
        )
    return act_RI


def activation_forward_reference(
    hidden_RN: torch.Tensor,
    bias_EN: torch.Tensor | None,
    expert_R: torch.Tensor,
    ends_E: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """What `activation_forward` computes."""
    wide_RN = hidden_RN.to(torch.promote_types(hidden_RN.dtype, torch.float32))
    if bias_EN is not None:
        wide_RN = wide_RN + bias_EN[expert_R.long()].to(wide_RN.dtype)
    return activation(wide_RN).to(hidden_RN.dtype)


def activation_backward(
    hidden_RN: torch.Tensor,
    bias_EN: torch.Tensor | None,
    expert_R: torch.Tensor,
    ends_E: torch.Tensor,
    grad_act_RI: torch.Tensor,
    slot_R: torch.Tensor,
    weights_TK: torch.Tensor,
    activation: Activation,
) -> Gradients:
    """Gradients through `weight * activation(hidden + bias[expert])`; `grad_act_RI`, the gradient before the weight, is
    overwritten. A slot without a row here gets a weight gradient of 0.

    Example: relu without gate, hidden [[2]], weight 0.5, grad_act [[3]] -> hidden grad [[1.5]], weighted activation
    [[1]], weight grad [[6]].
    """
    if not runs_on(hidden_RN):
        return activation_backward_reference(
            hidden_RN, bias_EN, expert_R, ends_E, grad_act_RI, slot_R, weights_TK, activation
        )
    (rows, inner), grad_act_RI = grad_act_RI.shape, grad_act_RI.contiguous()
    grad_hidden_RN = torch.empty_like(hidden_RN, memory_format=torch.contiguous_format)
    grad_weights_TK = torch.zeros_like(weights_TK, memory_format=torch.contiguous_format)
    if rows:
        # A thread has 16 bytes of pairs, or of gate and of up. Twice as many pairs change threads through shared
        # memory, in so many registers that a third as many threads run.
        a_thread = 4 if activation.interleaved else 8
        block = min(256 * a_thread, 1 << (inner - 1).bit_length())
        _activation_backward_kernel[(rows,)](
            hidden_RN.contiguous(),
            hidden_RN if bias_EN is None else bias_EN.contiguous(),
            expert_R,
            ends_E,
            ends_E.shape[0],
            grad_act_RI,
            slot_R,
            weights_TK.contiguous(),
            grad_hidden_RN,
            grad_weights_TK,
            inner,
            **_constants(activation, bias_EN, block),
            num_warps=max(4, block // (32 * a_thread)),
        )
    return Gradients(grad_hidden_RN, grad_act_RI, grad_weights_TK)


def activation_backward_reference(
    hidden_RN: torch.Tensor,
    bias_EN: torch.Tensor | None,
    expert_R: torch.Tensor,
    ends_E: torch.Tensor,
    grad_act_RI: torch.Tensor,
    slot_R: torch.Tensor,
    weights_TK: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> Gradients:
    """What `activation_backward` computes; of any function of rows, by automatic differentiation."""
    owned_R1 = (torch.arange(hidden_RN.shape[0], device=hidden_RN.device) < ends_E[-1])[:, None]
    wide = torch.promote_types(hidden_RN.dtype, torch.float32)
    wide_RN = hidden_RN.to(wide).masked_fill(~owned_R1, 0)
    grad_RI = grad_act_RI.to(wide).masked_fill(~owned_R1, 0)
    slot_R = slot_R.long().where(owned_R1[:, 0], 0)
    weight_R1 = weights_TK.flatten()[slot_R, None].to(wide)
    if bias_EN is not None:
        wide_RN = wide_RN + bias_EN[expert_R.long()].to(wide)
    if isinstance(activation, Activation):
        act_RI, grad_hidden_RN = activation.differentiate(wide_RN, grad_RI * weight_R1)
    else:  # vjp works inside an operator, where autograd is off
        act_RI, pull_back = torch.func.vjp(activation, wide_RN)  # type: ignore[misc]
        (grad_hidden_RN,) = pull_back(grad_RI * weight_R1)
    grad_weights = torch.zeros(weights_TK.numel(), dtype=wide, device=hidden_RN.device)
    grad_weights.index_add_(0, slot_R, torch.linalg.vecdot(grad_RI, act_RI))
    weighted_RI = grad_act_RI.copy_(act_RI * weight_R1)
    return Gradients(
        grad_hidden_RN.to(hidden_RN.dtype), weighted_RI, grad_weights.view_as(weights_TK).to(weights_TK.dtype)
    )


def _constants(activation: Activation, bias_EN: torch.Tensor | None, block: int) -> dict[str, object]:
    return {
        "FUNCTION": activation.function,
        "GATED": activation.gated,
        "INTERLEAVED": activation.interleaved,
        "ALPHA": activation.alpha,
        "LIMIT": 0.0 if activation.limit == math.inf else activation.limit,
        "OFFSET": activation.offset,
        "BIASED": bias_EN is not None,
        "BLOCK": block,
    }


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _load_halves(base, inner, start, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
        """Gate and up (or the only half twice) of columns `start : start + BLOCK` in fp32."""
        column = start + tl.arange(0, BLOCK)
        if GATED and INTERLEAVED:
            pair = 2 * start + tl.arange(0, 2 * BLOCK)
            both = tl.load(base + pair, mask=pair < 2 * inner, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(both, (BLOCK, 2)))
        else:
            gate = tl.load(base + column, mask=column < inner, other=0.0).to(tl.float32)
            up = gate
            if GATED:
                up = tl.load(base + inner + column, mask=column < inner, other=0.0).to(tl.float32)
        return gate, up

    @triton.jit
    def _function(gate, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
        """`f(gate)` and its slope."""
        if FUNCTION == "silu":
            sigmoid = tl.sigmoid(ALPHA * gate)
            value = gate * sigmoid
            slope = sigmoid * (1 + ALPHA * gate * (1 - sigmoid))
        elif FUNCTION == "gelu":
            normal = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
            value = gate * normal
            slope = normal + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
        elif FUNCTION == "gelu_tanh":
            half = 2 * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) - 1
            value = 0.5 * gate * (1 + half)
            inner_slope = 0.7978845608028654 * (1 + 0.134145 * gate * gate)
            slope = 0.5 * (1 + half) + 0.5 * gate * (1 - half * half) * inner_slope
        else:
            value = tl.maximum(gate, 0.0)
            slope = tl.where(gate > 0, 1.0, 0.0)
            if FUNCTION == "relu2":
                slope = 2 * value
                value = value * value
        return value, slope

    @triton.jit
    def _activation_forward_kernel(
        hidden,
        bias,
        expert_R,
        ends,
        experts,
        out,
        inner,
        FUNCTION: tl.constexpr,
        GATED: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        ALPHA: tl.constexpr,
        LIMIT: tl.constexpr,
        OFFSET: tl.constexpr,
        BIASED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        start = tl.program_id(1) * BLOCK
        if row < tl.load(ends + experts - 1):
            width = 2 * inner if GATED else inner
            gate, up = _load_halves(hidden + row * width, inner, start, GATED, INTERLEAVED, BLOCK)
            if BIASED:
                expert = tl.load(expert_R + row).to(tl.int64)
                gate_bias, up_bias = _load_halves(bias + expert * width, inner, start, GATED, INTERLEAVED, BLOCK)
                gate += gate_bias
                up += up_bias
            if LIMIT > 0:
                gate = tl.minimum(gate, LIMIT)
                up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
            value, _ = _function(gate, FUNCTION, ALPHA)
            if GATED:
                value *= up + OFFSET
            column = start + tl.arange(0, BLOCK)
            tl.store(out + row * inner + column, value.to(out.dtype.element_ty), mask=column < inner)

    @triton.jit
    def _activation_backward_kernel(
        hidden,
        bias,
        expert_R,
        ends,
        experts,
        grad_act,
        slot_R,
        weights,
        grad_hidden,
        grad_weights,
        inner,
        FUNCTION: tl.constexpr,
        GATED: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        ALPHA: tl.constexpr,
        LIMIT: tl.constexpr,
        OFFSET: tl.constexpr,
        BIASED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        if row < tl.load(ends + experts - 1):
            slot = tl.load(slot_R + row)
            weight = tl.load(weights + slot).to(tl.float32)
            width = 2 * inner if GATED else inner
            grad_weight = 0.0
            for start in range(0, inner, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < inner
                gate, up = _load_halves(hidden + row * width, inner, start, GATED, INTERLEAVED, BLOCK)
                if BIASED:
                    expert = tl.load(expert_R + row).to(tl.int64)
                    gate_bias, up_bias = _load_halves(bias + expert * width, inner, start, GATED, INTERLEAVED, BLOCK)
                    gate += gate_bias
                    up += up_bias
                gate_open = tl.full((BLOCK,), 1.0, tl.float32)
                up_open = gate_open
                if LIMIT > 0:
                    gate_open = tl.where(gate <= LIMIT, 1.0, 0.0)
                    up_open = tl.where((up >= -LIMIT) & (up <= LIMIT), 1.0, 0.0)
                    gate = tl.minimum(gate, LIMIT)
                    up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
                value, slope = _function(gate, FUNCTION, ALPHA)
                grad = tl.load(grad_act + row * inner + column, mask=inside, other=0.0).to(tl.float32)
                factor = up + OFFSET if GATED else gate_open
                act = value * factor if GATED else value
                grad_weight += tl.sum(grad * act, 0)
                tl.store(grad_act + row * inner + column, (act * weight).to(grad_act.dtype.element_ty), mask=inside)
                grad *= weight
                kind = grad_hidden.dtype.element_ty
                grad_gate = grad * slope * gate_open
                if GATED:
                    grad_up = grad * value * up_open
                    grad_gate *= factor
                    if INTERLEAVED:
                        both = tl.reshape(tl.join(grad_gate, grad_up), (2 * BLOCK,))
                        pair = 2 * start + tl.arange(0, 2 * BLOCK)
                        tl.store(grad_hidden + row * width + pair, both.to(kind), mask=pair < 2 * inner)
                    else:
                        tl.store(grad_hidden + row * width + column, grad_gate.to(kind), mask=inside)
                        tl.store(grad_hidden + row * width + inner + column, grad_up.to(kind), mask=inside)
                else:
                    tl.store(grad_hidden + row * width + column, grad_gate.to(kind), mask=inside)
            tl.store(grad_weights + slot, grad_weight)
