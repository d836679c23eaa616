"""Recognising a module's activation by what it computes."""

import copy

import pytest
import torch
from torch import nn

from slipstream import hf
from slipstream.kernels.expert_activation import FUNCTIONS, Activation
from slipstream.moe.activation import activation_name, function_named, own_function
from tests.tiny_models import tiny_model


def experts_of(model_type: str):
    return next(module for _, module in hf.experts_modules(tiny_model(model_type, None)))


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("qwen3_moe", Activation("silu")),
        ("gpt_oss", Activation("silu", interleaved=True, alpha=1.702, limit=7.0, offset=1.0)),
        ("nemotron_h", Activation("relu2", gated=False)),
        ("deepseek_v3", Activation("silu")),
    ],
)
def test_known_activations_have_a_kernel(model_type, expected) -> None:
    experts = experts_of(model_type)
    assert function_named(activation_name(experts)) == expected


@pytest.mark.parametrize("limit", [0.5, 15.0, 1e4, float("inf")])
@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v4"])
def test_a_limit_of_any_size_is_seen(model_type, limit) -> None:
    experts = experts_of(model_type)
    experts.limit = limit
    function = function_named(activation_name(experts))
    assert isinstance(function, Activation)
    assert function.limit == limit
    hidden = 3 * min(limit, 1e6) * torch.randn(64, 64, dtype=torch.float64)
    torch.testing.assert_close(function(hidden), own_function(experts)(hidden))


def test_an_unknown_activation_runs_as_it_is() -> None:
    experts = experts_of("qwen3_moe")
    experts.act_fn = nn.Softplus()
    name = activation_name(experts)
    function = function_named(name)
    assert not isinstance(function, Activation)
    hidden = torch.randn(5, 2 * experts.down_proj.shape[-1])
    assert torch.equal(function(hidden), own_function(experts)(hidden))
    # Known by what it is made of, so that layers share it; and without the weights of the module it was found on.
    assert activation_name(copy.deepcopy(experts)) == name
    assert not function.__self__._parameters


def test_a_name_is_one_line() -> None:
    """Inductor writes it into a comment of the code that it generates; Inkling 2's activation has modules inside."""
    experts = experts_of("inkling2_text")
    assert "\n" in str(experts.act_fn)
    assert "\n" not in activation_name(experts)


def test_a_trainable_activation_has_no_name() -> None:
    experts = experts_of("qwen3_moe")
    experts.act_fn = nn.PReLU()
    assert activation_name(experts) is None


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives(function, gated) -> None:
    for extra in ({}, {"alpha": 1.3, "limit": 0.8, "offset": 0.5}):
        if extra and not gated:
            continue
        for interleaved in (False, True)[: 1 + gated]:
            activation = Activation(function, gated, interleaved, **extra)
            hidden = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
            out = activation(hidden)
            grad = torch.randn_like(out)
            (expected,) = torch.autograd.grad(out, hidden, grad)
            act, got = activation.differentiate(hidden.detach(), grad)
            torch.testing.assert_close(act, out.detach())
            torch.testing.assert_close(got, expected)
