"""The experts' MLP against the loop over experts: forward and every gradient, in fp64 for the oracle."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from slipstream.kernels.expert_activation import Activation
from slipstream.moe.activation import register
from slipstream.moe.grouped_mlp import grouped_mlp, grouped_mlp_autograd
from slipstream.moe.grouped_mm import grouped_mm
from slipstream.moe.reference import experts_reference
from slipstream.moe.routing import balanced_index, sort_by_expert


def swiglu(hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def interleaved_clamped(hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden[..., ::2].clamp(max=1.0), hidden[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def relu2(hidden: torch.Tensor) -> torch.Tensor:
    return F.relu(hidden).square()


def unknown(hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate).clamp(max=0.4) * up


ACTIVATIONS = {"swiglu": (swiglu, 2), "interleaved": (interleaved_clamped, 2), "relu2": (relu2, 1), "own": (unknown, 2)}
FUSED = {
    swiglu: Activation("silu"),
    interleaved_clamped: Activation("silu", interleaved=True, alpha=1.702, limit=1.0, offset=1.0),
    relu2: Activation("relu2", gated=False),
}

# name: tokens, hidden, intermediate, experts, top_k
SHAPES = {
    "plain": (37, 32, 16, 8, 2),
    "one token": (1, 32, 16, 8, 2),
    "no token": (0, 32, 16, 8, 2),
    "one expert": (9, 32, 16, 1, 1),
    "odd widths": (11, 34, 18, 4, 3),
    "more experts than rows": (3, 32, 16, 16, 1),
}


def problem(shape: str, activation: str, biased: bool, transposed: bool, dtype: torch.dtype):
    tokens, hidden, intermediate, experts, top_k = SHAPES[shape]
    function, width = ACTIVATIONS[activation]

    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(*size, dtype=torch.float64) * 0.5).to(dtype)

    def weight(inputs: int, outputs: int) -> torch.Tensor:
        stored = draw(experts, inputs, outputs) if transposed else draw(experts, outputs, inputs).transpose(1, 2)
        return stored

    idx = torch.rand(tokens, experts).topk(top_k, dim=1).indices
    inputs = {
        "x_TH": draw(tokens, hidden),
        "weights_TK": torch.rand(tokens, top_k, dtype=torch.float64).to(dtype),
        "up_EHN": weight(hidden, width * intermediate),
        "down_EIH": weight(intermediate, hidden),
    }
    if biased:
        inputs |= {"up_bias_EN": draw(experts, width * intermediate), "down_bias_EH": draw(experts, hidden)}
    return idx, inputs, function


def run(function, idx, inputs, grad, **options):
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = function(idx=idx, inputs=inputs, **options)
    out.backward(grad.to(out.dtype))
    return out.detach(), {name: tensor.grad for name, tensor in inputs.items()}


def oracle(idx, inputs, activation):
    return experts_reference(idx_TK=idx, activation=activation, **inputs)


def ours(idx, inputs, activation, mlp=grouped_mlp, num_rows=None):
    if mlp is grouped_mlp:
        activation = register(activation.__name__, FUSED.get(activation, activation))
    return mlp(idx_TK=idx, activation=activation, num_rows=num_rows, **inputs)


def assert_matches(got, expected, tolerance: float) -> None:
    (out, grads), (expected_out, expected_grads) = got, expected
    for name, actual, reference in [("out", out, expected_out), *((n, grads[n], g) for n, g in expected_grads.items())]:
        scale = reference.abs().max() if reference.numel() else torch.tensor(1.0)
        error = (actual.double() - reference).abs().max() if reference.numel() else torch.tensor(0.0)
        assert actual.shape == reference.shape
        assert error <= tolerance * max(scale.item(), 1e-6), (name, error.item(), scale.item())


@pytest.mark.parametrize("mlp", [grouped_mlp, grouped_mlp_autograd])
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape, activation, biased, transposed, mlp) -> None:
    idx, inputs, function = problem(shape, activation, biased, transposed, torch.float32)
    grad = torch.randn(inputs["x_TH"].shape)
    expected = run(oracle, idx, {n: t.double() for n, t in inputs.items()}, grad, activation=function)
    assert_matches(run(ours, idx, inputs, grad, activation=function, mlp=mlp), expected, 2e-6)


@pytest.mark.parametrize("mlp", [grouped_mlp, grouped_mlp_autograd])
def test_all_tokens_to_one_expert(mlp) -> None:
    idx, inputs, function = problem("plain", "swiglu", True, False, torch.float32)
    idx = torch.full_like(idx, 5)
    idx[:, 1] = 2
    grad = torch.randn(inputs["x_TH"].shape)
    expected = run(oracle, idx, {n: t.double() for n, t in inputs.items()}, grad, activation=function)
    got = run(ours, idx, inputs, grad, activation=function, mlp=mlp)
    assert_matches(got, expected, 2e-6)
    assert got[1]["up_EHN"][[0, 1, 3, 4, 6, 7]].abs().max() == 0


@pytest.mark.parametrize("mlp", [grouped_mlp, grouped_mlp_autograd])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("counted", [False, True], ids=["unknown number", "known number"])
def test_rows_of_other_ranks_contribute_nothing(counted, biased, mlp) -> None:
    """Expert parallelism marks an expert of another rank with the id `num_experts` and weight 0."""
    idx, inputs, function = problem("plain", "swiglu", biased, False, torch.float32)
    absent = torch.rand(idx.shape) < 0.5
    absent[0] = True
    idx = idx.masked_fill(absent, 8)
    inputs["weights_TK"] = inputs["weights_TK"].masked_fill(absent, 0.0)
    grad = torch.randn(inputs["x_TH"].shape)
    out, expected = run(oracle, idx, {n: t.double() for n, t in inputs.items()}, grad, activation=function)
    known = int((~absent).sum()) if counted else None
    got = run(ours, idx, inputs, grad, activation=function, mlp=mlp, num_rows=known)
    assert_matches(got, (out, expected), 2e-6)


def test_bf16_is_no_further_from_the_truth_than_the_loop() -> None:
    errors = {}
    idx, exact, function = problem("plain", "swiglu", False, False, torch.float64)
    inputs = {name: tensor.bfloat16() for name, tensor in exact.items()}
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    grad = torch.randn(exact["x_TH"].shape).bfloat16()
    truth = run(oracle, idx, exact, grad, activation=function)
    for name, path in (("loop", oracle), ("ours", ours)):
        out, grads = run(path, idx, inputs, grad, activation=function)
        errors[name] = {
            "out": (out.double() - truth[0]).norm(),
            **{key: (value.double() - truth[1][key]).norm() for key, value in grads.items()},
        }
    for key, error in errors["ours"].items():
        assert error <= 1.2 * errors["loop"][key], key


@pytest.mark.parametrize("mlp", [grouped_mlp, grouped_mlp_autograd])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_fp64_is_computed_in_fp64(biased, mlp) -> None:
    idx, inputs, function = problem("plain", "swiglu", biased, False, torch.float64)
    grad = torch.randn(inputs["x_TH"].shape, dtype=torch.float64)
    expected = run(oracle, idx, inputs, grad, activation=function)
    assert_matches(run(ours, idx, inputs, grad, activation=function, mlp=mlp), expected, 1e-14)


def test_frozen_experts_get_no_gradient_but_pass_it_on() -> None:
    idx, inputs, function = problem("plain", "swiglu", False, False, torch.float32)
    x, weights = inputs["x_TH"].requires_grad_(), inputs["weights_TK"].requires_grad_()
    ours(idx, inputs, function).sum().backward()
    assert inputs["up_EHN"].grad is None
    assert x.grad is not None
    assert weights.grad is not None


def test_saves_only_input_and_pre_activation() -> None:
    """Per token: x, the routing weights, the pre-activation, and int32 routing metadata of 3 words a row."""
    idx, inputs, function = problem("plain", "swiglu", False, False, torch.float32)
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(idx, tensors, function)
    floats = [t for t in saved if t.is_floating_point() and not t.requires_grad]
    assert [tuple(t.shape) for t in floats] == [(37 * 2, 32)]


def test_sort_by_expert_example() -> None:
    routing = sort_by_expert(torch.tensor([[1, 0], [1, 2]]), 3)
    assert routing.slot_R.tolist() == [1, 0, 2, 3]
    assert routing.token_R.tolist() == [0, 0, 1, 1]
    assert routing.row_TK.tolist() == [[1, 0], [2, 3]]
    assert routing.ends_E.tolist() == [1, 3, 4]
    assert routing.expert_R.tolist() == [0, 1, 1, 2]
    routing = sort_by_expert(torch.tensor([[1, 2], [2, 0]]), 2, num_rows=2)  # 2 is an expert of another rank
    assert (routing.slot_R.tolist(), routing.expert_R.tolist()) == ([3, 0], [0, 1])
    assert routing.row_TK.tolist() == [[1, 2], [2, 0]]


def test_balanced_index_loads_all_experts_equally() -> None:
    counts = torch.bincount(balanced_index(torch.zeros(32, 4, dtype=torch.long), 8).flatten())
    assert counts.tolist() == [16] * 8


def test_grouped_mm_takes_widths_torch_refuses() -> None:
    a, b = torch.randn(6, 5), torch.randn(3, 5, 7)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    expected = torch.cat([a[:2] @ b[0], a[2:] @ b[2]])
    torch.testing.assert_close(grouped_mm(a, b, ends), expected)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        F.grouped_mm(a, b, offs=ends)


def layouts(tensors) -> list[tuple]:
    return [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_what_the_compiler_is_told_is_true(frozen, biased, transposed) -> None:
    idx, inputs, function = problem("plain", "swiglu", biased, transposed, torch.bfloat16)
    name = register(function.__name__, FUSED[function])
    tensors = [inputs.get(key) for key in ("x_TH", "weights_TK", "up_EHN", "down_EIH", "up_bias_EN", "down_bias_EH")]
    no_adapters = [None] * 4
    arguments = (*tensors[:2], idx, *tensors[2:], *no_adapters, name, False)
    out = torch.ops.slipstream.experts(*arguments, None)
    needs = [tensor is not None and not (frozen and tensor.shape[0] == 8) for tensor in (*tensors, *no_adapters)]
    backward = (torch.randn_like(inputs["x_TH"]), *arguments, out[1], list(out[2:]), needs)
    grads = torch.ops.slipstream.experts_backward(*backward)
    assert len(grads) == sum(needs)
    with FakeTensorMode() as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, (arguments, backward))
        assert layouts(torch.ops.slipstream.experts(*fake[0], None)) == layouts(out)
        assert layouts(torch.ops.slipstream.experts_backward(*fake[1])) == layouts(grads)
