"""slipstream.optim.AdamW beside torch's, its three ways to round, and its state."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from slipstream.checkpoint.resume import Checkpointer, load
from slipstream.kernels.rounding import join
from slipstream.optim import AdamW

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(7, 5), (3, 4, 6), (11,)]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def steps(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Gradients of steps `first` to `last`, whatever happened before; the last parameter has none in step 1."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for number, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator) * 10.0 ** (number - 2)
            param.grad = None if step == 1 and param is params[-1] else grad.to(param.dtype)
        optimizer.step()


def equal(one: list[nn.Parameter], other: list[nn.Parameter]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_fp32_is_torch(rounding, decay) -> None:
    ours, theirs = parameters(FP32), parameters(FP32)
    arguments: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay}
    steps(ours, AdamW(ours, rounding=rounding, **arguments), 0, 20)
    steps(theirs, torch.optim.AdamW(theirs, **arguments), 0, 20)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_nearest_is_torch_with_fp32_arithmetic() -> None:
    ours, theirs = parameters(BF16), parameters(BF16)
    optimizer, fused = AdamW(ours, lr=1e-2, rounding="nearest"), torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    for step in range(20):
        steps(ours, optimizer, step, step + 1)
        steps(theirs, fused, step, step + 1)
        for p, q in zip(ours, theirs, strict=True):
            # Where an fp32 result lies between two bf16 numbers, its last bit decides.
            assert (p != q).sum() <= 1
            torch.testing.assert_close(p, q, rtol=2.0**-7, atol=0)
            with torch.no_grad():
                p.copy_(q)
            for name in ("exp_avg", "exp_avg_sq"):
                mine, its = optimizer.state[p][name], fused.state[q][name]
                # torch computes the mean as an interpolation, which cancels otherwise.
                torch.testing.assert_close(mine, its, rtol=2.0**-7, atol=1e-7 * its.abs().max().item())
                mine.copy_(its)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_master_weights_are_those_of_fp32_training(decay) -> None:
    """100 steps on the same gradients: bit for bit the fp32 weights, of which the model holds the nearest bf16."""
    ours = parameters(BF16)
    whole = [nn.Parameter(param.detach().float()) for param in ours]
    optimizer = AdamW(ours, lr=1e-4, weight_decay=decay, rounding="master", state_dtype=FP32)
    exact = AdamW(whole, lr=1e-4, weight_decay=decay)
    torchs = [nn.Parameter(param.detach().clone()) for param in whole]
    theirs = torch.optim.AdamW(torchs, lr=1e-4, weight_decay=decay)
    for step in range(100):
        steps(ours, optimizer, step, step + 1)
        for copies, other in ((whole, exact), (torchs, theirs)):
            for param, one in zip(ours, copies, strict=True):
                one.grad = None if param.grad is None else param.grad.float()
            other.step()
    for param, one, other in zip(ours, whole, torchs, strict=True):
        master = join(param.detach(), optimizer.state[param]["residual"])
        assert torch.equal(master, one)
        torch.testing.assert_close(master, other.detach(), rtol=1e-5, atol=1e-6)
        assert (param.float() - one).abs().max() <= one.abs().max() * 2.0**-8
    assert optimizer.state[ours[0]]["residual"].dtype == torch.int16


def test_small_updates_are_lost_only_to_nearest() -> None:
    """100 steps of 1e-4 from 1.0, where bf16's next numbers are 0.996 and 1.008."""
    ends = {}
    for rounding in ("nearest", "stochastic", "master"):
        param = nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = AdamW([param], lr=1e-4, weight_decay=0.0, rounding=rounding)
        for _ in range(100):
            param.grad = torch.full_like(param, 0.5)
            optimizer.step()
        ends[rounding] = param.detach().float().mean().item()
    assert ends["nearest"] == 1.0
    assert ends["stochastic"] == pytest.approx(0.99, abs=5e-4)
    assert ends["master"] == pytest.approx(0.99, abs=2.0**-9)


def test_running_means_shrink() -> None:
    """Without gradients the mean square falls by 1/1000 a step, which nearest rounds away."""
    left = {}
    for rounding in ("nearest", "stochastic", "master"):
        param = nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = AdamW([param], lr=0.0, rounding=rounding)
        param.grad = torch.ones_like(param)
        optimizer.step()
        mean = optimizer.state[param]["exp_avg_sq"].float().mean().item()
        param.grad = torch.zeros_like(param)
        for _ in range(500):
            optimizer.step()
        left[rounding] = optimizer.state[param]["exp_avg_sq"].float().mean().item() / mean
    assert left["nearest"] > 0.9
    assert left["stochastic"] == pytest.approx(0.999**500, rel=0.02)
    assert left["master"] == pytest.approx(0.999**500, rel=0.02)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
def test_a_rate_of_zero_changes_nothing(dtype, rounding) -> None:
    """torch.distributed.checkpoint makes states by such a step."""
    if (dtype, rounding) == (FP16, "master"):
        pytest.skip("refused")
    params, before = parameters(dtype), parameters(dtype)
    optimizer = AdamW(params, lr=0.1, weight_decay=0.5, rounding=rounding)
    state = get_optimizer_state_dict(nn.ParameterList(params), optimizer)
    assert equal(params, before)
    assert len(state["state"]) == len(SHAPES)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0)
    steps(params, optimizer, 0, 5)
    assert equal(params, before)


@pytest.mark.parametrize(
    ("dtype", "options", "bytes_a_parameter"),
    [
        (FP32, {}, 8),
        (BF16, {}, 4),
        (BF16, {"rounding": "nearest"}, 4),
        (BF16, {"state_dtype": FP32}, 8),
        (BF16, {"rounding": "master"}, 6),
        (BF16, {"rounding": "master", "state_dtype": FP32}, 10),
        (FP16, {}, 4),
    ],
)
def test_state_and_how_it_continues(dtype, options, bytes_a_parameter, tmp_path: Path) -> None:
    whole = parameters(dtype)
    steps(whole, AdamW(whole, lr=1e-3, **options), 0, 6)
    params = parameters(dtype)
    optimizer = AdamW(params, lr=1e-3, **options)
    steps(params, optimizer, 0, 3)
    held = [value for value in optimizer.state[params[0]].values() if value.dim()]
    assert sum(value.element_size() for value in held) == bytes_a_parameter
    assert all(value.shape == params[0].shape for value in held)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    ways = {
        "load_state_dict": lambda params: (fresh := AdamW(params, lr=5.0, seed=9)).load_state_dict(saved) or fresh,
        "deepcopy": lambda params: _rebound(copy.deepcopy(optimizer), params),
        "pickle": lambda params: _rebound(pickle.loads(pickle.dumps(optimizer)), params),
    }
    for name, way in ways.items():
        continued = [nn.Parameter(param.detach().clone()) for param in params]
        restored = way(continued)
        for one, other in zip(continued, params, strict=True):
            for key, value in optimizer.state[other].items():
                assert restored.state[one][key].dtype == value.dtype, key
                assert torch.equal(restored.state[one][key], value), key
        saved = copy.deepcopy(saved)  # loading keeps its tensors
        steps(continued, restored, 3, 6)
        assert equal(continued, whole), name


def _rebound(optimizer: AdamW, params: list[nn.Parameter]) -> AdamW:
    """A copied optimizer has copied parameters too; let `params` be them."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            for number, (copied, param) in enumerate(zip(group["params"], params, strict=True)):
                optimizer.state[param] = optimizer.state.pop(copied)
                group["params"][number] = param
    return optimizer


@pytest.mark.parametrize("options", [{}, {"rounding": "master", "state_dtype": FP32}], ids=["stochastic", "master"])
def test_checkpoints_continue_bit_for_bit(tmp_path: Path, options) -> None:
    """Ours, and torch's state dict functions."""

    def make(seed: int) -> tuple[nn.ParameterList, AdamW]:
        model = nn.ParameterList(parameters(BF16))
        return model, AdamW(model.parameters(), lr=1e-3, seed=seed, **options)

    model, optimizer = make(seed=3)
    steps([*model], optimizer, 0, 3)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, model, optimizer, None, info={}, rank_info={}, files={})
    checkpointer.close()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    weights = copy.deepcopy(model.state_dict())
    steps([*model], optimizer, 3, 6)
    continued, fresh = make(seed=0)
    load(tmp_path / "step-000003", continued, fresh)
    steps([*continued], fresh, 3, 6)
    assert equal([*continued], [*model])
    continued, fresh = make(seed=0)
    continued.load_state_dict(weights)
    set_optimizer_state_dict(continued, fresh, state)
    steps([*continued], fresh, 3, 6)
    assert equal([*continued], [*model])


def test_the_state_of_torchs_adamw_goes_on() -> None:
    params = parameters(BF16)
    theirs = torch.optim.AdamW(params, lr=1e-3, fused=True)
    steps(params, theirs, 0, 3)
    ours = AdamW(params, lr=1.0, rounding="master", seed=5)
    ours.load_state_dict(theirs.state_dict())
    steps(params, ours, 3, 4)
    assert ours.param_groups[0]["lr"] == 1e-3
    assert ours.param_groups[0]["rounding"] == "master"
    state = ours.state[params[0]]
    assert state["step"].item() == 4
    assert state["residual"].any()


def test_seeds_parameters_and_steps_draw_other_bits() -> None:
    def end(seed: int, after: int = 1) -> list[torch.Tensor]:
        params = [nn.Parameter(torch.ones(512, dtype=BF16)) for _ in range(2)]
        optimizer = AdamW(params, lr=1e-3, seed=seed)
        for _ in range(after):
            for param in params:
                param.grad = torch.ones_like(param)
            with torch.no_grad():
                for param in params:
                    param.fill_(1.0)
            optimizer.step()
        return [param.detach() for param in params]

    first, again, other, later = end(0), end(0), end(1), end(0, after=2)
    assert torch.equal(first[0], again[0])
    for one, two in ((first[0], other[0]), (first[0], first[1]), (first[0], later[0])):
        assert not torch.equal(one, two)
        # Each goes down with probability 0.256, independently: they differ in 0.38 of the places.
        assert (one != two).float().mean().item() == pytest.approx(2 * 0.256 * 0.744, abs=0.11)


def test_groups_schedulers_and_closures() -> None:
    params = parameters(BF16)
    optimizer = AdamW([{"params": params[:1], "lr": 0.0}, {"params": params[1:2]}], lr=1e-2, rounding="nearest")
    optimizer.add_param_group({"params": params[2:], "rounding": "master"})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = parameters(BF16)
    for _ in range(2):
        loss = optimizer.step(lambda: _backward(optimizer, params))
        scheduler.step()
    assert loss > 0
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert optimizer.param_groups[1]["lr"] == 1e-2 / 4
    assert "residual" in optimizer.state[params[2]]
    assert "residual" not in optimizer.state[params[1]]


def _backward(optimizer: AdamW, params: list[nn.Parameter]) -> float:
    optimizer.zero_grad()
    loss = torch.stack([param.float().square().sum() for param in params]).sum()
    loss.backward()
    return loss.item()


def test_autograd_sees_that_weights_changed() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param])
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_in_another_order_of_memory() -> None:
    ours, theirs = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(6, 4))
    with torch.no_grad():
        theirs.copy_(ours)
    grad = torch.randn(4, 6)
    ours.grad, theirs.grad = grad.T, grad.T.contiguous()
    AdamW([ours]).step()
    AdamW([theirs]).step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0: give a number >= 0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): give two numbers"),
        ({"eps": 0.0}, "eps=0.0: give a number > 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: give"),
        ({"rounding": "up"}, "rounding='up': use one of 'nearest', 'stochastic', 'master'"),
        ({"state_dtype": FP16}, "state_dtype=torch.float16: use None, torch.float32 or torch.bfloat16"),
        ({"seed": -1}, "seed=-1: give a whole number"),
    ],
)
def test_arguments_that_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(FP32), **arguments)


def test_parameters_and_gradients_that_are_refused() -> None:
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(TypeError, match=f"a parameter is {dtype}"):
            AdamW([nn.Parameter(torch.ones(2, dtype=dtype))])
    with pytest.raises(TypeError, match=r'"master" takes no torch\.float16'):
        AdamW([nn.Parameter(torch.ones(2, dtype=FP16))], rounding="master")
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = AdamW(embedding.parameters())
    with pytest.raises(TypeError, match=r"a parameter is torch\.float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 1
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of parameter 0 is torch\.sparse_coo"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"lr is a tensor of shape \[2\] on cpu"):
        AdamW(parameters(FP32), lr=torch.ones(2))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"rounding": "master"}, {"rounding": "nearest"}], ids=str)
def test_a_gpu_trains_as_the_cpu_and_is_not_waited_for(options) -> None:
    """A tensor with a launch of its own, several that share one, and a transposed one."""
    shapes = [(2100, 2048), (64, 48), (48,), (5,), (64, 48)]
    grads = [[torch.randn(shape).bfloat16() * 1e-2 for shape in shapes] for _ in range(3)]
    starts = [torch.randn(shape).bfloat16() for shape in shapes]
    ends = []
    for device in ("cpu", "cuda"):
        params = [nn.Parameter(start.to(device, copy=True)) for start in starts]
        params[-1] = nn.Parameter(params[-1].detach().T)
        optimizer = AdamW(params, lr=1e-3, **options)
        for step in grads:
            for param, grad in zip(params, step, strict=True):
                on_device = grad.to(device)
                param.grad = on_device if param.shape == grad.shape else on_device.T
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        ends.append([param.detach().cpu() for param in params])
        held = [[value.cpu() for value in optimizer.state[param].values()] for param in params]
        ends[-1] += [value for values in held for value in values[1:3]]
    for one, other in zip(*ends, strict=True):
        assert (one != other).sum() <= 1 + one.numel() // 1000
        torch.testing.assert_close(one, other, rtol=2.0**-6, atol=1e-6)
