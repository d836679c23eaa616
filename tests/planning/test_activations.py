"""What the planner says a forward keeps, against what real forwards keep."""

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from slipstream.acceleration import accelerate
from slipstream.compilation import compile_layers
from slipstream.planning.activations import Experts, model_shape
from tests.tiny_models import tiny_batch, tiny_config, tiny_model

LENGTH = 64


def real_model(model_type: str, **changes: Any) -> Any:
    model = tiny_model(model_type, **changes).to(torch.bfloat16).train()
    return accelerate(model, backend={"compile": "none", "attn": "sdpa"})


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama", "mixtral", "olmoe", "glm4_moe"])
def test_equals_what_autograd_saves(model_type: str) -> None:
    """All bytes that a real forward keeps, each storage once; SDPA on a CPU may keep a copy more."""
    changes: dict[str, Any] = {"sliding_window": None} if model_type == "mixtral" else {}
    model = real_model(model_type, **changes)
    shape = model_shape(tiny_config(model_type, **changes), LENGTH)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Any] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model.get_decoder()(input_ids=tiny_batch(1, LENGTH), use_cache=False)
    measured = sum(storage.nbytes() for storage in saved.values())
    planned = LENGTH * (shape.kept_outside + sum(layer.kept_eager for layer in shape.layers))
    assert planned == pytest.approx(measured, rel=0.06)


def test_compiled_layers_keep_what_the_partitioner_chooses() -> None:
    config = tiny_config("qwen3_moe", num_hidden_layers=1)
    model = real_model("qwen3_moe", num_hidden_layers=1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: list[int] = []

    def forward_compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            outputs = graph(*arguments)
            came_in = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, torch.Tensor)}
            hidden = next(x for x in arguments if isinstance(x, torch.Tensor) and x.shape[1:] == (LENGTH, 64))
            excluded = (came_in | weights) - {hidden.untyped_storage().data_ptr()}
            kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                    for x in outputs[1:] if isinstance(x, torch.Tensor)}  # fmt: skip
            found.append(sum(size for pointer, size in kept.items() if pointer not in excluded))
            return outputs

        return make_boxed_func(run)

    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    compile_layers(model, backend=backend)
    model.get_decoder()(input_ids=tiny_batch(1, LENGTH), use_cache=False)
    (measured,) = found
    (layer,) = model_shape(config, LENGTH).layers
    assert layer.kept * LENGTH == pytest.approx(measured, rel=0.05)
    assert layer.kept < 0.85 * layer.kept_eager


def test_layers_and_widths() -> None:
    config = tiny_config("qwen3_moe", mlp_only_layers=[1])
    shape = model_shape(config, LENGTH)
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    total = sum(parameter.numel() for parameter in model.parameters())
    assert shape.dense + shape.routed == total
    assert [layer.routed > 0 for layer in shape.layers] == [True, False, True, True]
    assert shape.layers[0] is shape.layers[2]  # of a kind
    assert shape.layers[0].experts == Experts(
        config.num_experts, config.num_experts_per_tok, config.hidden_size,
        2 * config.moe_intermediate_size, config.moe_intermediate_size,
    )  # fmt: skip
    assert shape.layers[1].experts == Experts()
    assert all(layer.came_in == 2 * config.hidden_size for layer in shape.layers)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    assert len(shape.linears) == len(linears)


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "nemotron_h", "jamba", "qwen2_moe"])
def test_grows_with_the_tokens_alone(model_type: str) -> None:
    """No scores of tokens with tokens are kept, in windows, with sinks, in latent attention or in a scan."""
    config = tiny_config(model_type)
    short, long = model_shape(config, LENGTH), model_shape(config, 8 * LENGTH)
    for one, other in zip(short.layers, long.layers, strict=True):
        assert other.kept == pytest.approx(one.kept, rel=0.05)
        assert 0 < one.kept <= one.kept_eager


def test_needs_marked_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.planning.activations.GradientCheckpointingLayer", type("None_", (nn.Module,), {}))
    with pytest.raises(ValueError, match="no decoder layers"):
        model_shape(tiny_config("llama"), LENGTH)


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "rwkv", "jamba"])
def test_no_loop_over_tokens_is_planned(model_type: str) -> None:
    """As many operations for a row of another length, and as much kept for each token."""

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operations += 1
            return func(*args, **(kwargs or {}))

    found = []
    for length in (64, 128):
        with Count() as count:
            shape = model_shape(tiny_config(model_type), length)
        found.append((count.operations, shape))
    (few, short), (many, long) = found
    assert few == many > 0
    assert sum(layer.kept for layer in long.layers) == pytest.approx(
        sum(layer.kept for layer in short.layers), rel=0.05
    )
