"""The passes over a loaded model, in order: experts, attention, loss, activation checkpointing, compiling."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from slipstream import adapters, fp8, hf, linear_fp8
from slipstream.attention import block_residual, block_selection, head_scales, relative_bias
from slipstream.attention import interface as attention
from slipstream.backend import BackendConfig
from slipstream.checkpoint.export import install_save
from slipstream.compilation import compile_layers, why_not_compiled
from slipstream.description import MARK, Acceleration, Choice, acceleration_of, unwrap
from slipstream.loss import defer_logits, why_not_deferred
from slipstream.moe import dispatch, experts, foreign, grouped_projections
from slipstream.parallel.activations import checkpoint_activations
from slipstream.parallel.setup import DistributedSetup
from slipstream.parallel.shard import average_whole
from slipstream.recurrent import install as recurrent


def accelerate(
    model: Any,
    *,
    backend: BackendConfig | Mapping[str, Any] | None = None,
    distributed_setup: DistributedSetup | Mapping[str, Any] | None = None,
) -> Any:
    """Put a loaded Transformers model on the fast path, in place, and return it.

    The model stays what it was: same class, parameters, names, config and outputs. Calling this again changes
    nothing. `slipstream.describe(model)` says what was done.

    Args:
        model: a `PreTrainedModel` for causal language modelling, or a PEFT model around one.
        backend: a `BackendConfig` or its fields as a dict.
        distributed_setup: how the model was distributed when it was loaded. A model that lies whole on one rank
            can't be distributed here: give `distributed_setup` to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        TypeError: `model` is not a Transformers model.
        ValueError: a setting that does not exist or does not fit the model, or another `backend` than it has.
    """
    backend = BackendConfig.of(backend)
    core = unwrap(model)
    if not isinstance(core, PreTrainedModel):
        raise TypeError(
            f"accelerate takes a Transformers model (or a PEFT model around one), not {type(model).__name__}"
        )
    applied = acceleration_of(core)
    if applied is not None:
        if backend not in (applied.backend, BackendConfig()):
            raise ValueError(
                f"this {type(core).__name__} is accelerated already, with {applied.backend}: load it anew for another"
            )
        return model
    setup = DistributedSetup.of(distributed_setup)
    if setup.tp_size > 1 and "fp8" in (backend.experts, backend.linear):
        raise ValueError(
            f"BackendConfig: 'fp8' takes whole weights, not those of tp_size={setup.tp_size}; use tp_size=1"
        )
    if distributed_setup is not None:
        setup.check(hf.num_routed_experts(core.config))
        if setup.ranks > 1 and not hf.is_distributed(core):
            raise ValueError(
                f"distributed_setup spreads a model over {setup.ranks} ranks, but this one lies whole on each: give it "
                "to slipstream.AutoModelForCausalLM.from_pretrained, which loads the model shard by shard"
            )
    choices: tuple[Choice, ...] = (
        _experts(core, backend),
        choose_dispatcher(backend, setup),
        _attention(core, backend),
        _loss(core, backend),
        _linear(core, backend, adapted=core is not model),
    )
    if (found := recurrent.install(core)) is not None:
        scans, documents = found
        faster = "" if scans != "torch" else "mamba_ssm or fla: their scans are kernels, ours here is PyTorch"
        choices += (Choice("recurrent", scans, documents, faster),)
    checkpoint_activations(core, setup.activation_checkpointing)
    choices += _compile(core, backend)
    if hf.is_distributed(core):
        average_whole(core)
        install_save(core)
    adapters.install(core)
    setattr(core, MARK, Acceleration(backend, setup, choices))
    return model


def _experts(model: PreTrainedModel, backend: BackendConfig) -> Choice:
    adapted = backend.experts != "transformers" and foreign.adapt(model)
    modules = [module for _, module in hf.experts_modules(model)]
    if not modules:
        dense = hf.num_routed_experts(model.config) is None
        why = "a dense model" if dense else f"{type(model).__name__} does not call its experts through the interface"
        if backend.experts in ("slipstream", "fp8") or (backend.gate == "balanced" and not dense):
            raise ValueError(
                f"BackendConfig(experts={backend.experts!r}, gate={backend.gate!r}): {why}; use experts='auto'"
            )
        if backend.experts == "auto" and (found := grouped_projections.adapt(model)):
            return Choice("experts", "grouped_mm", f"{found} sets of projections; {why}")
        return Choice("experts", "transformers", why)
    if backend.experts == "transformers":
        return Choice("experts", hf.experts_implementation(model), "asked for")
    if not all(parameter.dtype.is_floating_point and parameter.element_size() > 1 for parameter in _weights(modules)):
        if backend.experts == "fp8":
            raise ValueError("BackendConfig(experts='fp8'): the experts' weights are quantised; use experts='auto'")
        return Choice("experts", hf.experts_implementation(model), "the experts' weights are quantised")
    precision = ""
    if backend.experts == "fp8":
        _check_fp8_experts(modules)
        precision = "; forward and input gradients in FP8, weight gradients in bf16"
    name = experts.implementation(fp8=backend.experts == "fp8", balanced=backend.gate == "balanced")
    if backend.gate == "balanced":
        warnings.warn(
            "gate='balanced': every expert gets the same number of tokens, whatever the router says. "
            "The model's output is meaningless; use this to measure speed only.",
            stacklevel=4,
        )
    if adapted:
        foreign.set_implementation(model, name)
    else:
        model.set_experts_implementation(name)
    flavours = sorted({experts.flavour(module) for module in modules})
    return Choice("experts", name, f"{len(modules)} layers; {' and '.join(flavours)}{precision}")


def _check_fp8_experts(modules: list[torch.nn.Module]) -> None:
    for module in modules:
        problems = [
            experts.fp8_obstacle(module),
            fp8.device_obstacle(next(module.parameters())),
            *(fp8.width_obstacle(*weight.shape[1:]) for weight in module.parameters() if weight.ndim == 3),
        ]
        for problem in filter(None, problems):
            raise ValueError(f"BackendConfig(experts='fp8'): {problem}; use experts='auto'")


def _weights(modules: list[torch.nn.Module]) -> list[torch.nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


def choose_dispatcher(backend: BackendConfig, setup: DistributedSetup) -> Choice:
    """How tokens reach the experts of other ranks."""
    if setup.ep_size == 1:
        if backend.dispatcher not in ("auto", "local"):
            raise ValueError(f"BackendConfig(dispatcher={backend.dispatcher!r}): with ep_size=1 no token travels")
        return Choice("dispatcher", "local", "every rank holds all experts")
    if backend.dispatcher == "local":
        raise ValueError(f"BackendConfig(dispatcher='local'): with ep_size={setup.ep_size} tokens have to travel")
    if backend.dispatcher != "auto":
        return Choice("dispatcher", backend.dispatcher, "asked for")
    return Choice("dispatcher", *dispatch.choose(setup.ep_size))


def _attention(model: PreTrainedModel, backend: BackendConfig) -> Choice:
    choice = _attention_function(model, backend)
    if block_selection.install(model):
        return replace(choice, why=f"{choice.why}; its indexers select blocks for all queries at once")
    block_residual.install(model)
    if relative_bias.install(model):
        return replace(choice, why=f"{choice.why}; the gradient of its relative bias is gathered")
    return choice


def _attention_function(model: PreTrainedModel, backend: BackendConfig) -> Choice:
    chosen = hf.attention_implementation(model)
    obstacle = attention.obstacle(model)
    if backend.attn == attention.NAME and obstacle is not None:
        raise ValueError(f"BackendConfig(attn={attention.NAME!r}): {obstacle}; use attn='auto'")
    # Nothing says whether the caller asked for what is the default, so the default may change.
    default = "sdpa" if hf.supports_sdpa(model) else "eager"
    if backend.attn == attention.NAME or (
        backend.attn == "auto" and chosen == default and obstacle is None and attention.has_device()
    ):
        attention.install(model)
        return Choice("attn", attention.NAME, attention.why(model))
    if backend.attn != "auto":
        model.set_attn_implementation(backend.attn)
        return Choice("attn", backend.attn, "asked for")
    if chosen == "sdpa":
        why = obstacle or "no GPU with FlashAttention-2: as Transformers"
        return Choice("attn", chosen, f"{why}; PyTorch picks the kernel")
    return Choice("attn", chosen, obstacle if chosen == default and obstacle else "what the model was loaded with")


def _linear(model: PreTrainedModel, backend: BackendConfig, adapted: bool) -> Choice:
    if backend.linear != "fp8":
        return Choice("linear", "torch", "cuBLAS runs these GEMMs near the chip's rate")
    if adapted:
        raise ValueError("BackendConfig(linear='fp8'): adapters stay in 16 bits; accelerate the model, then add them")
    found = linear_fp8.install(model)
    return Choice("linear", "fp8", f"{found} projections in decoder layers; weight gradients in bf16")


def _compile(model: PreTrainedModel, backend: BackendConfig) -> tuple[Choice, ...]:
    obstacle = "asked for" if backend.compile == "none" else None
    if backend.compile == "auto":
        obstacle = why_not_compiled(model)
    if obstacle is not None:
        choices = [Choice("compile", "none", obstacle)]
        inside, why = "transformers", "the decoder layers are not compiled"
    else:
        gpu_only = backend.compile == "auto"
        layers = compile_layers(model, gpu_only=gpu_only)
        if not layers:
            raise ValueError(f"BackendConfig(compile='layers'): {why_not_compiled(model)}; use compile='auto'")
        head_scales.install(model)
        where = "on first use on a GPU" if gpu_only and not next(model.parameters()).is_cuda else "on first use"
        choices = [Choice("compile", "layers", f"{' and '.join(layers)}, {where}; one graph per kind of layer")]
        inside, why = "compiled", "fused with its neighbours in the layer"
    return (*choices, *(Choice(operation, inside, why) for operation in ("rms_norm", "rope")))


def _loss(model: PreTrainedModel, backend: BackendConfig) -> Choice:
    if backend.loss == "transformers":
        return Choice("loss", "transformers", "asked for")
    if (obstacle := why_not_deferred(model)) is not None:
        if backend.loss == "fused":
            raise ValueError(f"BackendConfig(loss='fused'): {obstacle}; use loss='auto'")
        return Choice("loss", "transformers", obstacle)
    defer_logits(model)
    return Choice("loss", "fused", "linear cross-entropy in chunks; the logits exist only if you touch them")
