"""The kernels of linear recurrences, against a loop over tokens in fp64."""

import pytest
import torch

from slipstream.kernels import linear_recurrence as kernels
from slipstream.kernels.linear_recurrence import recur, recur_reference
from slipstream.recurrent.linear_recurrence import linear_recurrence
from tests.kernels.conditions import DEVICE, compiled_or_interpreted


def _inputs(rows: int, length: int, channels: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(length)
    a = torch.rand(rows, length, channels, device=DEVICE)
    a[:, length // 2 : length // 2 + 1] = 0  # as where a document begins
    return [a.to(dtype), torch.randn(rows, length, channels, device=DEVICE).to(dtype)]


@compiled_or_interpreted
@pytest.mark.parametrize("reverse", [False, True], ids=["along", "against"])
@pytest.mark.parametrize(
    ("rows", "length", "channels"),
    [(2, 1, 20), (1, 4, 130), (2, 13, 40), (1, 5, 256), (2, 0, 4)],
    ids=["one token", "one chunk, blocks of channels", "chunks and a part", "whole blocks", "no tokens"],
)
def test_states(rows: int, length: int, channels: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 4)
    a, x = _inputs(rows, length, channels)
    expected = recur_reference(a.double(), x.double(), torch.float64, reverse=reverse)
    torch.testing.assert_close(recur(a, x, torch.float32, reverse=reverse).double(), expected, rtol=1e-5, atol=1e-5)


@compiled_or_interpreted
def test_chunks_of_the_usual_length_and_tensors_as_they_lie() -> None:
    a, x = _inputs(1, 70, 6)
    expected = recur_reference(a.double(), x.double(), torch.float64)
    found = recur(a.mT.contiguous().mT, x.expand(2, -1, -1)[:1], torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 4)
    given = _inputs(2, 11, 24, dtype)
    weight = torch.randn(2, 11, 24, device=DEVICE).to(dtype)
    results = []
    for scan, wide in ((linear_recurrence, dtype), (lambda a, x: recur_reference(a, x, x.dtype), torch.float64)):
        inputs = [tensor.detach().to(wide).requires_grad_() for tensor in given]
        out = scan(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, weight.to(wide))])
        assert all(tensor.dtype == wide for tensor in results[-1])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@compiled_or_interpreted
def test_the_same_every_time() -> None:
    a, x = _inputs(1, 130, 20)
    assert torch.equal(recur(a, x, torch.float32), recur(a, x, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [4096, 4097, 40_000])
def test_long_rows(length: int) -> None:
    """Far more states than were seen token by token: by a parallel scan in fp64."""
    a, x = _inputs(1, length, 300)
    a = a**0.01  # states that live long
    h, decay, step = x.double(), a.double(), 1
    while step < length:
        h = torch.cat([h[:, :step], h[:, step:] + decay[:, step:] * h[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    torch.testing.assert_close(recur(a, x, torch.float32).double(), h, rtol=1e-4, atol=1e-4)
