"""The rest of `hf.py`: touches of private parts of Transformers that concern single architectures.

Checked against Transformers 5.23.0, each with a test in tests/test_hf_models.py.
"""

import copy
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, convert_and_load_state_dict_in_model
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import MtpLayer
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel
from transformers.utils import output_capturing

from slipstream import hf
from slipstream.parallel.units import class_of

# Classes of experts modules that Transformers calls in ways of their own; see `moe.foreign`.
LLAMA4_EXPERTS, DBRX_EXPERTS, LONGCAT_EXPERTS = "Llama4TextExperts", "DbrxExperts", "LongcatFlashExperts"
QSA_INDEXER = "Qwen4ExpTextQSAIndexer"  # see `attention.block_selection`
ZAYA_QK_NORM = "ZayaQKNorm"  # see `attention.head_scales`
RELATIVE_LOGITS = ("InklingRelativeLogits", "Inkling2RelativeLogits")  # see `attention.relative_bias`
BLOCK_RESIDUAL = "Inkling2BlockAttentionResidual"  # see `attention.block_residual`
# Layers that compiling makes slower, and why.
NOT_COMPILED = {"XmodLayer": "the host picks the rows of each adapter, and waits between a graph's pieces"}
_ORIGINAL = "slipstream_original"
_IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"  # from_pretrained reads no tensor in advance


def replace_forward(model: nn.Module, forward: Callable[..., Any], *classes: str) -> bool:
    """Let the modules of `model` that are of one of these classes run `forward`, in place; whether it has such.

    The function has to have that name, by which copies and pickles bind it anew.
    """
    found = [module for module in model.modules() if class_of(module).__name__ in classes]
    for module in found:
        module.forward = MethodType(forward, module)
    return bool(found)


def takes_positions(config: PretrainedConfig) -> bool:
    """Whether the causal-LM class for `config` takes `position_ids`; True for a class that came with its checkpoint."""
    model_class = causal_lm_class(config)
    return model_class is None or "position_ids" in inspect.signature(model_class.forward).parameters


def takes_experts_implementation(config: PretrainedConfig) -> bool:
    """Whether the causal-LM class for `config` calls its experts through the interface."""
    model_class = causal_lm_class(config)
    return model_class is None or model_class._can_set_experts_implementation()


def causal_lm_class(config: PretrainedConfig) -> Any:
    """Transformers' own class for `config`; None where the checkpoint brings one."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def experts_plan(model: nn.Module) -> dict[str, str]:
    """Each experts module of `model` to exchange tokens, and its parameters to be split by expert.

    Raises: ValueError for parameters that have not a row an expert.
    """
    plan = {}
    for name, experts in hf.experts_modules(model):
        layer = replace_layer_number_by_wildcard(name)
        plan[layer] = "ep_dispatch_experts"
        rows = {key: parameter.shape[0] for key, parameter in experts.named_parameters() if parameter.ndim > 1}
        if other := [key for key, count in rows.items() if count != experts.num_experts]:
            raise ValueError(
                f"ep_size: {name}.{other[0]} of {type(model).__name__} has {rows[other[0]]} rows for "
                f"{experts.num_experts} experts and can't be split by expert; leave ep_size out"
            )
        plan |= {f"{layer}.{key}": "grouped_gemm" for key in rows}
    return plan


def meshes(model: Any) -> Any:
    """The meshes of a distributed model: `get_mesh(name)`, as `hf.sharding_by` hands them on."""
    return model._mesh_manager


def split_experts(model: Any, plan: dict[str, str]) -> dict[str, str]:
    """Split experts on the meta device that were added to `model` after it was spread over ranks, by a plan like that
    of `experts_plan`; returns it with layer numbers."""
    plan = model._expand_parallel_plan(plan)
    if plan:
        ep, tp = (meshes(model).get_mesh(name) for name in ("ep", "tp"))
        exchange = model.config.distributed_config.ep_implementation
        apply_expert_parallelism(model, ep, tp, plan, ep_implementation=exchange)
    return plan


def merged_along_dim0(model: Any) -> set[str]:
    """The parameters outside the experts that loading puts together, along their first dimension, from several tensors
    of the checkpoint format: sharded by it, each rank would read the same part of every one."""
    experts = tuple(f"{name}." for name, _ in hf.experts_modules(model))
    merged = [
        re.compile(pattern.replace("*", r"\d+"))
        for conversion in get_model_conversion_mapping(model)
        if isinstance(conversion, WeightConverter) and len(conversion.source_patterns) > 1
        and any(isinstance(operation, Concatenate) and operation.dim == 0 for operation in conversion.operations)
        for pattern in conversion.target_patterns
    ]  # fmt: skip
    return {
        name
        for name, _ in model.named_parameters()
        if not name.startswith(experts) and any(pattern.search(name) for pattern in merged)
    }


def prediction_layers(model: Any, count: int) -> nn.ModuleList:
    """Modules for multi-token prediction, on the meta device: two norms, a projection, a decoder layer with full
    attention and experts of the kind that `model` has, and a norm. In its dtype, or fp32 where it keeps that."""
    decoder = model.get_decoder()
    config = copy.deepcopy(model.config.get_text_config())
    config.num_hidden_layers = count
    for name, value in (("layer_types", "full_attention"), ("mlp_layer_types", "sparse")):
        if getattr(config, name, None) is not None:
            setattr(config, name, [value] * count)
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 0
    layer_class, norm_class = type(decoder.layers[-1]), type(decoder.norm)
    with torch.device("meta"):
        layers = nn.ModuleList([MtpLayer(config, layer_class, norm_class, layer) for layer in range(count)])
    kept = hf.kept_in_float32(model, model.dtype)
    for name, tensor in [*layers.named_parameters(), *layers.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept and kept.search(name) else model.dtype)
    return layers


def load_into(model: Any, slices: dict[str, Any]) -> set[str]:
    """Read tensors into `model`, converted as its checkpoints are; returns the parameters that got none.

    Args:
        slices: of safetensors or like those, by the names of a checkpoint of this model.

    Raises: ValueError for one that the model has no place for.
    """
    device = next(model.parameters()).device
    if hf.is_distributed(model):  # whose parameters may lie in host memory
        device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    before = getattr(model, "_weight_conversions", None)  # which saving reverts
    mapping: Any = get_model_conversion_mapping(model)
    config = LoadStateDictConfig(weight_mapping=mapping, device_map={"": device}, dtype=model.dtype)
    info, _ = convert_and_load_state_dict_in_model(model=model, state_dict=slices, load_config=config)
    if before is not None:
        model._weight_conversions = before
    if info.mismatched_keys or info.unexpected_keys:
        odd = sorted(map(str, {*info.mismatched_keys, *info.unexpected_keys}))
        raise ValueError(f"{odd[0]} does not fit {type(model).__name__}")
    return set(info.missing_keys)


def is_incomplete(error: RuntimeError) -> bool:
    """Whether loading failed because the checkpoint's tensors do not make the model's: an expert's is missing, say, or
    one has another shape.

    Transformers lists them on stderr, and raises no class of its own.
    """
    return any(words in str(error) for words in ("automatic conversion of the weights", "`ignore_mismatched_sizes`"))


@contextmanager
def observing_loaded(observe: Callable[[Any, str], None]) -> Iterator[None]:
    """Call `observe(model, name)` after each parameter that `from_pretrained` has read, and let it read the next one
    only then."""
    module: Any = core_model_loading
    original, in_turn = module.set_param_for_module, os.environ.get(_IN_TURN)

    def observed(model: Any, target_name: str, *args: Any, **kwargs: Any) -> None:
        original(model, target_name, *args, **kwargs)
        observe(model, target_name)

    module.set_param_for_module = observed
    os.environ[_IN_TURN] = "1"
    try:
        yield
    finally:
        module.set_param_for_module = original
        if in_turn is None:
            del os.environ[_IN_TURN]
        else:
            os.environ[_IN_TURN] = in_turn


def rotary_embedding(model: Any, hidden_BSH: torch.Tensor, positions_BS: torch.Tensor) -> Any:
    """What the decoder of `model` gives its layers as `position_embeddings`."""
    return model.get_decoder().rotary_emb(hidden_BSH, position_ids=positions_BS)


def modelling_file(module: nn.Module) -> dict[str, Any]:
    """What stands in the file of the class of `module`, by name; to be changed where it is looked up at every call."""
    return vars(sys.modules[class_of(module).__module__])


def rotary_function(module: nn.Module) -> Any:
    """What the modelling file of `module` rotates queries and keys by."""
    return modelling_file(module)["apply_rotary_pos_emb"]


def causal_mask(model: Any, hidden_BSH: torch.Tensor, mask: torch.Tensor | None, positions_BS: torch.Tensor) -> Any:
    """What the decoder of `model` gives its layers with full attention as `attention_mask`."""
    return create_causal_mask(
        config=model.config.get_text_config(), inputs_embeds=hidden_BSH, attention_mask=mask, past_key_values=None,
        position_ids=positions_BS,
    )  # fmt: skip


def unreplaced(function: Any) -> Any:
    """What `replaced` made `function` from, or `function` itself."""
    return getattr(function, _ORIGINAL, function)


def replaced(original: Any, replacement: Callable[..., Any]) -> Any:
    """`replacement(original, *args, **kwargs)` under the name and signature of `original`."""

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(replaced, _ORIGINAL, original)
    return replaced


_RECORDED = "_slipstream_recorded"


class _Recorded:
    """What one module inside a layer returned last, where somebody asked the model for it."""

    def __init__(self, key: str, index: int) -> None:
        self.key, self.index = key, index  # "router_logits", "attentions"; place in what the module returns
        self.wanted = False
        self.value: Any = None


def record_outside(model: nn.Module, layers: list[nn.Module]) -> None:
    """Let what Transformers records of modules inside `layers` (router logits, attention weights) leave them as values.

    Its hooks look into a context variable, at which a compiled layer breaks into several graphs, and which a graph made
    before anybody asked does not look into at all. Here such a module leaves its output on itself, which a graph takes
    in, and a hook on the layer, outside of its graph, hands it on.
    """
    home = {id(inner): layer for layer in layers for inner in layer.modules() if inner is not layer}
    original = _without_recorded()

    def install(module: nn.Module, key: str, index: int, *args: Any, **kwargs: Any) -> None:
        layer = home.get(id(module))
        if layer is None or key == "hidden_states" or _is_recorded(module, key):
            return  # the rest Transformers installs itself when asked
        for owner, hook in ((module, _keep), (layer, _hand_on)):
            if _RECORDED not in owner.__dict__:
                owner.__dict__[_RECORDED] = []
                owner.register_forward_hook(hook)
                if owner is layer:
                    layer.register_forward_pre_hook(_look_up)
        recorded = _Recorded(key, index)
        module.__dict__[_RECORDED].append(recorded)
        layer.__dict__[_RECORDED].append(recorded)

    flag = "_output_capturing_hooks_installed"
    models: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    fresh = [module for module in models if not getattr(module, flag, False)]
    output_capturing.install_output_capuring_hook = install
    try:
        for module in fresh:
            if flag not in module.__dict__:  # not inside one before
                output_capturing.install_all_output_capturing_hooks(module)
    finally:
        output_capturing.install_output_capuring_hook = original
    for module in fresh:
        module.__dict__.pop(flag, None)


def _without_recorded() -> Callable[..., None]:
    """What Transformers installs a hook with, which from here on leaves out what is recorded outside."""
    original: Any = output_capturing.install_output_capuring_hook
    if hasattr(original, _ORIGINAL):
        return original  # type: ignore[no-any-return]

    def install(original: Any, module: nn.Module, key: str, *args: Any, **kwargs: Any) -> None:
        if not _is_recorded(module, key):
            original(module, key, *args, **kwargs)

    return replaced(original, install)  # type: ignore[no-any-return]


def _is_recorded(module: nn.Module, key: str) -> bool:
    return any(recorded.key == key for recorded in module.__dict__.get(_RECORDED, ()))


def _look_up(layer: nn.Module, args: Any) -> None:
    collected = output_capturing._active_collector.get()
    if collected is None:
        return
    for recorded in layer.__dict__[_RECORDED]:
        recorded.wanted, recorded.value = recorded.key in collected, None
    if layer.training and args and isinstance(args[0], torch.Tensor) and args[0].requires_grad:
        # A checkpointed layer runs again in backward, without these hooks; activations would hang on what it keeps.
        args[0].register_hook(functools.partial(_forget, layer))


def _forget(layer: nn.Module, grad: Any) -> None:
    for recorded in layer.__dict__[_RECORDED]:
        recorded.value = None


def _keep(module: nn.Module, args: Any, output: Any) -> None:
    for recorded in getattr(module, _RECORDED):
        if recorded.wanted:
            recorded.value = output[recorded.index] if isinstance(output, tuple) else output


def _hand_on(layer: nn.Module, args: Any, output: Any) -> None:
    collected = output_capturing._active_collector.get()
    for recorded in layer.__dict__[_RECORDED]:
        value, recorded.value = recorded.value, None
        if value is not None and collected is not None and recorded.wanted:
            collected[recorded.key].append(value)
