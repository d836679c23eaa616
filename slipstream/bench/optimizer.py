"""The optimizer alone: a step over the parameters of a preset, against the bytes that it has to move."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from slipstream.bench.presets import build_config
from slipstream.bench.timing import copy_bandwidth, peak_above_gib, time_ms
from slipstream.planning.flops import meta_model

ROUNDINGS: tuple[Literal["stochastic", "nearest", "master"], ...] = ("stochastic", "nearest", "master")
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def bench_optimizer(
    model: str, device: torch.device, *, layers: int | None = None, tiny: bool = False, iterations: int = 10
) -> dict[str, Any]:
    """Rows of `contender` and either `error` or `ms`, `gb_per_s`, `of_bandwidth`, `bytes_per_parameter`.

    The bytes are those that a step can't avoid: weights and states read and written once, gradients read once, each in
    its own dtype. `copy_gb_per_s` is what this device's memory reaches in a plain copy, in the same process.
    """
    shapes = [tuple(parameter.shape) for parameter in meta_model(build_config(model, layers, tiny=tiny)).parameters()]
    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for shape in shapes:
        parameter = nn.Parameter(
            torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
        )
        parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3, generator=generator)
        parameters.append(parameter)
    bandwidth = copy_bandwidth(device, 2**31 if device.type == "cuda" else 2**24)
    rows = []
    for name, make in _contenders():
        row: dict[str, Any] = {"contender": name}
        rows.append(row | (make if isinstance(make, dict) else _measure(make, parameters, bandwidth, iterations)))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    count = sum(parameter.numel() for parameter in parameters)
    return {"parameters": count, "tensors": len(parameters), "copy_gb_per_s": bandwidth, "rows": rows}


def _contenders() -> Iterator[tuple[str, Make | dict[str, Any]]]:
    """Names, each with what makes the optimizer, or the reason why there is none."""
    yield "torch AdamW fused", partial(torch.optim.AdamW, lr=1e-5, fused=True)
    from slipstream.optim import AdamW

    for rounding in ROUNDINGS:
        yield f"slipstream AdamW {rounding}", partial(AdamW, lr=1e-5, rounding=rounding)
    if find_spec("torchao") is None:
        yield "torchao AdamW 8-bit", {"error": "torchao is not installed"}
    else:
        from torchao.optim import AdamW8bit

        yield "torchao AdamW 8-bit", partial(AdamW8bit, lr=1e-5)


def _measure(make: Make, parameters: list[nn.Parameter], bandwidth: float, iterations: int) -> dict[str, Any]:
    device = parameters[0].device
    try:
        optimizer = make(parameters)
        optimizer.step()  # makes the states
        peak = peak_above_gib(optimizer.step, device)
        ms = time_ms(optimizer.step, device, iterations=iterations, warmup=2, flush=False)
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    moved = sum(2 * p.nbytes + p.grad.nbytes for p in parameters if p.grad is not None)
    moved += 2 * sum(_bytes(state) for state in states)
    rate = moved / ms["median"] / 1e6
    count = sum(parameter.numel() for parameter in parameters)
    return {
        "ms": ms,
        "bytes_per_parameter": moved / count,
        "gb_per_s": rate,
        "of_bandwidth": rate / bandwidth,
        "extra_peak_gib": peak,
    }


def _bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of what a subclass (8-bit codes and their scales) is made of."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)
