"""Every touch of a part of Transformers that is not public API, in one place.

Checked against Transformers 5.23.0; `hf_models.py` has what depends on single architectures, `hf_recurrent.py` what
concerns layers that mix tokens by something else than attention, `hf_trainer.py` what `Trainer` keeps to itself.
Each name used here has a test in tests/test_hf.py that fails when upstream moves it.
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    build_glob_alternation,
    dot_natural_key,
)
from transformers.distributed import DistributedConfig, mixin
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from slipstream.parallel.units import class_of

ExpertsForward = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

causal_lm_loss = ForCausalLMLoss
sdpa_attention = sdpa_attention_forward
sdpa_mask = masking_utils.sdpa_mask
PerLayerFieldError = AmbiguousGlobalPerLayerAttributeError  # a config's field that each layer has its own of
Exchange = EPImplementation  # what brings an experts module its tokens from other ranks

# What architectures call a layer's router, beside its experts, and the bias that only the choice of experts sees.
_ROUTERS = ("gate", "router")
_SELECTION_BIASES = ("e_score_correction_bias", "expert_bias")

# What architectures call the number of routed experts.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def register_experts(name: str, forward: ExpertsForward) -> None:
    """Make `forward(module, x_TH, idx_TK, weights_TK) -> x_TH` selectable as `experts_implementation=name`."""
    ALL_EXPERTS_FUNCTIONS.register(name, forward)


def experts_function(name: str) -> ExpertsForward:
    """What `register_experts` or Transformers itself registered as `name`."""
    function: ExpertsForward = ALL_EXPERTS_FUNCTIONS[name]
    return function


def register_exchange(name: str, exchange: type[EPImplementation]) -> None:
    """Make `exchange` selectable as `DistributedConfig(ep_implementation=name)`."""
    EPImplementationInterface.register(name, exchange)


def exchange(name: str) -> type[EPImplementation]:
    """The class registered under `name`, Transformers' own among them."""
    return EPImplementationInterface()[name]


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The (name, module) pairs of `model` whose forward goes through the experts interface."""
    for name, module in model.named_modules():
        if is_experts(module):
            yield name, module


def is_experts(module: nn.Module) -> bool:
    """Whether `module` has the flags that `use_experts_implementation` sets on every class it decorates."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module, nn.Module]]:
    """(name, experts, router, the block that holds both) for each experts module of `model`; PEFT may wrap either."""
    modules = dict(model.named_modules())
    for name, experts in experts_modules(model):
        path = name.split(".")
        while path[-1] == "base_layer":
            path.pop()
        block = modules[".".join(path[:-1])]
        for child in _ROUTERS:
            if isinstance(router := getattr(block, child, None), nn.Module):
                yield name, experts, router, block
                break


def selection_bias(router: nn.Module, block: nn.Module) -> torch.Tensor | None:
    """The parameter or buffer that is added to a router's scores for choosing experts, not for weighing them."""
    own = [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    for name, tensor in (*router.named_parameters(), *router.named_buffers(), *own):
        if name.rpartition(".")[2] in _SELECTION_BIASES:
            return tensor
    return None


def experts_implementation(model: Any) -> str:
    """The name of the experts forward that `model` uses now."""
    return model.config.get_text_config()._experts_implementation


def attention_implementation(model: Any) -> str:
    """The name of the attention forward that `model` uses now."""
    return model.config.get_text_config()._attn_implementation


def register_attention(name: str, forward: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make `forward` selectable as `attn_implementation=name`, and `mask` what makes its masks."""
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, mask)


def supports_flash_attention(model: Any) -> bool:
    """Whether the layers of `model` hand on a mask that is no 4D tensor, and state windows and sinks as arguments."""
    return type(model)._supports_flash_attn and model._can_set_attn_implementation()


def supports_sdpa(model: Any) -> bool:
    """Whether `model` may use PyTorch's SDPA, which it then does by default."""
    return type(model)._supports_sdpa


def within_documents(mask_function: Any, document_BS: torch.Tensor) -> Any:
    """`mask_function` of Transformers, and both tokens in one document."""
    return masking_utils.and_masks(mask_function, masking_utils.packed_sequence_mask_function(document_BS))


def let_packing_be_known(known: Callable[[int, int], Any]) -> None:
    """Spare Transformers its look for packed documents, which waits for the device, where `known(B, S)` is not None.

    Such a batch it takes for one without documents: the mask function of our attention has to bring them in.
    """
    if hasattr(masking_utils.find_packed_sequence_indices, "original"):
        return
    original = masking_utils.find_packed_sequence_indices

    def find_packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
        return original(position_ids) if known(*position_ids.shape) is None else None

    find_packed_sequence_indices.original = original  # type: ignore[attr-defined]
    masking_utils.find_packed_sequence_indices = find_packed_sequence_indices


def uses_causal_lm_loss(model: PreTrainedModel) -> bool:
    """Whether the loss of `model` is the ordinary cross-entropy over the vocabulary."""
    return model.loss_function is causal_lm_loss and not hasattr(model, "_compute_loss")  # ProphetNet's


def distributed_config(setup: Any, ep_implementation: str) -> DistributedConfig:
    """A `DistributedSetup` in Transformers' terms; `ep_implementation` is a registered exchange of tokens."""
    return DistributedConfig(
        dp_replicate_size=setup.replicas,
        fsdp_size=setup.fsdp_size,
        tp_size=setup.tp_size,
        ep_size=setup.ep_size,
        ep_implementation=ep_implementation if setup.ep_size > 1 else "auto",
    )


@contextmanager
def sharding_by(shard: Callable[..., Any], plan_experts: Callable[[Any], dict[str, str]]) -> Iterator[None]:
    """Let `shard(model, mesh_manager, fsdp_plan, ep_plan)` apply FSDP2 where Transformers would by itself.

    It is called on the meta device, after expert and tensor parallelism and before the weights are read. By
    `plan_experts(model)`, before all of that, experts are split instead of by the architecture's own plan: some have
    none, and Gemma 4's splits its dense MLP over ranks that have different tokens.
    """
    cls: Any = mixin.DistributedMixin
    original, resolve = mixin.apply_fully_sharded_data_parallelism, cls._resolve_parallel_plans

    def resolve_experts(self: Any, config: DistributedConfig) -> Any:
        if plan := plan_experts(self):
            self._ep_plan = plan
        return resolve(self, config)

    mixin.apply_fully_sharded_data_parallelism, cls._resolve_parallel_plans = shard, resolve_experts
    try:
        yield
    finally:
        mixin.apply_fully_sharded_data_parallelism, cls._resolve_parallel_plans = original, resolve


def distribute(model: Any, config: DistributedConfig) -> Any:
    """Split `model`, on the meta device, over the ranks, as `from_pretrained` does before it reads weights."""
    config, _, meshes = type(model).prepare_distribute_model(config)
    return type(model).maybe_distribute_model(model, config, meshes)


@contextmanager
def observing_initialization(observe: Callable[[Any, nn.Module, Callable[[], None]], None]) -> Iterator[None]:
    """Call `observe(model, module, initialize)` where a model would initialise a module, on the meta device too."""
    cls: Any = PreTrainedModel
    original, original_whole = cls._initialize_weights, cls.init_weights

    def observed(self: Any, module: nn.Module, is_custom_code: bool = False) -> None:
        observe(self, module, lambda: original(self, module, is_custom_code))

    def also_on_meta(self: Any) -> None:
        self.initialize_weights()
        self.tie_weights(recompute_mapping=False)

    cls._initialize_weights, cls.init_weights = observed, also_on_meta
    try:
        yield
    finally:
        cls._initialize_weights, cls.init_weights = original, original_whole


def initialize_module(model: Any, module: nn.Module) -> None:
    """Give `module`'s parameters the first values that the class of `model` has for them."""
    model._init_weights(module)


def mark_fsdp_managed(model: Any) -> None:
    """Tell `generate` that all ranks have to run the same number of forwards."""
    model._is_fsdp_managed_module = True


def checkpoint_layers(model: Any) -> None:
    """Let every decoder layer run again in backward."""
    model.activation_checkpointing_enable({"use_reentrant": False})


def is_recomputed(layer: Any) -> bool:
    """Whether what `layer` computes now is computed again in backward."""
    return bool(layer.gradient_checkpointing and layer.training and torch.is_grad_enabled())


def recomputed(layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` such that it runs again in backward, as the layer's own does."""
    return functools.partial(layer._gradient_checkpointing_func, forward)


def without_checkpoint(layer: Any) -> Callable[..., Any]:
    """The forward of the layer's class inside the wrapper that would checkpoint it."""
    return inspect.unwrap(type(layer).forward)


def is_distributed(model: PreTrainedModel) -> bool:
    """Whether Transformers sharded `model` while loading it."""
    return getattr(model.config, "distributed_config", None) is not None


def num_routed_experts(config: PretrainedConfig) -> int | None:
    """The number of routed experts a layer of this architecture has, or None for a dense one."""
    config = config.get_text_config()
    for place in (config, getattr(config, "ffn_config", None)):  # DBRX has a section of its own
        for name in NUM_EXPERTS:
            if (value := getattr(place, name, None)) is not None:
                return int(value)
    return None


_AVERAGED = "_replicated_grad_hook_registered"


def mark_averaged(parameter: nn.Parameter) -> None:
    """Tell `Trainer` that something else takes the mean of the gradient over the ranks."""
    setattr(parameter, _AVERAGED, True)


def is_averaged(parameter: nn.Parameter) -> bool:
    """Whether `mark_averaged` was called."""
    return hasattr(parameter, _AVERAGED)


class Reversal:
    """The way back from a model's tensors to those of its checkpoint format, a few tensors at a time.

    `transformers.core_model_loading.revert_weight_conversion` does the same for a whole state dict at once, which would
    have to be in memory.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        loaded_with = getattr(model, "_weight_conversions", None)
        if loaded_with is None:  # not from from_pretrained; no prefix was stripped then, so none is put back
            loaded_with = get_model_conversion_mapping(model, add_legacy=False)
            loaded_with = [conversion for conversion in loaded_with if not isinstance(conversion, PrefixChange)]
        back = [conversion.reverse_transform() for conversion in reversed(loaded_with)]
        self._renamings = [entry for entry in back if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in back if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def units(self, names: set[str]) -> list[tuple[str, ...]]:
        """`names` in the order of the model, those in one tuple that only convert together.

        Call this before `convert`: some renamings apply only once another name was seen.
        """
        units: dict[str, list[str]] = {}
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = apply_converters(name, self._converters)
            unit = renamed if pattern is not None else apply_renamings(name, self._renamings)
            units.setdefault(unit, []).append(name)
        return [tuple(unit) for unit in units.values()]

    def convert(self, unit: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors that the tensors of one unit become."""
        converter: Any = None
        target: Any = ""
        for name, tensor in unit.items():
            target, pattern = apply_converters(name, self._converters)
            if pattern is None:
                return {apply_renamings(name, self._renamings): tensor}
            converter = converter or copy.deepcopy(self._by_pattern[pattern])
            converter.add_tensor(target, name, pattern, tensor)
        converted = converter.convert(target, model=self._model, config=self._model.config)
        return {
            apply_renamings(name, self._renamings): value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }


def saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters and buffers that belong into a checkpoint, each tied one once, under the name Transformers keeps.

    Raises: RuntimeError for tensors shared in a way that the model class does not declare.
    """
    tensors = model.state_dict(keep_vars=True)
    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    # Transformers tells tied tensors by their memory, and shards that are empty have none: show it stand-ins instead.
    stand_ins = {id(tensor): torch.empty(1) for tensor in tensors.values()}
    kept = remove_tied_weights_from_state_dict({name: stand_ins[id(t)] for name, t in tensors.items()}, model)
    return {name: tensors[name] for name in kept}


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What to search a parameter's name for to know that `model` keeps it in fp32 when it is cast to `dtype`."""
    names = list(model._get_dtype_plan(dtype))
    return build_glob_alternation(names)[0] if names else None


def holds_adapters_or_quantised(model: PreTrainedModel) -> bool:
    """Whether Transformers saves something else than the model's plain weights."""
    return getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "hf_quantizer", None) is not None


def save_modelling_code(model: PreTrainedModel, config: Any, folder: Path) -> None:
    """Copy the modelling code of a model that came with its own, as `save_pretrained` does."""
    if model.is_remote_code():
        kind = class_of(model)
        one = kind.__new__(kind)  # its class and file are all that is looked at; FSDP2 changes a model's
        nn.Module.__init__(one)
        custom_object_save(one, folder, config=config)
