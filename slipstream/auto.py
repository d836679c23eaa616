"""The one-import API: resolve and load through Transformers, then accelerate."""

import copy
import os
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from slipstream import hf, hf_models, quantization
from slipstream.acceleration import accelerate, choose_dispatcher
from slipstream.backend import BackendConfig
from slipstream.checkpoint import dequantize, passthrough
from slipstream.checkpoint.export import install_save
from slipstream.moe import dispatch
from slipstream.parallel.initialize import build_sharded
from slipstream.parallel.setup import DistributedSetup, join_process_group
from slipstream.parallel.shard import plan_experts, shard


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """Transformers' class of this name; what it returns trains faster.

    `from_pretrained` and `from_config` take everything that Transformers' do, and three keywords more:

    - `backend`: a `BackendConfig` (or its fields as a dict), which implementation each operation uses.
    - `distributed_setup`: a `DistributedSetup` (or its fields as a dict), how the model is spread over the ranks.
    - `load_in_4bit`: store the experts in NF4, frozen, for LoRA beside them.

    The result is the model Transformers would return, of the same class. `slipstream.describe(model)` says what
    was accelerated.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        backend: BackendConfig | Mapping[str, Any] | None = None,
        distributed_setup: DistributedSetup | Mapping[str, Any] | None = None,
        load_in_4bit: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model as Transformers does, then `accelerate` it.

        A checkpoint in FP8 blocks or MXFP4 is dequantised while it is read, as such weights do not train; give a
        `quantization_config` to leave that to Transformers.

        Raises:
            ValueError: a setting that does not exist or does not fit the model (before anything is loaded).
            OSError: the checkpoint is missing or damaged.
        """
        backend = _backend(backend, kwargs)
        setup = DistributedSetup.of(distributed_setup)
        # A distributed_config of the caller's own is Transformers' to carry out.
        sharding: Any = nullcontext()
        name = pretrained_model_name_or_path
        in_files = isinstance(name, str | os.PathLike)
        config = kwargs.get("config")
        needed = distributed_setup is not None or load_in_4bit
        if config is None and (needed or (in_files and not kwargs.keys() & _READ_OTHERWISE)):
            config = _config(name, kwargs, needed=needed)
        if load_in_4bit:
            if "quantization_config" in kwargs:
                raise ValueError("load_in_4bit and quantization_config: weights are quantised once; leave one out")
            quantization.check(config, backend, setup if distributed_setup is not None else None)
        if distributed_setup is not None:
            assert config is not None
            setup.check(hf.num_routed_experts(config))
            if setup.ranks > 1:
                kwargs["distributed_config"] = _distributed_config(backend, setup)
                sharding = hf.sharding_by(partial(shard, setup=setup), partial(plan_experts, ep_size=setup.ep_size))
        hub = {key: kwargs[key] for key in _FILE_KEYWORDS if key in kwargs}
        own_class: Any = None
        if in_files and not kwargs.keys() & _READ_OTHERWISE and dequantize.method_of(config) is not None:
            assert config is not None
            own_class = hf_models.causal_lm_class(config)
        try:
            with sharding, quantization.packing() if load_in_4bit else nullcontext(), ExitStack() as stack:
                if own_class is None:
                    loaded = super().from_pretrained(name, *model_args, **kwargs)
                else:
                    plain = _dequantised(str(name), config, hub, kwargs, stack)
                    loaded = own_class.from_pretrained(None, *model_args, **plain)
        except SafetensorError as error:
            raise OSError(
                f"{pretrained_model_name_or_path}: a safetensors file there is damaged or cut short ({error}); "
                "copy or download the checkpoint again"
            ) from error
        # output_loading_info=True returns (model, info).
        model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        if own_class is not None:
            model.config.name_or_path = str(pretrained_model_name_or_path)
            with suppress(OSError):
                model.generation_config = transformers.GenerationConfig.from_pretrained(
                    pretrained_model_name_or_path, **hub
                )
        model = accelerate(model, backend=backend, distributed_setup=distributed_setup)
        if in_files and (kept := passthrough.find(str(pretrained_model_name_or_path), model.config, **hub)):
            setattr(model, passthrough.KEPT, kept)
            setattr(model, passthrough.BLOCK, None if own_class is None else dequantize.block_of(config))
            install_save(model)
        if load_in_4bit:
            quantization.quantize_experts(model)
        return (model, *info) if info else model

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        backend: BackendConfig | Mapping[str, Any] | None = None,
        distributed_setup: DistributedSetup | Mapping[str, Any] | None = None,
        load_in_4bit: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Build a model with random weights as Transformers does, then `accelerate` it.

        Raises:
            ValueError: a setting that does not exist or does not fit the model.
        """
        backend = _backend(backend, kwargs)
        setup = DistributedSetup.of(distributed_setup)
        if distributed_setup is not None:
            setup.check(hf.num_routed_experts(config))
        if load_in_4bit:
            quantization.check(config, backend, setup if distributed_setup is not None else None)
        # A copy, because the config carries the choice of experts and attention to whatever model shares it.
        build = partial(super().from_config, copy.deepcopy(config), **kwargs)
        if distributed_setup is None or setup.ranks == 1:
            model = build()
        else:
            distributed_config = _distributed_config(backend, setup)
            with hf.sharding_by(partial(shard, setup=setup), partial(plan_experts, ep_size=setup.ep_size)):
                model = build_sharded(build, partial(hf.distribute, config=distributed_config))
        model = accelerate(model, backend=backend, distributed_setup=distributed_setup)
        if load_in_4bit:
            quantization.quantize_experts(model)
        return model


_FILE_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_HUB_KEYWORDS = (*_FILE_KEYWORDS, "trust_remote_code", "code_revision")

# With these a checkpoint's weights are Transformers' to read.
_READ_OTHERWISE = {"quantization_config", "gguf_file", "state_dict", "use_safetensors", "variant", "adapter_kwargs"}


def _config(name: Any, kwargs: dict[str, Any], needed: bool) -> Any:
    """The checkpoint's config; where it is not `needed`, None for one that has none."""
    try:
        return transformers.AutoConfig.from_pretrained(
            name, **{key: kwargs[key] for key in _HUB_KEYWORDS if key in kwargs}
        )
    except (OSError, ValueError):
        if needed:
            raise
        return None


def _dequantised(
    name: str, config: Any, hub: dict[str, Any], kwargs: dict[str, Any], stack: ExitStack
) -> dict[str, Any]:
    """The arguments that load a quantised checkpoint as a plain one."""
    config = copy.deepcopy(config)
    block = dequantize.block_of(config)
    del config.quantization_config
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # "auto" is none of torch's
    dtype = dtype or config.dtype or torch.bfloat16
    rest = {key: value for key, value in kwargs.items() if key not in (*_HUB_KEYWORDS, "torch_dtype")}
    tensors = dequantize.open_plain(name, hub, block, dtype, stack)
    return {**rest, "config": config, "dtype": dtype, "state_dict": tensors}


def _backend(backend: BackendConfig | Mapping[str, Any] | None, kwargs: dict[str, Any]) -> BackendConfig:
    """`backend`, giving way to an `experts_implementation` or `attn_implementation` that the caller asked for."""
    backend = BackendConfig.of(backend)
    if kwargs.get("experts_implementation") not in (None, "slipstream") and backend.experts == "auto":
        backend = replace(backend, experts="transformers")
    # `auto` leaves alone what is not a model's default, so only the defaults have to be named here.
    if kwargs.get("attn_implementation") in ("sdpa", "eager", "slipstream") and backend.attn == "auto":
        backend = replace(backend, attn=kwargs["attn_implementation"])
    return backend


def _distributed_config(backend: BackendConfig, setup: DistributedSetup) -> Any:
    """The job's process group, made if need be, and the setup in Transformers' terms."""
    join_process_group(setup)
    chosen = choose_dispatcher(backend, setup).chosen
    return hf.distributed_config(setup, dispatch.exchange_name(backend.dispatcher, chosen))
