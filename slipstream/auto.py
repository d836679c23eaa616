"""The one-import API: resolve and load through Transformers, then accelerate."""

import copy
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import transformers
from safetensors import SafetensorError

from slipstream import hf
from slipstream.acceleration import accelerate, choose_dispatcher
from slipstream.backend import BackendConfig
from slipstream.checkpoint import passthrough
from slipstream.checkpoint.export import install_save
from slipstream.moe import dispatch
from slipstream.parallel.initialize import build_sharded
from slipstream.parallel.setup import DistributedSetup, join_process_group
from slipstream.parallel.shard import plan_experts, shard


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """Transformers' class of this name; what it returns trains faster.

    `from_pretrained` and `from_config` take everything that Transformers' do, and two keywords more:

    - `backend`: a `BackendConfig` (or its fields as a dict), which implementation each operation uses.
    - `distributed_setup`: a `DistributedSetup` (or its fields as a dict), how the model is spread over the ranks.

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
        **kwargs: Any,
    ) -> Any:
        """Load a model as Transformers does, then `accelerate` it.

        Raises:
            ValueError: a setting that does not exist or does not fit the model (before anything is loaded).
            OSError: the checkpoint is missing or damaged.
        """
        backend = _backend(backend, kwargs)
        setup = DistributedSetup.of(distributed_setup)
        # A distributed_config of the caller's own is Transformers' to carry out.
        sharding: Any = nullcontext()
        if distributed_setup is not None:
            config = kwargs.get("config")
            if config is None:
                config = transformers.AutoConfig.from_pretrained(
                    pretrained_model_name_or_path, **{key: kwargs[key] for key in _HUB_KEYWORDS if key in kwargs}
                )
            setup.check(hf.num_routed_experts(config))
            if setup.ranks > 1:
                kwargs["distributed_config"] = _distributed_config(backend, setup)
                sharding = hf.sharding_by(partial(shard, setup=setup), partial(plan_experts, ep_size=setup.ep_size))
        try:
            with sharding:
                loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"{pretrained_model_name_or_path}: a safetensors file there is damaged or cut short ({error}); "
                "copy or download the checkpoint again"
            ) from error
        # output_loading_info=True returns (model, info).
        model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        model = accelerate(model, backend=backend, distributed_setup=distributed_setup)
        hub = {key: kwargs[key] for key in _FILE_KEYWORDS if key in kwargs}
        known = isinstance(pretrained_model_name_or_path, str | os.PathLike)
        if known and (kept := passthrough.find(str(pretrained_model_name_or_path), model.config, **hub)):
            setattr(model, passthrough.KEPT, kept)
            install_save(model)
        return (model, *info) if info else model

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        backend: BackendConfig | Mapping[str, Any] | None = None,
        distributed_setup: DistributedSetup | Mapping[str, Any] | None = None,
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
        # A copy, because the config carries the choice of experts and attention to whatever model shares it.
        build = partial(super().from_config, copy.deepcopy(config), **kwargs)
        if distributed_setup is None or setup.ranks == 1:
            return accelerate(build(), backend=backend, distributed_setup=distributed_setup)
        distributed_config = _distributed_config(backend, setup)
        with hf.sharding_by(partial(shard, setup=setup), partial(plan_experts, ep_size=setup.ep_size)):
            model = build_sharded(build, partial(hf.distribute, config=distributed_config))
        return accelerate(model, backend=backend, distributed_setup=distributed_setup)


_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
                 "trust_remote_code", "code_revision")  # fmt: skip

_FILE_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


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
