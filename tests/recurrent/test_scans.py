"""The chunked scans against a loop over tokens, and against Transformers' own."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn, torch_chunk_gated_delta_rule

from slipstream.recurrent import gated_delta
from slipstream.recurrent.convolution import causal_conv, documents_of
from slipstream.recurrent.gated_delta import gated_delta_rule, gated_delta_rule_reference
from slipstream.recurrent.mamba2 import mamba2_scan, mamba2_scan_reference


def _documents(kind: str, length: int) -> torch.Tensor | None:
    """Ids of 2 rows."""
    if kind == "one":
        return None
    if kind == "tokens":
        return torch.arange(length).expand(2, -1).contiguous()
    borders = torch.tensor([[3, 16, 17], [1, 30, 64]])  # on, before and behind the edges of chunks
    return (torch.arange(length)[None, :, None] >= borders[:, None]).sum(-1)


def _grads(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


def _close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-6)


def _mamba(length: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
    torch.manual_seed(length)
    inputs = [
        torch.randn(2, length, 4, 8, dtype=dtype), torch.randn(2, length, 4, dtype=dtype),
        -torch.rand(4, dtype=dtype) * 4 - 0.1, torch.randn(2, length, 2, 6, dtype=dtype),
        torch.randn(2, length, 2, 6, dtype=dtype),
    ]  # fmt: skip
    options = {"D_H": torch.randn(4, dtype=dtype), "dt_bias_H": torch.randn(4, dtype=dtype)}
    return [tensor.requires_grad_() for tensor in (*inputs, *options.values())], {
        "dt_softplus": True, "dt_limit": (0.01, 5.0),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["one", "several", "tokens"])
@pytest.mark.parametrize("length", [1, 16, 47, 80])
def test_mamba2(length: int, kind: str) -> None:
    inputs, options = _mamba(length, torch.float32)
    document = _documents(kind, length)
    out = mamba2_scan(*inputs[:5], 16, *inputs[5:], **options, document_BS=document)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = mamba2_scan_reference(*wide[:5], 16, *wide[5:], **options, document_BS=document)
    _close([out], [expected], 2e-5)
    _close(_grads(out, inputs), _grads(expected, wide), 5e-5)


def test_mamba2_is_what_transformers_computes() -> None:
    inputs, options = _mamba(70, torch.float32)
    out = mamba2_scan(*inputs[:5], 16, *inputs[5:], **options)
    expected = mamba2_chunk_scan(*inputs[:5], chunk_size=16, D=inputs[5], dt_bias=inputs[6], **options)
    _close([out, *_grads(out, inputs)], [expected, *_grads(expected, inputs)], 1e-5)


def test_mamba2_saves_only_its_inputs() -> None:
    inputs, options = _mamba(64, torch.float32)
    saved = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mamba2_scan(*inputs[:5], 16, *inputs[5:], **options)
    assert saved <= sum(tensor.numel() for tensor in inputs)


def _layouts(tensors: Any) -> list[tuple[Any, ...]]:
    return [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tree_leaves(tensors)]


@pytest.mark.parametrize("optional", [False, True])
def test_what_the_compiler_is_told_of_mamba2_is_true(optional: bool) -> None:
    (x, dt, A, B, C, D, bias), _ = _mamba(47, torch.float32)
    others = (D, bias, _documents("several", 47)) if optional else (None, None, None)
    arguments = (x.detach().mT.contiguous().mT, dt, A, B, C, *others, 16, True, 0.0, float("inf"))
    backward = (torch.randn(x.shape), *arguments)
    with torch.no_grad(), FakeTensorMode() as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, (arguments, backward))
        expected = [_layouts(torch.ops.slipstream.mamba2_scan(*fake[0]))]
        expected.append(_layouts(torch.ops.slipstream.mamba2_scan_backward(*fake[1])))
    with torch.no_grad():
        assert _layouts(torch.ops.slipstream.mamba2_scan(*arguments)) == expected[0]
        assert _layouts(torch.ops.slipstream.mamba2_scan_backward(*backward)) == expected[1]


def test_mamba2_inside_a_compiled_layer() -> None:
    inputs, options = _mamba(40, torch.float32)
    document = _documents("several", 40)

    def layer(x: torch.Tensor, *others: Any) -> torch.Tensor:
        return mamba2_scan(x * 2, *others, **options, document_BS=document).tanh()

    compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
    out = compiled(*inputs[:5], 16, *inputs[5:])
    expected = layer(*inputs[:5], 16, *inputs[5:])
    _close([out, *_grads(out, inputs)], [expected, *_grads(expected, inputs)], 1e-5)


def _delta(length: int, channels: bool) -> list[torch.Tensor]:
    torch.manual_seed(length)
    decay = -torch.rand(2, length, 4, 8) * torch.tensor([0.5, 3.0, 12.0, 0.1])[:, None]  # exp(12 * 64) has no fp32
    inputs = [
        torch.randn(2, length, 2, 8), torch.randn(2, length, 2, 8), torch.randn(2, length, 4, 6),
        decay if channels else decay[..., 0], torch.rand(2, length, 4),
    ]  # fmt: skip
    return [tensor.requires_grad_() for tensor in inputs]


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("kind", ["one", "several", "tokens"])
@pytest.mark.parametrize("length", [1, pytest.param(64, marks=pytest.mark.slow), 150])
def test_gated_delta_rule(length: int, kind: str, channels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_delta, "SEGMENT", 128)
    inputs, document = _delta(length, channels), _documents(kind, length)
    out = gated_delta_rule(*inputs, document, normalize=True)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = gated_delta_rule_reference(*wide, document, normalize=True)
    _close([out], [expected], 1e-5)
    _close(_grads(out, inputs), _grads(expected, wide), 1e-4)


@pytest.mark.parametrize("channels", [False, True])
def test_gated_delta_rule_is_what_transformers_computes(channels: bool) -> None:
    q, k, v, decay, beta = inputs = _delta(100, channels)
    out = gated_delta_rule(*inputs, normalize=True)
    if channels:
        wide_q, wide_k = (x.repeat_interleave(2, 2) for x in (q, k))
        expected, _ = chunk_kimi_delta_attention(wide_q, wide_k, v, decay, beta, use_qk_l2norm_in_kernel=True)
    else:
        expected, _ = torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)
    _close([out, *_grads(out, inputs)], [expected, *_grads(expected, inputs)], 1e-4)


def test_gated_delta_rule_keeps_its_inputs_alone() -> None:
    inputs = _delta(192, channels=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        gated_delta_rule(*inputs, normalize=True)
    assert {tensor.data_ptr() for tensor in saved} <= {tensor.data_ptr() for tensor in inputs}


@pytest.mark.parametrize("length", [1, 3, 40])
def test_convolution(length: int) -> None:
    x, weight, bias = torch.randn(2, 5, length), torch.randn(5, 4), torch.randn(5)
    one = torch.zeros(2, length, dtype=torch.int32)
    expected = causal_conv1d_fn(x, weight, bias, activation="silu")
    for documents in (one, None):
        torch.testing.assert_close(causal_conv(x, weight, bias, "silu", documents), expected)
    document = _documents("several", length)
    assert document is not None
    out = causal_conv(x, weight, bias, "silu", document)
    for row in range(2):
        for number in document[row].unique():
            inside = document[row] == number
            alone = causal_conv1d_fn(x[row : row + 1, :, inside], weight, bias, activation="silu")
            torch.testing.assert_close(out[row : row + 1, :, inside], alone)


def test_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    assert documents_of(positions).tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
