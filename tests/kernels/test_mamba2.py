"""Mamba2's scan by its kernels against a loop over tokens: interpreted on a CPU, compiled on a GPU."""

from typing import Any

import pytest
import torch

from slipstream.kernels.mamba2_decay import takes
from slipstream.recurrent.mamba2 import mamba2_scan, mamba2_scan_reference
from tests.kernels.conditions import DEVICE, INTERPRETED, compiled_or_interpreted

GRADIENTS = ("x", "dt", "A", "B", "C", "D", "bias")
OPTIONS: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.01, 5.0)}


@pytest.fixture(autouse=True)
def _memory_begins_as_nan() -> Any:
    """So that what a kernel reads before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _inputs(
    length: int, heads: int, groups: int, width: int, state: int, dtype: torch.dtype = torch.float32, rows: int = 2
) -> list[torch.Tensor]:
    """x, dt, A, B, C, D and the bias."""
    keys = (rows, length, groups, state)
    shapes = [(rows, length, heads, width), (rows, length, heads), (heads,), keys, keys, (heads,), (heads,)]
    tensors = [torch.randn(shape, device=DEVICE) for shape in shapes]
    tensors[2] = -4 * torch.rand(heads, device=DEVICE) - 0.1
    tensors = [tensor.to(dtype) if index in (0, 3, 4) else tensor for index, tensor in enumerate(tensors)]
    return [tensor.requires_grad_() for tensor in tensors]


def _borders(length: int, *rows: tuple[int, ...]) -> torch.Tensor:
    """The document of each token, where documents begin at the given tokens."""
    token = torch.arange(length, device=DEVICE)
    return torch.stack([(token[:, None] >= torch.tensor(row, device=DEVICE)).sum(-1) for row in rows])


def _results(scan: Any, inputs: list[torch.Tensor], chunk: int, **options: Any) -> dict[str, torch.Tensor]:
    """The outputs and all gradients, of None for an input that is not there."""
    x, dt, A, B, C, D, bias = inputs
    out = scan(x, dt, A, B, C, chunk, D, bias, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in all dtypes
    weight = weight.to(DEVICE, out.dtype)
    given = {name: tensor for name, tensor in zip(GRADIENTS, inputs, strict=True) if tensor is not None}
    grads = torch.autograd.grad((out * weight).sum(), list(given.values()))
    assert all(grad.dtype == tensor.dtype for grad, tensor in zip(grads, given.values(), strict=True))
    return {"out": out.detach(), **dict(zip(given, grads, strict=True))}


def _exact(inputs: list[Any], chunk: int, **options: Any) -> dict[str, torch.Tensor]:
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    return _results(mamba2_scan_reference, wide, chunk, **options)


def _check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


CASES = {
    "one token": (1, 2, 1, 16, 16, 16, None),
    "one chunk": (16, 2, 2, 16, 32, 16, None),
    "chunks and a part": (39, 4, 2, 32, 16, 16, None),
    "documents at the edges of chunks": (39, 2, 1, 16, 16, 16, [(3, 16, 17), (1, 32, 38)]),
    "a document over whole chunks": (55, 2, 2, 16, 16, 16, [(5, 50), (48,)]),
    "documents of a token": (33, 2, 1, 16, 16, 32, [tuple(range(33))] * 2),
    "several blocks of a chunk, odd widths": (80, 2, 1, 48, 80, 100, [(30,), (64,)]),
}


@compiled_or_interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_scan(case: tuple[Any, ...]) -> None:
    length, heads, groups, width, state, chunk, borders = case
    inputs = _inputs(length, heads, groups, width, state)
    assert takes(inputs[0], inputs[4], inputs[3])
    document = None if borders is None else _borders(length, *borders)
    found = _results(mamba2_scan, inputs, chunk, document_BS=document, **OPTIONS)
    _check(found, _exact(inputs, chunk, document_BS=document, **OPTIONS))


@compiled_or_interpreted
def test_wide_states_in_blocks_of_several_sizes() -> None:
    inputs = _inputs(64, 1, 1, 16, 144, torch.bfloat16, rows=1)
    found, expected = _results(mamba2_scan, inputs, 64, **OPTIONS), _exact(inputs, 64, **OPTIONS)
    for name in ("out", "x", "dt", "B", "C"):
        assert (found[name] - expected[name]).norm() <= 1e-2 * expected[name].norm(), name


@compiled_or_interpreted
def test_steps_as_they_are() -> None:
    """Without D, bias, softplus and limits; no step at all is a step, too."""
    inputs: list[Any] = _inputs(20, 2, 1, 16, 16)
    with torch.no_grad():
        inputs[1].abs_()[:, ::3] = 0
    inputs[5:] = [None, None]
    found = _results(mamba2_scan, inputs, 16)
    expected = _exact(inputs, 16)
    _check(found, expected)


@compiled_or_interpreted
@pytest.mark.parametrize("documents", [False, True])
def test_bf16_is_as_near_as_a_loop_in_bf16(documents: bool) -> None:
    inputs = _inputs(70, 4, 2, 32, 16, torch.bfloat16, rows=1)
    document = _borders(70, (3, 50)) if documents else None
    found = _results(mamba2_scan, inputs, 32, document_BS=document, **OPTIONS)
    expected = _exact(inputs, 32, document_BS=document, **OPTIONS)
    plain = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    rounded = _results(mamba2_scan_reference, plain, 32, document_BS=document, **OPTIONS)
    margin = 2.0 if INTERPRETED else 1.0  # the interpreter truncates to bf16
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= margin * (rounded[name] - tensor).norm(), name
        assert (found[name] - tensor).norm() <= 1e-2 * tensor.norm(), name


@compiled_or_interpreted
def test_large_steps_leave_the_digits_of_small_ones() -> None:
    """Behind a sum of 6000 fp32 has no room for decays of 0.99."""
    inputs = _inputs(32, 1, 1, 16, 16, rows=1)
    with torch.no_grad():
        inputs[1].copy_(torch.where(torch.arange(32, device=DEVICE) < 12, 5.0, 1e-4)[:, None])
        inputs[2].fill_(-100)
    inputs[5:] = [None, None]  # type: ignore[list-item]
    found, expected = _results(mamba2_scan, inputs, 32), _exact(inputs, 32)
    del found["A"], expected["A"]  # a small difference of large sums
    _check(found, expected, 1e-5)


@compiled_or_interpreted
def test_views_of_one_projection() -> None:
    """As in a model; and the outputs' gradient as a sum leaves it, all of one number."""
    projected = torch.randn(2, 18, 2 * 16 + 2 * 32 + 7, device=DEVICE)
    x, B, C, _ = projected.split([32, 32, 32, 7], -1)
    others = _inputs(18, 2, 2, 16, 16)
    views = [x.unflatten(-1, (2, 16)), B.unflatten(-1, (2, 16)), C.unflatten(-1, (2, 16))]
    scattered = torch.randn(2, 18, 16, 2, device=DEVICE).mT  # no dim of stride 1 at the end
    for given in (views, [scattered, *views[1:]], [views[0], scattered, scattered]):
        results = []
        for tensors in (given, [tensor.contiguous() for tensor in given]):
            tensors = [tensor.detach().requires_grad_() for tensor in tensors]
            out = mamba2_scan(tensors[0], others[1], others[2], *tensors[1:], 16, **OPTIONS)
            results.append([out, *torch.autograd.grad(out.sum(), tensors)])
        assert all(map(torch.equal, *results))


@compiled_or_interpreted
def test_the_same_every_time() -> None:
    inputs = _inputs(40, 4, 1, 16, 16, torch.bfloat16)
    one, other = (_results(mamba2_scan, inputs, 32, **OPTIONS) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@compiled_or_interpreted
def test_other_widths_are_computed_in_plain_pytorch() -> None:
    inputs = _inputs(20, 2, 1, 8, 6)
    assert not takes(inputs[0], inputs[4], inputs[3])
    _check(_results(mamba2_scan, inputs, 16, **OPTIONS), _exact(inputs, 16, **OPTIONS))


@compiled_or_interpreted
def test_one_operator_to_autograd_and_torch_compile() -> None:
    x, dt, A, B, C, D, bias = _inputs(20, 2, 1, 16, 16)
    document = _borders(20, (3,), (17,))
    for optional in ((D, bias, document), (None, None, None)):
        arguments = (x, dt, A, B, C, *optional, 16, True, 0.0, float("inf"))
        torch.library.opcheck(
            torch.ops.slipstream.mamba2_scan.default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "state", "chunk"),
    [(16, 2, 64, 128, 128), (8, 1, 128, 256, 256), (8, 1, 64, 16, 256), (4, 2, 80, 96, 128), (2, 1, 256, 256, 128)],
    ids=["nemotron-3", "falcon-h1", "jamba", "odd", "widest"],
)
def test_shapes_of_models(heads: int, groups: int, width: int, state: int, chunk: int, dtype: torch.dtype) -> None:
    inputs = _inputs(700, heads, groups, width, state, dtype)
    with torch.no_grad():
        inputs[1].mul_(0.5).sub_(3)  # steps about as small as models have
        inputs[3].mul_(state**-0.5)
    document = _borders(700, (130, 400), (256, 257))
    found = _results(mamba2_scan, inputs, chunk, document_BS=document, dt_softplus=True)
    expected = _exact(inputs, chunk, document_BS=document, dt_softplus=True)
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-5
    for name, tensor in expected.items():
        cancelling = {"A": 20, "bias": 4}.get(name, 1)  # sums over all tokens, of either sign
        assert (found[name] - tensor).norm() <= cancelling * tolerance * tensor.norm(), name
