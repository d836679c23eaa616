"""`load_in_4bit`: the experts of a model in NF4, for adapters beside them (QLoRA, Dettmers et al. 2023, arXiv
2305.14314). All other weights keep their dtype: of an MoE they are a few percent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

from torch.distributed.tensor import DTensor

from slipstream import hf, hf_models
from slipstream.backend import BackendConfig
from slipstream.description import MARK, Choice, acceleration_of
from slipstream.moe import foreign
from slipstream.moe.experts import is_fused, projection_names
from slipstream.moe.packed import is_packed, pack
from slipstream.parallel.setup import DistributedSetup
from slipstream.parallel.shard import stay_put


def check(config: Any, backend: BackendConfig, setup: DistributedSetup | None) -> None:
    """Raise ValueError where `load_in_4bit` cannot be had, before anything is loaded.

    Args:
        setup: how the model is spread over ranks, if it is.
    """
    if hf.num_routed_experts(config) is None:
        raise ValueError(
            f"load_in_4bit: {type(config).__name__} describes a dense model, and it is experts that are stored in 4 "
            "bits; leave it out"
        )
    if backend.experts == "transformers":
        raise ValueError("load_in_4bit: experts='transformers' reads whole weights; use experts='auto'")
    if backend.experts == "fp8":
        raise ValueError("load_in_4bit: experts='fp8' makes FP8 of weights in 16 bits; use experts='auto'")
    if setup is not None and setup.ranks > 1 and not stay_put(setup):
        raise ValueError(
            f"load_in_4bit: packed experts stay with one rank and are not sharded by FSDP2, so on {setup.ranks} ranks "
            f"use ep_size={setup.ranks} with dp_replicate=1, and neither param_dtype nor cpu_offload (given "
            f"ep_size={setup.ep_size}, dp_replicate={setup.replicas}, param_dtype={setup.param_dtype}, "
            f"cpu_offload={setup.cpu_offload})"
        )


@contextmanager
def packing() -> Iterator[None]:
    """Pack experts' weights as `from_pretrained` reads them, one by one: no two of them are there whole at once."""
    finish = []

    def observe(model: Any, name: str) -> None:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if hf.is_experts(module) and last in projection_names(module):
            finish.append(_pack(module, last, name))

    with hf_models.observing_loaded(observe):
        yield
    for store in finish:
        store()


def quantize_experts(model: Any) -> None:
    """Store the experts of an accelerated `model` in 4 bits, in place, those that are not yet.

    Raises:
        ValueError: experts that do not run as one operator on their own two weights.
    """
    modules = list(hf.experts_modules(model))
    if not modules:
        raise ValueError(
            f"load_in_4bit: {type(model).__name__} does not call its experts through the interface; leave it out"
        )
    for name, experts in modules:
        for projection in projection_names(experts):
            if not is_packed(experts, projection):
                _pack(experts, projection, f"{name}.{projection}")()
    model.save_pretrained = MethodType(save_pretrained, model)
    applied = acceleration_of(model)
    assert applied is not None
    found = Choice("expert weights", "nf4", f"{len(modules)} layers; dequantised for a layer's GEMMs, forward and back")
    setattr(model, MARK, replace(applied, choices=(*applied.choices, found)))


def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of the model's own. Raises ValueError."""
    raise ValueError(
        f"this {type(self).__name__} has its experts in 4 bits and cannot be saved whole: save the adapters "
        "(PeftModel.save_pretrained), and merge them into the base with `slipstream merge`"
    )


def _pack(experts: Any, projection: str, name: str) -> Callable[[], None]:
    parameter = experts._parameters.get(projection)
    if parameter is None or parameter.ndim != 3 or foreign.own_projections(experts) is not None:
        raise ValueError(f"load_in_4bit: {type(experts).__name__} keeps its weights in a form of its own; leave it out")
    if not is_fused(experts):
        raise ValueError(
            f"load_in_4bit: {type(experts).__name__} has parameters between or behind its projections, which run "
            "outside the experts' operator; leave it out"
        )
    if isinstance(parameter, DTensor) and any(not place.is_shard(0) for place in parameter.placements):
        raise ValueError(f"load_in_4bit: {name} is sharded within experts; use ep_size = the number of ranks")
    return pack(experts, projection)
