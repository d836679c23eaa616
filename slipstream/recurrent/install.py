"""How a model comes to the recurrent layers of this package: its decoder tells the layers where documents begin, and
the functions of its modelling file that compute in plain PyTorch make way for ours when they are told of some.

A scan that is a loop in Python stays outside of compiled layers, ours or not: with a dynamic length its graph takes
minutes or does not compile, and one loop over tokens is another graph for each length.

Where mamba_ssm, causal_conv1d or fla are installed, their kernels run as in Transformers. fla's take documents as
`cu_seqlens` and one row only, which Transformers hands to some of them, and only where the caller gave it.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from slipstream import hf_recurrent
from slipstream.attention.causal import documents
from slipstream.attention.interface import known_rows
from slipstream.attention.rows import rows_of
from slipstream.kernels import HAS_TRITON
from slipstream.parallel.units import class_of
from slipstream.recurrent.convolution import causal_conv, documents_of
from slipstream.recurrent.gated_delta import gated_delta_rule
from slipstream.recurrent.lightning import lightning_attention
from slipstream.recurrent.linear_recurrence import linear_recurrence, wkv
from slipstream.recurrent.mamba2 import mamba2_scan
from slipstream.recurrent.selective_scan import channels_first

DOCUMENTS = "seq_idx"  # Transformers' name for int32 ids [B, S], which mamba_ssm's and causal_conv1d's kernels take
# Arguments that a layer hands on to the functions below: that it is one of ours, and where documents begin (on a
# decoder: whether its layers ask for that).
OURS, BOUNDS = "slipstream_recurrent", "slipstream_bounds"
_APART = "states begin anew with each document of a packed row"
_changed: set[str] = set()  # modelling files of models that `install` was called for
_ALONG = "states run along the whole row, which is never packed"


def install(model: Any) -> tuple[str, str] | None:
    """Let the Mamba layers, Gated DeltaNet and short convolutions of `model` use ours, in place; says what runs (a
    package's "kernels", our own in "triton", plain "torch", or "compiled" where there is no scan), and what becomes of
    documents; None where Transformers' loops run."""
    looping = hf_recurrent.looping_modules(model)
    lightning, rg_lru, rwkv = (
        hf_recurrent.modules_named(model, name)
        for name in (hf_recurrent.LIGHTNING, hf_recurrent.RG_LRU, hf_recurrent.RWKV)
    )
    for modules, own in ((looping, forward), (lightning, _attend), (rg_lru, _rnn_scan), (rwkv, _average)):
        for module in modules:
            setattr(module, own.__name__, MethodType(own, module))  # by its name: survives deepcopy and pickle
    functions = hf_recurrent.recurrent_functions(model)
    fast = [name for name, function in functions.items() if hf_recurrent.runs_package(function)]
    hf_recurrent.replace_recurrent(model, {name: _REPLACEMENTS[name] for name in functions if name not in fast})
    of_fla = [name for name in fast if _REPLACEMENTS[name] is _gated_delta]
    hf_recurrent.replace_recurrent(model, dict.fromkeys(of_fla, _package_delta))
    has_kernels = HAS_TRITON and torch.cuda.is_available()
    if rg_lru or rwkv:
        return ("triton", _ALONG) if has_kernels else None
    if not (functions or lightning) or looping:
        return None
    if hf_recurrent.SELECTIVE_SCAN in functions:
        for module in model.modules():
            hf_recurrent.ask_for_scan(module, OURS)
        if hf_recurrent.SELECTIVE_SCAN in fast:
            return "kernels", _ALONG
        return ("triton", _ALONG) if has_kernels else None
    for module in model.modules():
        hf_recurrent.set_time_step_limit(module)
    decoder = model.get_decoder()
    _changed.add(class_of(decoder).__module__)
    setattr(decoder, BOUNDS, bool(of_fla))
    if _tell not in decoder._forward_pre_hooks.values():  # pickle keeps hooks
        decoder.register_forward_pre_hook(_tell, with_kwargs=True)
    scans = [name for name in functions if name in hf_recurrent.SCANS]
    if functions and set(scans or functions) <= set(fast):
        return "kernels", _APART
    if functions and not scans:
        return "compiled", _APART
    ours = bool(lightning) or (hf_recurrent.MAMBA_SCAN in functions and hf_recurrent.MAMBA_SCAN not in fast)
    return "triton" if ours and has_kernels else "torch", _APART


def without_loops(model: Any) -> None:
    """Let the layers of `model`, of fake tensors, that Transformers loops over tokens for run as on a GPU, in place."""
    for kind, name, own in (
        (hf_recurrent.RG_LRU, "_rnn_scan", _scan_at_once),
        (hf_recurrent.RWKV, "forward", _average_at_once),
    ):
        for module in hf_recurrent.modules_named(model, kind):
            setattr(module, name, MethodType(own, module))


@torch.compiler.disable
def _outside(original: Any, *args: Any, **kwargs: Any) -> Any:
    """A compiled layer stops here and goes on behind it."""
    return original(*args, **kwargs)


@torch.compiler.disable
def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, outside of a compiled layer."""
    return type(self).forward(self, *args, **kwargs)


def _attend(
    self: nn.Module, hidden_states: Any, position_embeddings: Any, attention_mask: Any, past_key_values: Any = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    document = kwargs.get(DOCUMENTS)
    theirs = document is None and hidden_states.device.type == "cpu"  # its few blocks are as fast there
    if theirs or past_key_values is not None or not kwargs.get(OURS):
        return forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    return lightning_attention(self, hidden_states, attention_mask, document)


_attend.__name__ = "forward"


def _average(self: Any, hidden: Any, state: Any = None, use_cache: bool = False) -> Any:
    if state is not None or use_cache or not _runs_kernels(hidden):
        return forward(self, hidden, state, use_cache)
    return _average_at_once(self, hidden)


_average.__name__ = "forward"


def _average_at_once(self: Any, hidden: Any, state: Any = None, use_cache: bool = False) -> Any:
    receptance, key, value, _ = self.extract_key_value(hidden)
    return self.output(receptance * wkv(self.time_decay, self.time_first, key, value)), None


def _rnn_scan(
    self: Any, hidden_states: Any, recurrent_gate: Any, reset: Any, recurrent_states: Any, **kwargs: Any
) -> Any:
    if recurrent_states is not None or not _runs_kernels(hidden_states):
        theirs = type(self)._rnn_scan
        return _outside(theirs, self, hidden_states, recurrent_gate, reset, recurrent_states, **kwargs)
    return _scan_at_once(self, hidden_states, recurrent_gate, reset)


def _scan_at_once(
    self: nn.Module, hidden_states: Any, recurrent_gate: Any, reset: Any, recurrent_states: Any = None
) -> Any:
    return linear_recurrence(recurrent_gate * ~reset, hidden_states), None  # there is no cache that wants a state


def _tell(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    # Another process that loads a pickled model has the functions of Transformers until the model is accelerated.
    if kwargs.get("past_key_values") is not None or class_of(decoder).__module__ not in _changed:
        return None
    found: dict[str, Any] = {OURS: True}
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if getattr(decoder, BOUNDS) and tokens is not None and kwargs.get("attention_mask") is None:
        # Our attention, where it runs, has read them from the device by now.
        rows = known_rows(*tokens.shape[:2]) or rows_of({**kwargs, "input_ids": tokens})
        if rows is not None and rows.segments is not None:
            found[BOUNDS] = rows.segments.cu_seqlens
    if kwargs.get(DOCUMENTS) is None and kwargs.get("attention_mask") is None:
        positions, cu_seqlens = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
        if cu_seqlens is not None and tokens is not None:
            found[DOCUMENTS] = documents(tokens.shape[0], tokens.shape[1], cu_seqlens.to(tokens.device)).int()
        elif positions is not None and tokens is not None and positions.ndim == 2:
            found[DOCUMENTS] = documents_of(positions.expand(tokens.shape[0], -1))
    told = {**kwargs, **found}
    if told.get(DOCUMENTS) is not None and _caches(decoder, kwargs):
        # What fills a cache is Transformers', which keeps no documents apart and refuses to hear of any. A training
        # step fills none, so that only others wait here for the device.
        if bool((told[DOCUMENTS] != told[DOCUMENTS][:, :1]).any()):
            told["use_cache"] = kwargs.get("use_cache") or False
        else:
            del told[DOCUMENTS]
    return args, told


def _caches(decoder: Any, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", False) if asked is None else asked)


def _convolution(
    original: Any, x_BHS: Any, weight: Any, bias: Any = None, activation: Any = None, **kwargs: Any
) -> Any:
    document = kwargs.get(DOCUMENTS)
    cached = document is not None and document.shape[-1] != x_BHS.shape[-1]
    if cached or (document is None and not torch.compiler.is_compiling()):
        return original(x_BHS, weight, bias, activation=activation, **kwargs)
    return causal_conv(x_BHS, weight, bias, activation, document)


def _mamba2(original: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, **kwargs: Any) -> Any:
    document = kwargs.get(DOCUMENTS)
    cached = kwargs.get("initial_states") is not None or kwargs.get("return_final_states")
    # Transformers' takes the compiler a minute and keeps every chunk's decays; on a CPU it is as fast as ours.
    theirs = document is None and x.device.type == "cpu"
    if theirs or cached or not kwargs.get(OURS):
        return _outside(original, x, dt, A, B, C, chunk_size=chunk_size, **kwargs)
    return mamba2_scan(
        x, dt, A, B, C, chunk_size, kwargs.get("D"), kwargs.get("dt_bias"), kwargs.get("dt_softplus", False),
        tuple(kwargs.get("dt_limit", (0.0, float("inf")))), document,
    )  # fmt: skip


def _mamba2_with_convolution(original: Any, *args: Any, **kwargs: Any) -> None:
    """There is no kernel for both: Transformers then calls the two above."""


def _gated_delta(original: Any, query: Any, key: Any, value: Any, g: Any, beta: Any, **kwargs: Any) -> Any:
    document = kwargs.get(DOCUMENTS)
    cached = kwargs.get("output_final_state") or kwargs.get("initial_state") is not None
    # Transformers' has thousands of small operations a layer, which a GPU waits for, and keeps what they compute.
    theirs = document is None and value.device.type == "cpu"
    if theirs or cached or not kwargs.get(OURS):
        return _outside(original, query, key, value, g=g, beta=beta, **kwargs)
    normalize = kwargs.get("use_qk_l2norm_in_kernel", False)
    return gated_delta_rule(query, key, value, g, beta, document, normalize), None


@torch.compiler.disable
def _package_delta(original: Any, query: Any, key: Any, value: Any, g: Any, beta: Any, **kwargs: Any) -> Any:
    bounds = kwargs.get(BOUNDS)
    if bounds is None or kwargs.get("output_final_state") or kwargs.get("initial_state") is not None:
        return original(query, key, value, g=g, beta=beta, **kwargs)
    row = [tensor.flatten(0, 1)[None] for tensor in (query, key, value, g, beta)]
    out, state = original(*row[:3], g=row[3], beta=row[4], **{**kwargs, "cu_seqlens": bounds})
    return out.unflatten(1, query.shape[:2])[0], state


def _selective_scan(original: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, **kwargs: Any) -> Any:
    cached = kwargs.get("return_last_state")
    if cached or not _runs_kernels(x) or kwargs.get("use_associative_scan") != OURS:
        return _outside(original, x, dt, A, B, C, **kwargs)
    return channels_first(x, dt, A, B, C, **kwargs)


def _runs_kernels(x: torch.Tensor) -> bool:
    return HAS_TRITON and x.is_cuda


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "mamba2_chunk_scan": _mamba2,
    "mamba2_split_conv1d_scan_combined": _mamba2_with_convolution,
    "torch_chunk_gated_delta_rule": _gated_delta,
    "chunk_kimi_delta_attention": _gated_delta,
    "mamba_selective_scan": _selective_scan,
}
