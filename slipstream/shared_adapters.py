"""One pair of LoRA factors for all experts of a projection, instead of a pair for each.

PEFT has no such setting. The config carries a mark, the wrappers keep `[r, in]` and `[out, r]`, and what is saved has
the pair once for each expert, so that plain PEFT loads it. The mark is saved too (PEFT says that it ignores it), and
with it the pair comes back as one.

What is here of PEFT beyond its public interface is checked against 0.21.2.
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from slipstream.parallel.blocks import by_block

if TYPE_CHECKING:
    from peft import LoraConfig

MARK = "slipstream_share_experts"  # on a config, and in adapter_config.json


def share_experts(config: "LoraConfig", share: bool = True) -> "LoraConfig":
    """Let adapters made by `config` have one pair of factors for all experts of a projection; returns it.

    Raises: ValueError where it names no parameters.
    """
    if share and not config.target_parameters:
        raise ValueError(
            "share_experts: target_parameters names no experts; name them (slipstream.adapters.all_experts(model), in "
            "a recipe lora.target_parameters: all-experts), or leave share_experts out"
        )
    setattr(config, MARK, share)
    return config


def by_expert(a: Tensor, b: Tensor, rank: int, experts: int) -> tuple[Tensor, Tensor]:
    """A wrapper's factors as `[E, r, in]` and `[out, r, E]`, views: of a pair for each expert, or of one for all."""
    if b.shape[1] == rank:
        return a.expand(experts, -1, -1), b[:, :, None].expand(-1, -1, experts)
    return a.view(-1, rank, a.shape[1]), b.view(-1, rank, experts)


def shrink(wrapper: Any, adapter: str, config: Any) -> None:
    """Keep the first expert's pair of a new adapter alone, if `config` says so."""
    rank, experts = wrapper.r[adapter], wrapper.num_experts
    if experts == 1 or not getattr(config, MARK, False):
        return
    for kind, factors in (("A", wrapper.lora_A), ("B", wrapper.lora_B)):
        linear = factors[adapter]
        one = _of_first(linear.weight.data, kind, rank, experts).clone()
        linear.weight = nn.Parameter(one, linear.weight.requires_grad)
        linear.out_features, linear.in_features = one.shape
        linear.register_load_state_dict_pre_hook(functools.partial(_take, kind, rank, experts))


def expanded(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of `model`'s state, with a pair for each expert where there is one for all."""
    tensors = dict(tensors)
    for name, wrapper in _wrappers(model):
        for adapter in wrapper.lora_A:
            keys = [f"{name}.lora_{kind}.{adapter}.weight" for kind in "AB"]
            if keys[0] in tensors and is_shared(wrapper, adapter):
                tensors |= zip(keys, _whole(wrapper, adapter, *(tensors[key] for key in keys)), strict=True)
    return tensors


def blocks(model: nn.Module) -> dict[str, int]:
    """The names of factors `[out, r * E]` that have a pair for each of E experts, and their ranks r."""
    return {
        f"{name}.lora_B.{adapter}.weight": wrapper.r[adapter]
        for name, wrapper in _wrappers(model)
        for adapter in wrapper.lora_B
        if wrapper.num_experts > 1 and not is_shared(wrapper, adapter)
    }


def has_shared(model: nn.Module) -> bool:
    """Whether any adapter of `model` has one pair for all experts."""
    return any(is_shared(wrapper, adapter) for _, wrapper in _wrappers(model) for adapter in wrapper.lora_A)


def patch() -> None:
    """Let PEFT save and read the mark, and make delta weights of one pair."""
    from peft import LoraConfig
    from peft.config import PeftConfigMixin
    from peft.tuners.lora.layer import ParamWrapper

    config: Any = LoraConfig
    mixin: Any = PeftConfigMixin
    wrapper: Any = ParamWrapper
    config.save_pretrained = _saving_mark(config.save_pretrained)
    mixin.from_peft_type = classmethod(_reading_mark(mixin.from_peft_type.__func__))
    wrapper.get_delta_weight = _of_whole(wrapper.get_delta_weight)
    wrapper.get_delta_factors = _of_whole(wrapper.get_delta_factors)


def _wrappers(model: nn.Module) -> Any:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "parameter_name"))


def is_shared(wrapper: Any, adapter: str) -> bool:
    """Whether the adapter of `wrapper` has one pair for all experts."""
    shared: bool = wrapper.num_experts > 1 and wrapper.lora_A[adapter].weight.shape[0] == wrapper.r[adapter]
    return shared


def _whole(wrapper: Any, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As PEFT has them: `[E * r, in]` and `[out, r * E]`."""
    a_ErA, b_BrE = by_expert(a, b, wrapper.r[adapter], wrapper.num_experts)
    return a_ErA.flatten(0, 1), b_BrE.flatten(1)


def _of_first(factor: Tensor, kind: str, rank: int, experts: int) -> Tensor:
    return factor[:rank] if kind == "A" else factor.view(-1, rank, experts)[..., 0]


def _take(
    kind: str, rank: int, experts: int, linear: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """What is loaded has a pair for each expert, and all the same; what continues a run has one."""
    key, own = f"{prefix}weight", linear.weight
    given = state.get(key)
    if not isinstance(own, Tensor) or given is None or given.numel() != own.numel() * experts:
        return
    whole: Tensor = given.full_tensor() if isinstance(given, DTensor) else given
    one = _of_first(whole, kind, rank, experts)
    again = one.repeat(experts, 1) if kind == "A" else one.repeat_interleave(experts, 1)
    if not torch.equal(again, whole):
        raise ValueError(
            f"{key}: the experts' factors differ, so they can't be shared; load them without share_experts"
        )
    state[key] = distribute_tensor(one, own.device_mesh, own.placements) if isinstance(own, DTensor) else one


def _saving_mark(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str, **kwargs: Any) -> None:
        original(self, save_directory, **kwargs)
        if getattr(self, MARK, False):
            path = Path(save_directory) / "adapter_config.json"
            saved = {**json.loads(path.read_text(encoding="utf-8")), MARK: True}
            path.write_text(json.dumps(saved, indent=2, sort_keys=True), encoding="utf-8")

    return save_pretrained


def _reading_mark(original: Any) -> Any:
    @functools.wraps(original)
    def from_peft_type(cls: Any, **kwargs: Any) -> Any:
        shared = kwargs.pop(MARK, False)
        config = original(cls, **kwargs)
        if shared:
            setattr(config, MARK, True)
        return config

    return from_peft_type


class _WithWholeFactors:
    """A wrapper as PEFT's own methods expect it."""

    def __init__(self, wrapper: Any, adapter: str) -> None:
        self._wrapper = wrapper
        a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        if is_shared(wrapper, adapter):
            a, b = _whole(wrapper, adapter, a, b)
        else:  # not every PyTorch can take apart columns that lie with their experts
            b = by_block(b, wrapper.r[adapter])
        self.lora_A, self.lora_B = {adapter: SimpleNamespace(weight=a)}, {adapter: SimpleNamespace(weight=b)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


def _of_whole(original: Any) -> Any:
    @functools.wraps(original)
    def get(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        spread = isinstance(self.lora_B[adapter_name].weight, DTensor)
        of: Any = _WithWholeFactors(self, adapter_name) if spread or is_shared(self, adapter_name) else self
        return original(of, adapter_name, *args, **kwargs)

    return get
