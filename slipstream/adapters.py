"""LoRA adapters of PEFT on the weights of experts (`LoraConfig(target_parameters=[...])`), without the delta weight.

PEFT wraps the experts module once for each weight (`ParamWrapper`) and would put `W + scaling * B @ A` in the weight's
place for every forward. Where the module's forward is Slipstream's, the experts' operator takes the factors instead.
Parameters, names and files stay PEFT's own.

Where the experts are spread over ranks, so are the factors. An expert with one owner has its own beside it; else they
are spread by their first dimension, and whole for the time of a forward.

Everything of PEFT that is not public is touched here. Checked against PEFT 0.21.2.
"""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from slipstream import hf, linear_adapters, shared_adapters
from slipstream.checkpoint.team import Team
from slipstream.moe.dispatch import FIRST_EXPERT, GRADIENT_DIVISOR
from slipstream.moe.experts import ADAPTERS, projection_names
from slipstream.moe.lora import LowRank, low_rank
from slipstream.parallel.average import AverageGradients
from slipstream.parallel.blocks import spread_blocks, whole_of
from slipstream.parallel.gather import Spread, gather_parts, spread_over
from slipstream.parallel.units import class_of

if TYPE_CHECKING:
    from peft import LoraConfig

_AVERAGED = "_slipstream_averaged"  # on a PeftModel: what averages its dense adapters' gradients
_SPREAD = "_slipstream_spread"  # on a factor's layer, unless experts have theirs beside them: who holds its rows
# Settings that PEFT has for linear layers but not for parameters, and what leaves them out.
_NOT_FOR_PARAMETERS = {"lora_dropout": 0.0, "use_dora": False, "lora_bias": False, "fan_in_fan_out": False}


def install(model: nn.Module) -> None:
    """Let PEFT's adapters use Slipstream's experts, and linear layers' dtype: those that `model` has, and later ones,
    also if PEFT is not imported yet."""
    linear_adapters.mark(model)
    if "peft" in sys.modules:
        _patch()
        for module in model.modules():
            if hasattr(module, "lora_A") and hasattr(module, "parameter_name"):
                _attach(module)
            linear_adapters.attach(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def all_experts(model: nn.Module) -> list[str]:
    """`LoraConfig.target_parameters` for every expert of `model`: what its layers' weights have as last names."""
    return sorted(
        {
            f"{[part for part in name.split('.') if part != 'base_layer'][-1]}.{projection}"
            for name, experts in hf.experts_modules(model)
            for projection in projection_names(experts)
        }
    )


def check(config: "LoraConfig") -> None:
    """Raise ValueError for a setting that PEFT has not for parameters, if `config` targets any."""
    if not config.target_parameters:
        return
    for name, without in _NOT_FOR_PARAMETERS.items():
        if (given := getattr(config, name)) != without:
            raise ValueError(
                f"lora.{name}={given}: PEFT has it for linear layers only, not for parameters such as experts' "
                f"(here {', '.join(sorted(config.target_parameters))}); set it to {without}, or name linear layers "
                "alone in target_modules"
            )


def check_spread(config: Any) -> None:
    """Raise ValueError for a setting that PEFT cannot carry out on a model that FSDP2 has spread over ranks."""
    if modules := getattr(config, "modules_to_save", None):
        raise ValueError(
            f"lora.modules_to_save={[*modules]}: PEFT trains copies of these modules, and what FSDP2 has spread over "
            "ranks cannot be copied; give linear layers and embeddings adapters (target_modules), or train on one rank"
        )


class _AfterImport(MetaPathFinder):
    """Runs `_patch` behind the import of peft."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname != "peft" or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module: Any) -> None:
            execute(module)
            _patch()

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _patch() -> None:
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    layer: Any = LoraLayer
    wrapper: Any = ParamWrapper
    model: Any = PeftModel
    if hasattr(wrapper.forward, "__wrapped__"):
        return
    layer._get_in_out_features = _in_out_features(layer._get_in_out_features)
    wrapper.__init__ = _checked(wrapper.__init__)
    wrapper.forward = _forward(wrapper.forward)
    wrapper.update_layer = _update_layer(wrapper.update_layer)
    wrapper.unload_and_optionally_merge_module = _unload(wrapper.unload_and_optionally_merge_module)
    model.__init__ = _keeping_equal(model.__init__)
    model.add_adapter = _keeping_equal(model.add_adapter)
    model.save_pretrained = _save_pretrained(model.save_pretrained)
    model._get_base_model_class = _base_class
    linear_adapters.patch()
    shared_adapters.patch()


def _checked(original: Any) -> Any:
    @functools.wraps(original)
    def init(
        self: Any, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: Any, **kwargs: Any
    ) -> None:
        check(config)
        original(self, base_layer, adapter_name, parameter_name, config, **kwargs)

    return init


def _in_out_features(original: Any) -> Any:
    @functools.wraps(original)
    def in_out_features(self: Any, module: nn.Module) -> Any:
        """PEFT takes a mesh with replicas for tensor parallelism, and a layer's size for that of its local part."""
        mesh = getattr(getattr(module, "weight", None), "device_mesh", None)
        if isinstance(module, nn.Linear) and mesh and {*(mesh.mesh_dim_names or ())} <= {"dp_replicate", "fsdp"}:
            return module.in_features, module.out_features
        return original(self, module)

    return in_out_features


def _is_ours(wrapper: Any) -> bool:
    """Whether the wrapped weight is one that the experts' operator multiplies by."""
    experts = wrapper.get_base_layer()
    if not hf.is_experts(experts) or not (hf.experts_implementation(experts) or "").startswith("slipstream"):
        return False
    return wrapper.parameter_name in projection_names(experts)


def _compiles(wrapper: Any) -> bool:
    """Whether this is a forward of compiled code, in which PEFT's change of the module's class breaks the graph, around
    a module with one such weight: a router, say, which PEFT's "all-linear" includes for some architectures."""
    return torch.compiler.is_compiling() and wrapper.base_layer is wrapper.get_base_layer()


def _forward(original: Any) -> Any:
    @functools.wraps(original)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters or self.merged or not (_is_ours(self) or _compiles(self)):
            return original(self, x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        if _is_ours(self):
            return self.base_layer(x, *args, **kwargs)  # which looks for its adapters by itself
        deltas = [self.get_delta_weight(adapter) for adapter in self.active_adapters if adapter in self.lora_A]
        weight = self.get_param() + sum(deltas)
        return torch.func.functional_call(self.base_layer, {self.parameter_name: weight}, (x, *args), kwargs)

    return forward


class _Adapters:
    """What `moe.experts.ADAPTERS` wants, from the wrappers around an experts module.

    It stays on the module, because to set it for each forward would be a side effect that compiled code with activation
    checkpointing cannot have.
    """

    def __init__(self) -> None:
        self.wrappers: list[Any] = []

    def __call__(self, names: Sequence[str], dtype: torch.dtype) -> list[LowRank | None]:
        used = [
            (name, wrapper, adapter)
            for name in names
            for wrapper in self.wrappers
            if wrapper.parameter_name == name and not wrapper.disable_adapters and not wrapper.merged
            for adapter in wrapper.active_adapters
            if adapter in wrapper.lora_A
        ]
        parts: dict[str, list[tuple[Tensor, Tensor, float]]] = {name: [] for name in names}
        for (name, wrapper, adapter), (a, b) in zip(used, _factors([entry[1:] for entry in used], dtype), strict=True):
            parts[name].append((a, b, wrapper.scaling[adapter]))
        return [low_rank(parts[name], dtype) if parts[name] else None for name in names]


def _attach(wrapper: Any) -> None:
    """Let the experts module inside know `wrapper`."""
    experts = wrapper.get_base_layer()
    if hf.is_experts(experts) and wrapper.parameter_name in projection_names(experts):
        if not hasattr(experts, ADAPTERS):
            setattr(experts, ADAPTERS, _Adapters())
        wrappers = getattr(experts, ADAPTERS).wrappers
        if not any(known is wrapper for known in wrappers):
            wrappers.append(wrapper)


def _unload(original: Any) -> Any:
    @functools.wraps(original)
    def unload_and_optionally_merge_module(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        base: nn.Module = original(self, *args, **kwargs)
        if hasattr(base, ADAPTERS):
            delattr(base, ADAPTERS)
        return base

    return unload_and_optionally_merge_module


def _factors(used: Sequence[tuple[Any, str]], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The factors of this rank's experts, `[E, r, in]` and `[out, r, E]`, of adapters of wrappers around one module."""
    if not used:
        return []
    experts = used[0][0].get_base_layer()
    pairs = [(wrapper.lora_A[adapter], wrapper.lora_B[adapter]) for wrapper, adapter in used]
    parts = [layer for pair in pairs for layer in pair if hasattr(layer, _SPREAD)]
    whole: Iterator[Tensor] = iter(())
    if parts:
        divided = hasattr(experts, GRADIENT_DIVISOR)  # the exchange has divided what comes from the ranks' sum
        share = 1.0 if divided else 1 / parts[0].weight.device_mesh.size()
        gather = _whole if divided else _whole_outside
        whole = iter(gather([layer.weight for layer in parts], getattr(parts[0], _SPREAD), share, dtype))
    first, found = getattr(experts, FIRST_EXPERT, None), []
    a: Any
    b: Any
    for (wrapper, adapter), pair in zip(used, pairs, strict=True):
        a, b = (next(whole) if hasattr(layer, _SPREAD) else layer.weight for layer in pair)
        beside = isinstance(a, DTensor)  # the experts that they are of
        if beside:
            a, b = a.to_local(), b.to_local()
        number = (experts if beside else wrapper).num_experts
        a_ErA, b_BrE = shared_adapters.by_expert(a, b, wrapper.r[adapter], number)
        if first is not None and not beside:
            a_ErA, b_BrE = (one.narrow(dim, first, experts.num_experts) for one, dim in ((a_ErA, 0), (b_BrE, 2)))
        found.append((a_ErA, b_BrE))
    return found


def _whole(factors: Sequence[DTensor], over: Spread, share: float, dtype: torch.dtype) -> list[Tensor]:
    rows = [factor.shape[0] for factor in factors]
    return gather_parts([factor.to_local() for factor in factors], rows, over, share, dtype)


# A compiled layer stops here and goes on: torch 2.13 cannot compile a DTensor inside of a checkpoint.
_whole_outside = torch.compiler.disable(_whole)


def _update_layer(original: Any) -> Any:
    @functools.wraps(original)
    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        original(self, adapter_name, *args, **kwargs)
        shared_adapters.shrink(self, adapter_name, kwargs.get("config"))
        _attach(self)
        parameter, experts = self.get_param(), hf.is_experts(self.get_base_layer())
        mesh: DeviceMesh | None = getattr(parameter, "device_mesh", None)  # a DTensor's, or a packed weight's
        if not experts or mesh is None:
            return
        if not _is_ours(self) or "tp" in (mesh.mesh_dim_names or ()):
            raise ValueError(
                f"LoRA on {self.parameter_name} of experts that are spread over ranks: PEFT cannot do it, Slipstream "
                'can for their weights, with BackendConfig(experts="slipstream") and tp_size=1; leave it out of '
                "target_parameters"
            )
        one_owner = hasattr(self.get_base_layer(), GRADIENT_DIVISOR)
        rank, apart = self.r[adapter_name], not one_owner or shared_adapters.is_shared(self, adapter_name)
        for factors in (self.lora_A, self.lora_B):
            linear = factors[adapter_name]
            if apart or factors is self.lora_A:
                spread = _spread(linear.weight.data, mesh)
            else:
                spread = spread_blocks(linear.weight.data, rank, mesh)
            linear.weight = nn.Parameter(spread, linear.weight.requires_grad)
            if apart:
                setattr(linear, _SPREAD, spread_over(mesh, _replicated(mesh)))

    return update_layer


def _spread(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """`tensor` by its rows over the ranks of `mesh` that hold different experts; the values are rank 0's."""
    placements = [Replicate() if same else Shard(0) for same in _replicated(mesh)]
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements)


def _replicated(mesh: DeviceMesh) -> list[bool]:
    return [name == "dp_replicate" for name in mesh.mesh_dim_names or ("",) * mesh.ndim]


def _is_spread(base: Any) -> bool:
    """Whether `base` is a model that Transformers spread over the ranks; PEFT takes any module."""
    return dist.is_initialized() and hasattr(base, "config") and hf.is_distributed(base)


def _keeping_equal(original: Any) -> Any:
    """`original`, a method of `PeftModel` that adds an adapter; what FSDP2 does not know of it, as it came after, is
    then kept the same on all ranks: adapters of dense layers."""

    @functools.wraps(original)
    def add(self: Any, *args: Any, **kwargs: Any) -> None:
        before = {id(parameter) for parameter in self.parameters()} if hasattr(self, "base_model") else None
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        spread = _is_spread(given["model"] if before is None else self.get_base_model())
        if spread:
            check_spread(given["peft_config"])
        original(self, *args, **kwargs)
        if not spread:
            return
        average: AverageGradients = vars(self).setdefault(_AVERAGED, AverageGradients())
        for parameter in self.parameters():
            # A later adapter trains only once it is made active.
            added = parameter.requires_grad if before is None else id(parameter) not in before
            if added and not isinstance(parameter, DTensor) and not hf.is_averaged(parameter):
                dist.broadcast(parameter.data, src=0)
                average.add(parameter)

    return add


def _base_class(self: Any, is_prompt_tuning: bool = False) -> type[nn.Module]:
    """What an adapter's files name as the class to load; FSDP2 changes a model's."""
    return class_of(self.base_model if is_prompt_tuning else self.base_model.model)


def _save_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
        if not _is_spread(self.get_base_model()):
            if shared_adapters.has_shared(self):
                kwargs["state_dict"] = shared_adapters.expanded(self, kwargs.get("state_dict") or self.state_dict())
            original(self, save_directory, *args, **kwargs)
            return
        team = Team()
        whole = shared_adapters.expanded(self, _whole_state(self, **kwargs))
        kwargs |= {"state_dict": whole, "is_main_process": dist.get_rank() == 0}
        with team:
            original(self, save_directory, *args, **kwargs)
        team.share(None)

    return save_pretrained


@torch.no_grad()
def _whole_state(
    model: Any, selected_adapters: list[str] | None = None, save_embedding_layers: Any = "auto", **_: Any
) -> dict[str, Tensor]:
    """What PEFT saves of `model`, whole, on all ranks together; the base weights stay where they are."""
    from peft import get_peft_model_state_dict

    tensors, blocks = model.state_dict(), shared_adapters.blocks(model)
    # PEFT chooses by name, and would gather all that it chooses from: show it numbers instead.
    names = list(tensors)
    stand_ins = {name: torch.tensor(number) for number, name in enumerate(names)}
    whole = {}
    for adapter in selected_adapters or model.peft_config:
        chosen = get_peft_model_state_dict(model, stand_ins, adapter, save_embedding_layers=save_embedding_layers)
        for name in (names[int(number)] for number in chosen.values()):
            tensor = tensors[name]
            if isinstance(tensor, DTensor):
                tensor = whole_of(tensor, blocks[name]) if name in blocks else tensor.full_tensor()
            whole[name] = tensor.to("cpu")
    return whole
