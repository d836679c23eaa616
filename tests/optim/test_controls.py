"""What the device tells AdamW: to scale gradients as it reads them, and to leave a step out."""

import copy

import pytest
import torch
from torch import nn

from slipstream.optim import AdamW
from slipstream.parallel.clip import divisor, total_grad_norm


def clipped(params: list[torch.Tensor], optimizer: torch.optim.Optimizer, ours: bool, steps: int = 4) -> None:
    """Steps with gradients over and under the limit of 1."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for param in params:
            param.grad = (torch.randn(param.shape, generator=generator) * 10.0 ** (1 - step)).to(param.dtype)
        if isinstance(optimizer, AdamW) and ours:
            optimizer.grad_scale = divisor(total_grad_norm(params), 1.0)
            before = [param.grad.clone() for param in params]
        else:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if ours:
            assert all(torch.equal(param.grad, grad) for param, grad in zip(params, before, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)])
def test_clipping_inside_is_clipping_before(dtype: torch.dtype, tolerance: float) -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((40, 30), (7,), (3, 4, 5))]
        kind = AdamW if ours or dtype != torch.float32 else torch.optim.AdamW
        options = {"rounding": "nearest"} if kind is AdamW else {}
        clipped(params, kind(params, lr=0.05, weight_decay=0.1, **options), ours)  # type: ignore[arg-type]
        found.append([param.detach() for param in params])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_a_step_that_the_device_leaves_out(rounding: str) -> None:
    """Weights, states, bias corrections and random bits are those of the steps that were made."""
    found = []
    for skips in (True, False):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(64).bfloat16())
        optimizer = AdamW([param], lr=0.05, rounding=rounding)  # type: ignore[arg-type]
        for step in range(5):
            bad = step in (0, 2)
            param.grad = torch.full_like(param, float("nan") if bad else 0.1 * step)
            if bad and not skips:
                continue
            if skips:
                optimizer.found_inf = torch.tensor(bad)
            before = [tensor.clone() for tensor in (param, *optimizer.state[param].values())]
            optimizer.step()
            assert optimizer.found_inf is None  # of one step only
            if bad:
                optimizer.forget_step()
                optimizer.forget_step()  # there is one to forget
                kept = (param, *optimizer.state[param].values())
                assert all(map(torch.equal, before, kept))
        found.append((param.detach(), *optimizer.state[param].values()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert found[0][1] == 3


def test_controls_are_not_part_of_the_state() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = AdamW([param], lr=0.1)
    optimizer.grad_scale = torch.tensor(2.0)
    twin = copy.deepcopy(optimizer)
    assert (twin.grad_scale, twin.found_inf) == (None, None)
    optimizer.load_state_dict(optimizer.state_dict())
    assert "grad_scale" not in optimizer.state_dict()
    twin.step()
    twin.forget_step()
