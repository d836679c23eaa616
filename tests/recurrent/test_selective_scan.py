"""Mamba1's selective scan: its plain-PyTorch form against a loop over tokens and Transformers' own."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.models.jamba.modeling_jamba import mamba_selective_scan

from slipstream.recurrent.selective_scan import selective_scan, selective_scan_reference


def _inputs(length: int) -> list[torch.Tensor]:
    """x, dt, A, B, C, D, z and the bias."""
    torch.manual_seed(length)
    wide, narrow = (2, length, 10), (2, length, 6)
    shapes = [wide, wide, (10, 6), narrow, narrow, (10,), wide, (10,)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[2] = -4 * torch.rand(10, 6) - 0.1
    return [tensor.requires_grad_() for tensor in tensors]


def _with_grads(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def _close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("length", [1, 47, 130])
def test_scan(length: int, optional: bool) -> None:
    inputs = _inputs(length) if optional else _inputs(length)[:5]
    found = _with_grads(selective_scan(*inputs, dt_softplus=True), inputs)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    _close(found, _with_grads(selective_scan_reference(*wide, dt_softplus=True), wide), 1e-5)


def test_is_what_transformers_computes() -> None:
    inputs = _inputs(40)
    found = _with_grads(selective_scan(*inputs, dt_softplus=True), inputs)
    x, dt, A, B, C, D, z, bias = inputs
    theirs = mamba_selective_scan(
        x.mT, dt.mT, A, B.mT, C.mT, D=D, z=z.mT, delta_bias=bias, delta_softplus=True
    )  # fmt: skip
    _close(found, _with_grads(theirs.mT, inputs), 1e-5)


def test_saves_only_its_inputs() -> None:
    inputs = _inputs(64)
    saved = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(*inputs, dt_softplus=True)
    assert saved <= sum(tensor.numel() for tensor in inputs)


def _layouts(tensors: Any) -> list[tuple[Any, ...]]:
    return [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tree_leaves(tensors)]


@pytest.mark.parametrize("optional", [False, True])
def test_what_the_compiler_is_told_is_true(optional: bool) -> None:
    x, dt, A, B, C, *others = (tensor.detach() for tensor in _inputs(47))
    others = others if optional else [None] * 3
    arguments = (x.mT.contiguous().mT.bfloat16(), dt, A.T.contiguous().T, B, C, *others, True)
    backward = (torch.randn(x.shape), *arguments)
    with FakeTensorMode() as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, (arguments, backward))
        expected = [_layouts(torch.ops.slipstream.selective_scan(*fake[0]))]
        expected.append(_layouts(torch.ops.slipstream.selective_scan_backward(*fake[1])))
    assert _layouts(torch.ops.slipstream.selective_scan(*arguments)) == expected[0]
    assert _layouts(torch.ops.slipstream.selective_scan_backward(*backward)) == expected[1]


def test_inside_a_compiled_layer() -> None:
    inputs = _inputs(40)

    def layer(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return selective_scan(x.mT.contiguous().mT * 2, *others, dt_softplus=True).tanh()

    compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
    _close(_with_grads(compiled(*inputs), inputs), _with_grads(layer(*inputs), inputs), 1e-5)
