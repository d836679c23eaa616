"""Mamba1's selective scan by its kernels against a loop over tokens: interpreted on a CPU, compiled on a GPU."""

from typing import Any

import pytest
import torch

from slipstream.kernels.selective_scan_states import takes
from slipstream.recurrent import selective_scan as scans
from slipstream.recurrent.selective_scan import selective_scan, selective_scan_reference
from tests.kernels.conditions import DEVICE, INTERPRETED, compiled_or_interpreted

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "bias")


@pytest.fixture(autouse=True)
def _memory_begins_as_nan() -> Any:
    """So that what a kernel reads before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "CHUNK", 16)


def _inputs(
    length: int, channels: int, state: int, dtype: torch.dtype = torch.float32, rows: int = 1
) -> list[torch.Tensor]:
    """x, dt, A, B, C, D, z and the bias."""
    torch.manual_seed(length)
    wide, narrow = (rows, length, channels), (rows, length, state)
    shapes = [wide, wide, (channels, state), narrow, narrow, (channels,), wide, (channels,)]
    tensors = [torch.randn(shape, device=DEVICE) for shape in shapes]
    tensors[2] = -4 * torch.rand(channels, state, device=DEVICE) - 0.1
    tensors = [tensor.to(dtype) if index in (0, 1, 3, 4, 6) else tensor for index, tensor in enumerate(tensors)]
    return [tensor.requires_grad_() for tensor in tensors]


def _results(scan: Any, inputs: list[Any], softplus: bool = True) -> dict[str, torch.Tensor]:
    """The outputs and all gradients, of None for an input that is not there."""
    out = scan(*inputs, dt_softplus=softplus)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in all dtypes
    given = {name: tensor for name, tensor in zip(NAMES, inputs, strict=True) if tensor is not None}
    grads = torch.autograd.grad((out * weight.to(DEVICE, out.dtype)).sum(), list(given.values()))
    assert all(grad.dtype == tensor.dtype for grad, tensor in zip(grads, given.values(), strict=True))
    return {"out": out.detach(), **dict(zip(given, grads, strict=True))}


def _exact(inputs: list[Any], softplus: bool = True) -> dict[str, torch.Tensor]:
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    return _results(selective_scan_reference, wide, softplus)


def _check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max().clamp(min=1e-2), name


@compiled_or_interpreted
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    ("length", "channels", "state", "rows"),
    [(1, 20, 16, 2), (16, 130, 6, 1), (39, 40, 16, 2), (35, 8, 1, 1), (18, 34, 40, 1)],
    ids=["one token", "two blocks of channels", "chunks and a part", "one state", "many states"],
)
def test_scan(length: int, channels: int, state: int, rows: int) -> None:
    inputs = _inputs(length, channels, state, rows=rows)
    assert takes(inputs[2], *inputs)
    _check(_results(selective_scan, inputs), _exact(inputs))


@compiled_or_interpreted
def test_chunks_of_the_usual_length() -> None:
    inputs = _inputs(70, 8, 4)
    _check(_results(selective_scan, inputs), _exact(inputs))


@compiled_or_interpreted
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("given", [(), (5,), (6,), (7,)], ids=["none", "D", "z", "bias"])
def test_optional_inputs(given: tuple[int, ...]) -> None:
    """Steps as they are; no step at all is a step, too."""
    inputs: list[Any] = _inputs(20, 8, 4)
    with torch.no_grad():
        inputs[1].abs_()[:, ::3] = 0
        inputs[7].abs_()
    inputs[5:] = [tensor if index in given else None for index, tensor in enumerate(inputs[5:], 5)]
    _check(_results(selective_scan, inputs, softplus=False), _exact(inputs, softplus=False))


@compiled_or_interpreted
@pytest.mark.usefixtures("short_chunks")
def test_small_and_large_steps() -> None:
    """As models have them, 0.001 to 0.1 and less, and such that nothing is left of a state."""
    inputs = _inputs(40, 8, 4)
    with torch.no_grad():
        inputs[1].copy_(torch.linspace(-14, 3, 40, device=DEVICE)[:, None].expand(40, 8))
        inputs[1][:, 7::8] = 25
        inputs[2].mul_(4)
        inputs[7].zero_()
    found, expected = _results(selective_scan, inputs), _exact(inputs)
    _check(found, expected)
    slow = slice(0, 7)  # the smallest gradients' own digits
    for name in ("out", "x"):
        _check({name: found[name][:, slow] * 1e3}, {name: expected[name][:, slow] * 1e3})


@compiled_or_interpreted
@pytest.mark.usefixtures("short_chunks")
def test_bf16_is_as_near_as_a_loop_in_bf16() -> None:
    inputs = _inputs(40, 12, 4, torch.bfloat16)
    found, expected = _results(selective_scan, inputs), _exact(inputs)
    rounded = _results(selective_scan_reference, [tensor.detach().bfloat16().requires_grad_() for tensor in inputs])
    margin = 2.0 if INTERPRETED else 1.0  # the interpreter truncates to bf16
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= margin * (rounded[name] - tensor).norm(), name
        assert (found[name] - tensor).norm() <= 1e-2 * tensor.norm(), name


@compiled_or_interpreted
@pytest.mark.usefixtures("short_chunks")
def test_views_as_they_lie() -> None:
    """Parts of one projection, and transposed ones; and the outputs' gradient as a sum leaves it, all of one number."""
    inputs = _inputs(20, 8, 4)
    x, z, B, C = torch.randn(1, 20, 27, device=DEVICE).split([8, 8, 4, 7], -1)
    scattered = torch.randn(1, 8, 20, device=DEVICE).mT
    for given in ([x, scattered, B, C[..., :4], z], [scattered, x, B, torch.randn(1, 4, 20, device=DEVICE).mT, z]):
        results = []
        for tensors in (given, [tensor.contiguous() for tensor in given]):
            tensors = [tensor.detach().requires_grad_() for tensor in tensors]
            one, dt, keys, queries, gate = tensors
            out = selective_scan(one, dt, inputs[2], keys, queries, inputs[5], gate, inputs[7], True)
            results.append([out, *torch.autograd.grad(out.sum(), tensors)])
        assert all(map(torch.equal, *results))


@compiled_or_interpreted
@pytest.mark.usefixtures("short_chunks")
def test_the_same_every_time() -> None:
    inputs = _inputs(20, 40, 4, torch.bfloat16)
    one, other = (_results(selective_scan, inputs) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@compiled_or_interpreted
def test_one_operator_to_autograd_and_torch_compile() -> None:
    x, dt, A, B, C, *optional = _inputs(3, 4, 2)
    for others in (optional, [None, None, None]):
        torch.library.opcheck(
            torch.ops.slipstream.selective_scan.default,
            (x, dt, A, B, C, *others, True),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("channels", "state"), [(1536, 16), (400, 64), (100, 128)], ids=["mamba", "wide", "widest"])
def test_shapes_of_models(channels: int, state: int, dtype: torch.dtype) -> None:
    inputs = _inputs(700, channels, state, dtype, rows=2)
    with torch.no_grad():
        inputs[1].mul_(0.5).sub_(3)  # steps about as small as models have
        inputs[2].copy_(-torch.arange(1, state + 1, device=DEVICE).float().expand(channels, -1))
        inputs[3].mul_(state**-0.5)
    found, expected = _results(selective_scan, inputs), _exact(inputs)
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-5
    for name, tensor in expected.items():
        cancelling = {"A": 20, "bias": 20, "dt": 4}.get(name, 1)  # sums of either sign
        assert (found[name] - tensor).norm() <= cancelling * tolerance * tensor.norm(), name
