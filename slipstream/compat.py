"""The names and value spellings of NeMo AutoModel's Python API, mapped onto ours.

A script written for that library runs with its import lines changed:

    from slipstream.compat import NeMoAutoModelForCausalLM, BackendConfig, create_distributed_setup_from_config

What a value means here, where that differs, is said in a note (a `UserWarning`) the first time.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from slipstream.auto import AutoModelForCausalLM
from slipstream.backend import BackendConfig as OurBackendConfig
from slipstream.parallel.setup import DistributedSetup
from slipstream.parallel.setup import create_distributed_setup_from_config as ours_from_config

# That library's value -> (our field's value, what to say). An empty note: the same thing.
_ATTN = {
    "te": ("auto", "TransformerEngine's attention runs the same cuDNN kernels that PyTorch's SDPA picks here"),
    "cudnn": ("sdpa", "PyTorch's SDPA picks cuDNN on Hopper"),
    "flex": ("flex_attention", ""),
    "sdpa": ("sdpa", ""),
    "eager": ("eager", ""),
}
_LINEAR = {"torch": ("torch", ""), "te": ("auto", "linear layers are PyTorch's")}
_NORM = {
    "torch": ("auto", ""),
    "torch_fp32": ("auto", "Transformers' norms compute in fp32 already"),
    "te": ("auto", "norms are Transformers' own"),
}
_EXPERTS = {
    name: ("slipstream", note)
    for name, note in {
        "torch": "",
        "torch_mm": "",
        "gmm": "experts run through torch's grouped GEMM",
        "te": "experts run through torch's grouped GEMM",
    }.items()
}
_DISPATCHER = {
    "torch": ("auto", ""),
    "deepep": ("auto", "tokens travel through Slipstream's own exchange, which needs no DeepEP"),
    "hybridep": ("auto", "tokens travel through Slipstream's own exchange, which needs no DeepEP"),
    "uccl_ep": ("auto", "tokens travel through Slipstream's own exchange, which needs no UCCL"),
}
_SPELLINGS = {
    "attn": _ATTN, "linear": _LINEAR, "rms_norm": _NORM, "experts": _EXPERTS, "dispatcher": _DISPATCHER,
}  # fmt: skip
# Settings of that library that change nothing here, and why.
_WITHOUT_EFFECT = {
    "rope": "rotary embedding is Transformers' own",
    "rope_fusion": "rotary embedding is Transformers' own",
    "enable_hf_state_dict_adapter": "the model is Transformers' own, so there is nothing to adapt",
    "enable_fsdp_optimizations": "FSDP2 is always set up this way",
    "dispatcher_num_sms": "the exchange has no setting for it",
    "dispatcher_share_token_dispatcher": "the exchange has no setting for it",
    "dispatcher_async_dispatch": "the exchange has no setting for it",
    "gate_precision": "the router computes as in Transformers",
}


@dataclasses.dataclass(frozen=True, init=False)
class BackendConfig(OurBackendConfig):
    """`slipstream.BackendConfig` under NeMo AutoModel's field names and values.

    Raises:
        ValueError: a field or value that neither library has, with those that work.
    """

    def __init__(self, fake_balanced_gate: bool = False, **fields: Any) -> None:
        translated: dict[str, Any] = {"gate": "balanced"} if fake_balanced_gate else {}
        for name, value in fields.items():
            if name in _WITHOUT_EFFECT:
                _note(f"{name}={value!r} has no effect: {_WITHOUT_EFFECT[name]}")
            elif name in _SPELLINGS and value in _SPELLINGS[name]:
                translated[name], note = _SPELLINGS[name][value]
                if note:
                    _note(f"{name}={value!r}: {note}")
            else:
                translated[name] = value
        unknown = [name for name in translated if name not in {field.name for field in dataclasses.fields(self)}]
        if unknown:
            raise ValueError(
                f"BackendConfig has no field {', '.join(map(repr, unknown))}; it has "
                f"{', '.join([*(field.name for field in dataclasses.fields(self)), *_WITHOUT_EFFECT])}"
            )
        super().__init__(**translated)


def create_distributed_setup_from_config(
    cfg: Mapping[str, Any] | None = None, world_size: int | None = None, **fields: Any
) -> DistributedSetup:
    """A `DistributedSetup` from that library's keys, given as a dict or as keywords.

    `dp_size` and `dp_shard_size` follow from the number of ranks, `dp_replicate_size` is `dp_replicate`; a nested
    `moe: {reshard_after_forward: …}` is read.

    Raises:
        ValueError: a size that does not fit the job, parallelism that Slipstream does not have (`pp_size`, `cp_size`),
            or an unknown key.
    """
    values = {**(cfg or {}), **fields}
    for name in ("pp_size", "cp_size"):
        if (size := values.pop(name, None)) not in (None, 1):
            raise ValueError(f"{name}={size}: Slipstream has no such parallelism; use 1")
    replicate = values.pop("dp_replicate_size", None)
    if replicate is not None:
        values["dp_replicate"] = replicate
    minutes = values.pop("timeout_minutes", None)
    if minutes is not None:
        values["timeout_minutes"] = minutes
    moe = dict(values.pop("moe", None) or {})
    if "reshard_after_forward" in moe:
        values.setdefault("reshard_after_forward", bool(moe.pop("reshard_after_forward")))
    for name in moe:
        _note(f"moe.{name} has no effect: the model's own plan decides")
    checkpointing = values.get("activation_checkpointing")
    if isinstance(checkpointing, bool):
        values["activation_checkpointing"] = "full" if checkpointing else "none"
    dp_size, dp_shard = values.pop("dp_size", None), values.pop("dp_shard_size", None)
    for name in ("ranks", "pipeline", "sequence_parallel", "defer_fsdp_grad_sync"):
        if values.pop(name, None) not in (None, False):
            _note(f"{name} has no effect here")
    setup = ours_from_config({name: value for name, value in values.items() if value is not None})
    ranks = setup.ranks if world_size is None else world_size
    if dp_size not in (None, ranks // setup.tp_size):
        raise ValueError(f"dp_size={dp_size}: {ranks} ranks with tp_size={setup.tp_size} give {ranks // setup.tp_size}")
    if dp_shard not in (None, setup.fsdp_size):
        raise ValueError(f"dp_shard_size={dp_shard}: this job's ranks give {setup.fsdp_size}; leave it out")
    return setup


class NeMoAutoModelForCausalLM(AutoModelForCausalLM):
    """`slipstream.AutoModelForCausalLM`, taking that library's keywords as well."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See `slipstream.AutoModelForCausalLM.from_pretrained`."""
        return super().from_pretrained(*args, **_translate(kwargs))

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """See `slipstream.AutoModelForCausalLM.from_config`."""
        return super().from_config(config, **_translate(kwargs))


def _translate(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = dict(kwargs)
    for name in ("use_liger_kernel", "use_sdpa_patching", "sdpa_method", "has_packed_sequence"):
        if kwargs.pop(name, None) is not None:
            _note(f"{name} has no effect: BackendConfig chooses each operation's implementation")
    for name in ("peft_config", "fp8_config", "qat_config", "compile_config", "device_mesh"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"{name}: not taken here; use peft.get_peft_model for adapters, and leave the others out")
    if isinstance(kwargs.get("backend"), Mapping):
        kwargs["backend"] = BackendConfig(**kwargs["backend"])
    if isinstance(kwargs.get("distributed_setup"), Mapping):
        kwargs["distributed_setup"] = create_distributed_setup_from_config(kwargs["distributed_setup"])
    return kwargs


def _note(text: str) -> None:
    warnings.warn(f"slipstream.compat: {text}", stacklevel=4)
