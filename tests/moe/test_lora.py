"""Low-rank adapters in the experts' operator, against the loop over experts with `W + A @ B` in the weights' place."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from slipstream.moe import grouped_mlp as module
from slipstream.moe.activation import register
from slipstream.moe.grouped_mlp import grouped_mlp, grouped_mlp_autograd
from slipstream.moe.lora import low_rank
from slipstream.moe.reference import experts_reference
from tests.moe.test_grouped_mlp import ACTIVATIONS, FUSED, SHAPES, assert_matches, layouts, problem, run

RANK = 4
FACTORS = ("up_a", "up_b", "down_a", "down_b")


def adapted(shape: str, activation: str, biased: bool, transposed: bool):
    """A problem whose inputs also have PEFT's factors, `[E, r, in]` and `[out, r, E]`."""
    idx, inputs, function = problem(shape, activation, biased, transposed, torch.float32)
    for name, weight in (("up", inputs["up_EHN"]), ("down", inputs["down_EIH"])):
        experts, wide, out = weight.shape
        inputs |= {f"{name}_a": torch.randn(experts, RANK, wide) * 0.5, f"{name}_b": torch.randn(out, RANK, experts)}
    return idx, inputs, function


def oracle(idx, inputs, activation, scaling=0.7):
    plain = dict(inputs)
    for name, weight in (("up", "up_EHN"), ("down", "down_EIH")):
        a_ErA, b_BrE = plain.pop(f"{name}_a"), plain.pop(f"{name}_b")
        plain[weight] = plain[weight] + scaling * torch.einsum("era,bre->eab", a_ErA, b_BrE)
    return experts_reference(idx_TK=idx, activation=activation, **plain)


def ours(idx, inputs, activation, mlp=grouped_mlp, num_rows=None, scaling=0.7, dtype=torch.float32):
    plain = dict(inputs)
    up_a, up_b, down_a, down_b = (plain.pop(name) for name in FACTORS)
    if mlp is grouped_mlp:
        activation = register(activation.__name__, FUSED.get(activation, activation))
    lora = {
        name: low_rank([(a, b, scaling)], dtype)
        for name, a, b in (("up_lora", up_a, up_b), ("down_lora", down_a, down_b))
    }
    return mlp(idx_TK=idx, activation=activation, num_rows=num_rows, **plain, **lora)


@pytest.mark.parametrize("mlp", [grouped_mlp, grouped_mlp_autograd])
@pytest.mark.parametrize(("transposed", "biased"), [(False, False), (True, True)], ids=["out-in", "in-out and bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape, activation, biased, transposed, mlp) -> None:
    idx, inputs, function = adapted(shape, activation, biased, transposed)
    grad = torch.randn(inputs["x_TH"].shape)
    expected = run(oracle, idx, {n: t.double() for n, t in inputs.items()}, grad, activation=function)
    assert_matches(run(ours, idx, inputs, grad, activation=function, mlp=mlp), expected, 4e-6)


@pytest.mark.parametrize("mlp", [grouped_mlp, grouped_mlp_autograd])
@pytest.mark.parametrize("counted", [False, True], ids=["unknown number", "known number"])
def test_rows_of_other_ranks_contribute_nothing(counted, mlp) -> None:
    idx, inputs, function = adapted("plain", "swiglu", False, False)
    absent = torch.rand(idx.shape) < 0.5
    absent[0] = True
    idx = idx.masked_fill(absent, 8)
    inputs["weights_TK"] = inputs["weights_TK"].masked_fill(absent, 0.0)
    grad = torch.randn(inputs["x_TH"].shape)
    expected = run(oracle, idx, {n: t.double() for n, t in inputs.items()}, grad, activation=function)
    known = int((~absent).sum()) if counted else None
    assert_matches(run(ours, idx, inputs, grad, activation=function, mlp=mlp, num_rows=known), expected, 4e-6)


@pytest.mark.parametrize("only", ["up", "down"])
def test_one_projection_alone(only) -> None:
    idx, inputs, function = adapted("plain", "swiglu", False, False)
    (without,) = {"up", "down"} - {only}
    factors = {name: inputs.pop(name) for name in FACTORS}
    lora = low_rank([(factors[f"{only}_a"], factors[f"{only}_b"], 0.7)], torch.float32)
    name = register(function.__name__, FUSED[function])
    out = grouped_mlp(idx_TK=idx, activation=name, **inputs, **{f"{only}_lora": lora})
    silent = {f"{without}_b": torch.zeros_like(factors[f"{without}_b"])}
    torch.testing.assert_close(out, oracle(idx, inputs | factors | silent, function), rtol=1e-4, atol=1e-4)


def test_frozen_weights_cost_no_gradient(monkeypatch) -> None:
    """Neither a GEMM nor memory: only the factors' gradients are computed, and x's."""
    idx, inputs, function = adapted("plain", "swiglu", False, False)
    trained = {name: inputs[name].requires_grad_() for name in ("x_TH", *FACTORS)}
    monkeypatch.setattr(module, "weight_grad", None)  # what the weights' gradients come from
    ours(idx, inputs, function).sum().backward()
    assert all(tensor.grad is not None for tensor in trained.values())
    assert inputs["up_EHN"].grad is None


def test_adapters_add_up() -> None:
    a, b = torch.randn(2, 3, 3, 10), torch.randn(2, 12, 3, 3)
    both = low_rank([(a[0], b[0], 0.5), (a[1], b[1], 2.0)], torch.float32)
    assert both.a_EAr.shape == (3, 10, 8)
    delta = sum(scaling * torch.einsum("era,bre->eab", a[i], b[i]) for i, scaling in enumerate((0.5, 2.0)))
    torch.testing.assert_close(both.a_EAr @ both.b_ErB, delta)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_what_the_compiler_is_told_is_true(frozen) -> None:
    idx, inputs, function = problem("plain", "swiglu", False, False, torch.bfloat16)
    name = register(function.__name__, FUSED[function])
    up, down = inputs["up_EHN"], inputs["down_EIH"]
    factors = []
    for weight in (up, down):
        experts, wide, out = weight.shape
        parts = [(torch.randn(experts, RANK, wide), torch.randn(out, RANK, experts), 1.0)]
        factors += [*low_rank(parts, torch.bfloat16)]
    arguments = (inputs["x_TH"], inputs["weights_TK"], idx, up, down, None, None, *factors, name, False)
    out = torch.ops.slipstream.experts(*arguments, None)
    needs = [True, True, not frozen, not frozen, False, False, *[True] * 4]
    backward = (torch.randn_like(inputs["x_TH"]), *arguments, out[1], list(out[2:]), needs)
    grads = torch.ops.slipstream.experts_backward(*backward)
    assert len(grads) == sum(needs)
    with FakeTensorMode() as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, backward)
        assert layouts(torch.ops.slipstream.experts_backward(*fake)) == layouts(grads)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["swiglu", "interleaved"])
@pytest.mark.parametrize("shape", ["plain", "no token", "odd widths"])
def test_on_a_gpu(shape, activation) -> None:
    """In bf16, with the kernels: each result within rounding of the loop over experts in fp64, of the same numbers."""
    idx, inputs, function = adapted(shape, activation, True, activation == "interleaved")
    idx, inputs = idx.to("cuda"), {name: tensor.to("cuda").bfloat16() for name, tensor in inputs.items()}
    grad = torch.randn(inputs["x_TH"].shape, device="cuda").bfloat16()
    expected = run(oracle, idx, {name: tensor.double() for name, tensor in inputs.items()}, grad, activation=function)
    got = run(ours, idx, inputs, grad, activation=function, dtype=torch.bfloat16)
    for name, reference in [("out", expected[0]), *expected[1].items()]:
        actual = got[0] if name == "out" else got[1][name]
        assert (actual.double() - reference).norm() <= 3e-2 * reference.norm() + 1e-6, name
