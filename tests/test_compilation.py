"""Compiled decoder layers: same numbers, one graph per kind of layer, whatever the step. Through AOTAutograd without
code generation, which needs no compiler and takes seconds."""

import copy
import pickle
from typing import Any

import pytest
import torch
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import slipstream
from slipstream import BackendConfig, hf_models
from slipstream.compilation import compile_layers, uncompiled, why_not_compiled
from slipstream.coverage.tiny import tiny_model as coverage_tiny_model
from tests.tiny_models import tiny_batch, tiny_model


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def accelerated(model_type: str, activation_checkpointing: str = "none"):
    setup = {"activation_checkpointing": activation_checkpointing}
    model = slipstream.accelerate(tiny_model(model_type, None).train(), distributed_setup=setup)
    model.config.use_cache = False
    return model


def step(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# How many kinds of layers the tiny models have.
KINDS = {"qwen3_moe": 1, "gpt_oss": 1, "deepseek_v3": 2, "llama": 1}


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("model_type", KINDS)
def test_same_loss_and_gradients_from_one_graph_per_kind_of_layer(model_type) -> None:
    model, ids = accelerated(model_type), tiny_batch()
    loss, grads = step(model, ids)
    assert compile_layers(model, "aot_eager") == [type(model.get_decoder().layers[0]).__name__]
    before = graphs()
    compiled_loss, compiled_grads = step(model, ids)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_grads, grads)
    assert graphs() - before == KINDS[model_type]
    step(model, ids[:, :-5])  # a shorter batch
    step(model, torch.cat([ids, ids])[:, :-3])  # a larger one
    assert graphs() - before == KINDS[model_type]


def test_layers_that_all_differ_in_a_number_share_a_graph() -> None:
    plain = coverage_tiny_model("diffllama")
    model, ids = slipstream.accelerate(copy.deepcopy(plain), backend=BackendConfig(compile="none")), tiny_batch()
    loss, grads = step(plain, ids)
    compile_layers(model, "aot_eager")
    before = graphs()
    compiled_loss, compiled_grads = step(model, ids)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_grads, grads, rtol=1e-4, atol=1e-6)
    assert graphs() - before == 1


@pytest.mark.parametrize("checkpointing", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_activation_checkpointing_inside(checkpointing) -> None:
    model, ids = accelerated("qwen3_moe", checkpointing), tiny_batch()
    loss, grads = step(model, ids)
    compile_layers(model, "aot_eager")
    compiled_loss, compiled_grads = step(model, ids)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_grads, grads)


@pytest.mark.parametrize("checkpointing", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_router_logits_leave_a_layer_without_breaking_its_graph(checkpointing) -> None:
    """For a load-balancing loss; asked for or not, in any order, with gradients of their own."""
    model, ids = accelerated("qwen3_moe", checkpointing), tiny_batch()
    plain = copy.deepcopy(model)
    compile_layers(model, "aot_eager")
    if checkpointing == "none":  # Transformers puts a hook of its own there
        assert pickle.dumps(model)
    before = graphs()
    for wanted in (False, True, False, True):
        found = []
        for one in (plain, model):
            one.zero_grad()
            output = one(input_ids=ids, labels=ids, output_router_logits=wanted)
            output.loss.backward()
            found.append((output, {name: p.grad for name, p in one.named_parameters()}))
        (expected, expected_grads), (output, grads) = found
        kept = [one.value for layer in model.get_decoder().layers for one in vars(layer)[hf_models._RECORDED]]
        assert not any(value is not None for value in kept)  # activations would hang on them
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(grads, expected_grads)
        assert (output.router_logits is None) == (not wanted)
        if wanted:
            torch.testing.assert_close(output.router_logits, expected.router_logits)
    # What is computed again in backward may leave nothing behind: asked for, such a layer runs as it is.
    assert graphs() - before == (2 if checkpointing == "none" else 1)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_decoder().layers[1].mlp.gate.weight.zero_()
        output = twin(input_ids=ids, output_router_logits=True, output_hidden_states=True)
    layers = range(len(model.get_decoder().layers))
    assert [bool(logits.any()) for logits in output.router_logits] == [layer != 1 for layer in layers]
    assert len(output.hidden_states) == len(layers) + 1
    assert model(input_ids=ids, output_router_logits=True).router_logits[1].any()


def test_floats_of_the_config_are_constants_of_the_graph() -> None:
    """Each would cost the host a tensor at every call, and its value back."""
    inputs, before = [], torch._dynamo.config.specialize_float

    def look(graph, example_inputs):
        inputs.extend(value for value in example_inputs if isinstance(value, torch.Tensor) and value.dim() == 0)
        return graph.forward

    model = accelerated("qwen3_moe")
    compile_layers(model, look)
    step(model, tiny_batch())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not inputs
    assert torch._dynamo.config.specialize_float is before


def test_generate_and_deepcopy() -> None:
    model, ids = accelerated("qwen3_moe"), tiny_batch()[:1, :7]
    model.config.use_cache = True
    model.eval()
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(model, counter)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert counter.frame_count == 0  # every call has a cache of another length
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert model(input_ids=ids, use_cache=False).logits.abs().max() > 0
    assert twin(input_ids=ids, use_cache=False).logits.abs().max() == 0


def test_cpu_says_why_not() -> None:
    model = accelerated("llama")
    choice = slipstream.describe(model)["compile"]
    assert (choice.chosen, choice.why) == ("none", why_not_compiled(model))
    assert "not on a GPU" in choice.why


def test_a_model_that_lies_on_a_cpu_beside_a_gpu_is_compiled_once_it_has_moved(monkeypatch) -> None:
    """As most scripts load it: `Trainer` moves it."""
    model = accelerated("llama")
    with monkeypatch.context() as beside_a_gpu:
        beside_a_gpu.setattr(torch.cuda, "is_available", lambda: True)
        beside_a_gpu.setattr("shutil.which", lambda name: name)
        assert why_not_compiled(model) is None
    counter = CompileCounterWithBackend("eager")
    compile_layers(model, counter, gpu_only=True)
    ids = torch.ones(1, 4, dtype=torch.long)
    model(input_ids=ids, use_cache=False)
    assert counter.frame_count == 0
    monkeypatch.setattr("slipstream.compilation._on_gpu", lambda given: isinstance(given, torch.Tensor))
    model(input_ids=ids, use_cache=False)
    assert counter.frame_count == 1


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_layer_that_does_not_compile_runs_as_it_is(part) -> None:
    """For its class and model, said once, and nothing else is caught."""

    def refuse(graph, example_inputs):
        raise NotImplementedError("no lowering for this\nand more")

    compilers = {"fw_compiler": nop, "bw_compiler": nop, "forward": "fw_compiler", "backward": "bw_compiler"}
    compilers[compilers[part]] = refuse
    backend = aot_autograd(fw_compiler=compilers["fw_compiler"], bw_compiler=compilers["bw_compiler"])
    model, ids = accelerated("deepseek_v3"), tiny_batch()
    untouched = copy.deepcopy(model)
    expected = step(model, ids)
    compile_layers(model, backend)
    with pytest.warns(UserWarning, match=r"compile='none'.*NotImplementedError: no lowering for this") as said:
        found = [step(model, ids) for _ in range(2)]
    assert len(said) == 1
    torch.testing.assert_close(found, [expected] * 2)
    name = type(model.get_decoder().layers[0]).__name__
    assert uncompiled(model) == {name: "NotImplementedError: no lowering for this"}
    assert f"{name} runs uncompiled" in slipstream.describe(model)["compile"].why
    assert uncompiled(copy.deepcopy(model)) == uncompiled(model)
    assert not uncompiled(untouched)


def test_a_layer_that_cannot_be_traced_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = accelerated("llama"), tiny_batch()
    expected = step(model, ids)
    layer = type(model.get_decoder().layers[0])

    def forward(self, hidden_BSH: torch.Tensor, *args: Any, of=layer.forward, **kwargs: Any) -> torch.Tensor:
        return of(self, torch.ops.slipstream_tests.untraceable(hidden_BSH), *args, **kwargs)

    with torch.library._scoped_library("slipstream_tests", "FRAGMENT") as library:
        library.define("untraceable(Tensor x) -> Tensor")
        library.impl("untraceable", lambda x: x.clone(), "CPU")
        library.impl("untraceable", lambda x: (_ for _ in ()).throw(RuntimeError("reads values")), "Meta")
        library.impl("untraceable", torch.library.fallthrough_kernel, "Autograd")
        monkeypatch.setattr(layer, "forward", forward)
        compile_layers(model, "aot_eager")
        with pytest.warns(UserWarning, match="reads values"):
            found = [step(model, ids) for _ in range(2)]
    assert [loss for loss, *_ in found] == [expected[0]] * 2
    assert list(uncompiled(model)) == [layer.__name__]


def test_layers_that_graphs_make_slower_run_as_they_are() -> None:
    model, ids = accelerated("xmod").eval(), tiny_batch()  # without dropout
    expected, _ = step(model, ids)
    before = graphs()
    (name,) = compile_layers(model, "aot_eager")
    assert step(model, ids)[0] == expected
    assert graphs() == before
    assert uncompiled(model) == {name: hf_models.NOT_COMPILED[name]}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("compiling"), TimeoutError("too long"), KeyboardInterrupt()])
def test_other_errors_come_through(error) -> None:
    def refuse(graph, example_inputs):
        raise error

    model = accelerated("llama")
    compile_layers(model, refuse)
    with pytest.raises((torch._dynamo.exc.BackendCompilerFailed, KeyboardInterrupt)):
        step(model, tiny_batch())
    assert not uncompiled(model)


def test_an_error_of_the_model_comes_through() -> None:
    model = accelerated("llama")
    compile_layers(model, "aot_eager")
    model.get_decoder().layers[0].mlp.up_proj.weight.data = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # of the model, not of its compiler
        step(model, tiny_batch())
    assert not uncompiled(model)
