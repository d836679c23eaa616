"""FSDP2 over a model whose experts are already split over the expert-parallel ranks.

Dense parameters are sharded over the data-parallel mesh, unit by unit as the architecture's own plan in Transformers
says. A layer's experts, of which each rank of an expert-parallel group holds its share, are sharded over the ranks that
hold the same ones (`efsdp`). What an architecture keeps in fp32 beside 16-bit weights (routers, norms, sinks) is small
and lies whole on each rank, as FSDP2 wants one dtype in a unit. Runs between the model's construction on the meta
device and the loading of its weights, so that every rank then reads only what it keeps.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from slipstream import hf, hf_models
from slipstream.compilation import decoder_layers
from slipstream.moe.dispatch import GRADIENT_DIVISOR
from slipstream.moe.foreign import adapt
from slipstream.parallel import embedding as embeddings
from slipstream.parallel.average import AverageGradients
from slipstream.parallel.setup import DistributedSetup
from slipstream.parallel.units import UNIT_PARAMETERS, frees_after_forward, joined

Plan = dict[str, str]
WHOLE = "_slipstream_whole"  # on a model: the names of parameters left whole, whose gradients nobody averages yet


def shard(model: Any, meshes: Any, fsdp_plan: Plan, ep_plan: Plan, setup: DistributedSetup) -> Any:
    """Apply FSDP2 to `model`, in place.

    Args:
        model: on the meta device, its experts' parameters already DTensors over the `ep` mesh.
        meshes: Transformers' mesh manager; `get_mesh` takes `fsdp`, `efsdp`, or a pair with `dp_replicate` before.
        fsdp_plan: module name -> "free_full_weight" or "keep_full_weight" (after forward).
        ep_plan: module or parameter name -> style; the experts are "ep_dispatch_experts".
    """
    elsewhere = _shard_experts(model, meshes, ep_plan, setup) | _leave_whole(model)
    mesh = _data_mesh(meshes, "fsdp", setup)
    freed, kept = _units(model, fsdp_plan)
    if _spreads_embedding(model, elsewhere, setup):
        elsewhere.add(embeddings.spread(model.get_input_embeddings(), mesh, setup.timeout_minutes))
        freed = [module for module in freed if module is not model.get_input_embeddings()]
    policies = _policies(setup)
    policies |= {"shard_placement_fn": _placement(model, setup.fsdp_size), "ignored_params": elsewhere}
    units, frees = _join_layers(freed, decoder_layers(model), elsewhere, setup)
    embedding: Any = model.get_input_embeddings()
    for unit in units:
        alone = unit == [embedding]
        fully_shard(unit, mesh=mesh, reshard_after_forward=frees or alone, **policies)
        if alone:
            embedding.set_unshard_in_backward(False)  # its gradient needs the tokens alone
    # The last norm and the head run back to back, and backward begins with them: one unit.
    tails = [kept] if len(kept) == 2 else [[module] for module in kept]
    for tail in tails:
        fully_shard(tail, mesh=mesh, reshard_after_forward=False, **policies)
        last: Any = tail[0]
        # Else the buffer that the head was gathered in stays beside it through the loss.
        last._set_unshard_async_op(True)
    first: Any
    for (first, *_), (following, *_) in itertools.pairwise([*units, *tails]):
        first.set_modules_to_forward_prefetch([following])
    fully_shard(model, mesh=mesh, **policies)
    hf.mark_fsdp_managed(model)
    return model


def shard_added(model: Any, name: str, setup: DistributedSetup) -> None:
    """Spread a module that was added to a `model` which `shard` has spread, in place: its experts as the model's, and
    each of its `layers`, which run behind the model's own, as a unit of FSDP2.

    Args:
        name: the module's in `model`; on the meta device, all its parameters in `layers`.
    """
    added: Any = model.get_submodule(name)
    meshes = hf_models.meshes(model)
    plan = {f"{name}.{key}": style for key, style in plan_experts(added, setup.ep_size).items()}
    elsewhere = _shard_experts(model, meshes, hf_models.split_experts(model, plan), setup) | _leave_whole(model, name)
    policies = _policies(setup)
    policies |= {"shard_placement_fn": _placement(model, setup.fsdp_size), "ignored_params": elsewhere}
    for layer in added.layers:
        # Backward begins with the last.
        frees = layer is not added.layers[-1] and setup.reshard_after_forward is not False
        fully_shard(layer, mesh=_data_mesh(meshes, "fsdp", setup), reshard_after_forward=frees, **policies)


def _leave_whole(model: Any, part: str = "") -> set[nn.Parameter]:
    """What of a module of `model`, or of all of it, stays in fp32 beside weights of 16 bits."""
    in_float32 = hf.kept_in_float32(model, model.dtype)
    if in_float32 is None:
        return set()
    whole = {
        name: parameter
        for name, parameter in model.get_submodule(part).named_parameters(prefix=part)
        if in_float32.search(name) and not isinstance(parameter, DTensor)
    }
    model.__dict__.setdefault(WHOLE, []).extend(whole)
    return set(whole.values())


def average_whole(model: Any) -> None:
    """Let the gradients of what was left whole since the last call become their mean over the ranks; once its
    parameters are those that train."""
    average = AverageGradients()
    for name in model.__dict__.pop(WHOLE, ()):
        average.add(model.get_parameter(name))


def plan_experts(model: Any, ep_size: int) -> Plan:
    """How the experts of a model on the meta device are split: name -> style; empty where `ep_size` is 1."""
    adapt(model)
    return hf_models.experts_plan(model) if ep_size > 1 else {}


def _shard_experts(model: Any, meshes: Any, ep_plan: Plan, setup: DistributedSetup) -> set[nn.Parameter]:
    """Give the experts of `ep_plan` units of their own; those that FSDP2 has nothing to do for are returned instead."""
    if stay_put(setup):
        return _experts_of_one_owner(model, meshes, ep_plan)
    if setup.ep_size > 1:
        mesh = _data_mesh(meshes, "efsdp", setup)
        place = _placement(model, setup.efsdp_size)
        for name, style in ep_plan.items():
            if style == "ep_dispatch_experts":
                experts = model.get_submodule(name)
                fully_shard(
                    experts, mesh=mesh, reshard_after_forward=True, shard_placement_fn=place, **_policies(setup)
                )
                _scale_gradients(experts, setup)
    return set()


def _spreads_embedding(model: Any, elsewhere: set[nn.Parameter], setup: DistributedSetup) -> bool:
    """Whether tokens travel to rows of the input embedding instead of FSDP2 gathering it."""
    if setup.replicas > 1 or setup.tp_size > 1 or setup.param_dtype is not None or setup.cpu_offload:
        return False
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    tied = head is not None and weight is head.weight
    return not tied and weight not in elsewhere and setup.fsdp_size <= embeddings.most_ranks(embedding)


def stay_put(setup: DistributedSetup) -> bool:
    """Whether each expert has one owner and FSDP2 nothing to do for it: no other rank or replica holds it, and it is
    neither cast nor offloaded."""
    one_owner = setup.ep_size > 1 and setup.efsdp_size == 1 and setup.replicas == 1
    return one_owner and setup.param_dtype is None and not setup.cpu_offload


def _experts_of_one_owner(model: Any, meshes: Any, ep_plan: Plan) -> set[nn.Parameter]:
    """Lay the experts out over the data-parallel mesh, whose ranks are those of the expert-parallel one, and leave them
    to themselves: no gather, no reduction, no copy of their gradients. On one mesh with the dense parameters they suit
    functions that take only one, such as PyTorch's own gradient clipping.

    An expert's gradient is a sum over the tokens of all ranks, where the mean is wanted; the exchange divides it on the
    way in, by the token instead of by the weight.
    """
    mesh = meshes.get_mesh("fsdp")
    owned = set()
    for name, style in ep_plan.items():
        if style != "ep_dispatch_experts":
            continue
        experts = model.get_submodule(name)
        setattr(experts, GRADIENT_DIVISOR, mesh.size())
        for key, parameter in experts._parameters.items():
            if isinstance(parameter, DTensor):
                moved = DTensor.from_local(
                    parameter.to_local(), mesh, [Shard(0)], run_check=False,
                    shape=parameter.shape, stride=parameter.stride(),
                )  # fmt: skip
                experts._parameters[key] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
                owned.add(experts._parameters[key])
    return owned


def _policies(setup: DistributedSetup) -> dict[str, Any]:
    policies: dict[str, Any] = {}
    if setup.param_dtype is not None or setup.reduce_dtype is not None:
        dtypes = (getattr(torch, name) if name else None for name in (setup.param_dtype, setup.reduce_dtype))
        param_dtype, reduce_dtype = dtypes
        policies["mp_policy"] = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    if setup.cpu_offload:
        policies["offload_policy"] = CPUOffloadPolicy()
    return policies


def _data_mesh(meshes: Any, name: str, setup: DistributedSetup) -> DeviceMesh:
    return meshes.get_mesh(("dp_replicate", name) if setup.replicas > 1 else name)


def _scale_gradients(experts: Any, setup: DistributedSetup) -> None:
    # An expert's gradient is the sum over the tokens of all data-parallel ranks, as each rank's loss is a mean: divide
    # by all of them, not by the ranks that FSDP reduces over.
    experts.set_gradient_divide_factor(float(setup.dp_size))
    if setup.efsdp_size > 1:
        # Sum and divide here: a factor other than the group's size goes through PREMUL_SUM, which gloo refuses and NCCL
        # zeroes in bf16 up to torch 2.13 (pytorch#190747). With one rank FSDP2 would divide twice.
        experts.set_force_sum_reduction_for_comms(True)


def _placement(model: Any, ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Shard whole experts, or an inner dimension where some rank would be left with none (Transformers cannot load an
    empty shard of an experts' tensor): 6 experts `[6, 96, 64]` over 4 ranks go by the 64.

    By the dimension that goes in: along the one that comes out a checkpoint's gate and up are put together, and a part
    of both is not a part of the whole.
    """
    inner = {
        id(parameter): 1 if experts.is_transposed else 2
        for _, experts in hf.experts_modules(model)
        for parameter in experts.parameters()
        if parameter.ndim == 3
    }
    names = hf_models.merged_along_dim0(model)
    merged = {id(parameter): name for name, parameter in model.named_parameters() if name in names}

    def place(parameter: nn.Parameter) -> Shard | None:
        if name := merged.get(id(parameter)):
            fits = [at for at in range(1, parameter.ndim) if parameter.shape[at] % ranks == 0]
            if not fits and ranks > 1:
                raise ValueError(
                    f"{name} {tuple(parameter.shape)} is put together from several tensors of the checkpoint and does "
                    f"not divide over {ranks} ranks otherwise; use a number of ranks that divides {parameter.shape[-1]}"
                )
            return Shard(fits[-1]) if fits else None
        dim = inner.get(id(parameter))
        if dim is None:
            return None
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        # FSDP2 gives the first ranks ceil(n / ranks) rows each; the last has some if that leaves any.
        rows = -(-local.shape[0] // ranks)
        empty = rows * (ranks - 1) >= local.shape[0]
        return Shard(dim) if empty and local.shape[dim] % ranks == 0 else None

    return place


def _join_layers(
    modules: list[nn.Module], layers: list[nn.Module], elsewhere: set[nn.Parameter], setup: DistributedSetup
) -> tuple[list[list[nn.Module]], bool]:
    """`modules` as units of FSDP2, decoder layers that are small together, and whether they are freed after forward.

    Experts have units of their own by now, or are among the parameters `elsewhere`.
    """
    managed = {
        id(parameter)
        for module in modules
        for below in module.modules()
        if isinstance(below, FSDPModule)
        for parameter in below.parameters()
    } | {id(parameter) for parameter in elsewhere}
    sizes = {
        id(layer): sum(parameter.numel() for parameter in layer.parameters() if id(parameter) not in managed)
        for layer in layers
    }
    units = joined([sizes.get(id(module), UNIT_PARAMETERS) for module in modules])
    dtype = getattr(torch, setup.param_dtype) if setup.param_dtype else next(modules[0].parameters()).dtype
    frees = frees_after_forward(setup.reshard_after_forward, sum(sizes.values()) * dtype.itemsize)
    return [[modules[position] for position in unit] for unit in units], frees


def _units(model: Any, fsdp_plan: Plan) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules to shard one by one, and those that form the tail. A plan that misses the embedding or the head
    (Nemotron-H's in 5.23) would leave them in the root's unit, gathered for the whole step."""
    freed = [model.get_submodule(name) for name, style in fsdp_plan.items() if style == "free_full_weight"]
    kept = [model.get_submodule(name) for name, style in fsdp_plan.items() if style == "keep_full_weight"]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    planned = {id(module) for module in (*freed, *kept)}
    layers = decoder_layers(model)
    if not any(id(layer) in planned for layer in layers):
        freed = [*layers, *freed]  # Llama 4's plan and DBRX's name none that the text model has
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    if embedding is not None and id(embedding) not in planned and not tied:
        freed.append(embedding)
    if head is not None and id(head) not in planned and not tied:
        kept.append(head)
    return freed, kept
