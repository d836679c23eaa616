"""Mamba1's selective scan: its plain-PyTorch form against a loop over tokens and Transformers' own, and in models."""

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.models.jamba.modeling_jamba import mamba_selective_scan

import slipstream
from slipstream.compilation import compile_layers
from slipstream.recurrent import install
from slipstream.recurrent.selective_scan import selective_scan, selective_scan_reference
from tests.tiny_models import tiny_batch, tiny_model


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


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator runs in its plain form."""
    monkeypatch.setattr(install, "_runs_kernels", lambda x: True)


def _step(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return {"loss": out.loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "model_type",
    ["jamba", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mamba", "falcon_mamba", "zamba"))],
)
def test_models_compute_the_same(model_type: str) -> None:
    plain = tiny_model(model_type)
    model = slipstream.accelerate(copy.deepcopy(plain))
    ids = tiny_batch(2, 19)
    _same(_step(model, ids), _step(plain, ids))
    assert _calls(model, ids)
    assert not _calls(plain, ids)  # in the same process


@pytest.mark.usefixtures("as_on_a_gpu")
def test_layers_compile_to_one_graph_each() -> None:
    torch.compiler.reset()
    sizes = {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1}
    model = slipstream.accelerate(tiny_model("jamba", **sizes))
    ids = tiny_batch(2, 19)
    expected = _step(model, ids)
    compile_layers(model, backend="aot_eager")
    counters.clear()
    found = _step(model, ids)
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    _same(found, expected)
    torch.compiler.reset()


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max().clamp(min=1e-3), name


def _calls(model: Any, ids: torch.Tensor) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(input_ids=ids, use_cache=False)
    return sum(event.count for event in profile.key_averages() if event.key == "slipstream::selective_scan")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_generation_keeps_transformers_states() -> None:
    plain = tiny_model("jamba").eval()
    model = slipstream.accelerate(copy.deepcopy(plain))
    ids = tiny_batch(1, 12)
    written = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (plain, model)]
    assert torch.equal(*written)


def test_what_describe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Any:
        choices = slipstream.describe(slipstream.accelerate(tiny_model("jamba"), backend={"compile": "none"})).choices
        return [(c.chosen, c.why) for c in choices if c.operation == "recurrent"]

    assert not found()  # Transformers' loop
    monkeypatch.setattr(install, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ((chosen, why),) = found()
    assert chosen == "triton"
    assert "never packed" in why
