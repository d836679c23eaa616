"""The attention implementation `slipstream` in Transformers' registry.

Plain causal rows go to PyTorch's SDPA, which picks cuDNN on Hopper. Packed documents, padding, sliding windows and
sinks go to `causal_attention`. What else a model or a cache asks for is computed as Transformers' own `sdpa` and
`eager` do. Which case it is stands in the mask that a model makes once per forward pass: None, `Segments`, or a 4D
tensor.

Dims: B rows, S tokens in a row, H heads, G key-value heads, D head width.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from slipstream import hf
from slipstream.attention.causal import HAS_FLASH, causal_attention, documents, has_kernel
from slipstream.attention.rows import Rows, Segments, rows_of
from slipstream.numerics import compute_dtype

NAME = "slipstream"

_rows: ContextVar[Rows | None] = ContextVar("slipstream_rows", default=None)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Segments | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers calls it.

    Args:
        query, key, value: `[B, H, S, D]`, `[B, G, S, D]`, `[B, G, S, width of a value]`.
        attention_mask: what `attention_mask_for` returned, or a 4D mask.
        s_aux: sinks `[H]`.
        softcap: the scores are `softcap * tanh(scores / softcap)`.

    Returns:
        `[B, S, H, width of a value]`, and None for the weights, which no fused kernel has.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    plain = dropout == 0 and softcap is None and kwargs.get("position_bias") is None
    if isinstance(attention_mask, Segments):
        if plain and (s_aux is not None or not query.is_cuda or has_kernel(_widened(query, query, value)[0])):
            return _causal(query, key, value, s_aux, attention_mask, scaling), None
        attention_mask = attention_mask.as_mask(query.shape[0], query.shape[2])
    elif s_aux is not None and plain and causal and attention_mask is None and query.shape[2] == key.shape[2]:
        return _causal(query, key, value, s_aux, None, scaling), None
    if s_aux is None and softcap is None:
        return hf.sdpa_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    return _whole_scores(query, key, value, attention_mask, s_aux, softcap, dropout, scaling, causal), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, segments: Segments | None, scaling: float
) -> Tensor:
    dtype = compute_dtype(value)
    heads = _widened(*(x.transpose(1, 2).to(dtype) for x in (query, key, value)))
    cu_seqlens, max_length, window = (None, None, None) if segments is None else segments
    out_BSHD = causal_attention(*heads, scaling, sinks, cu_seqlens, max_length, window)
    return out_BSHD[..., : value.shape[-1]]


def _widened(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of one width, a multiple of 8, as FlashAttention-2 wants; zeros change no score and no value."""
    width = -(-max(query.shape[-1], value.shape[-1]) // 8) * 8
    query, key, value = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    return query, key, value


def _whole_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    dropout: float,
    scaling: float,
    causal: bool,
) -> Tensor:
    """Attention with all scores in memory, as Transformers' `eager`: for sinks where there is a cache or dropout."""
    length = query.shape[2]
    if mask is None and causal and length > 1:
        # SDPA's None: with more keys than queries, a static cache has room that is not filled yet.
        key, value = key[:, :, :length], value[:, :, :length]
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, 1).transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = F.dropout(scores.softmax(-1)[..., : key.shape[2]], dropout)
    return (weights.to(value.dtype) @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous()


def attention_mask_for(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | Segments | None:
    """The mask of one kind of layer, made once per forward pass: None for plain causal rows, `Segments` for documents
    or a window, and Transformers' 4D mask for anything else."""
    rows = known_rows(batch_size, q_length)
    # Transformers forbids the skip where a mask is more than causal; chunks look like windows, but are none.
    ordinary = allow_is_causal_skip and (kv_length, kv_offset) == (q_length, 0) and type(q_offset) is int
    if rows is not None and ordinary and q_offset == 0 and getattr(config, "attention_chunk_size", None) is None:
        window = local_size if local_size is not None and local_size < kv_length else None
        if rows.segments is not None:
            return rows.segments._replace(window=window)
        return None if window is None else Segments.whole_rows(batch_size, q_length, window, torch.device(device))
    if (
        rows is not None
        and rows.segments is not None
        and not rows.padded
        and "allow_is_bidirectional_skip" not in kwargs
    ):
        mask_function = hf.within_documents(mask_function, documents(batch_size, q_length, rows.segments.cu_seqlens))
    return hf.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
        allow_is_causal_skip, device=device, config=config, **kwargs,
    )  # fmt: skip


def known_rows(batch: int, length: int) -> Rows | None:
    """What is known of the batch being run, if it has this shape."""
    if torch.compiler.is_compiling():
        return None
    rows = _rows.get()
    return rows if rows is not None and (rows.batch, rows.length) == (batch, length) else None


def obstacle(model: PreTrainedModel) -> str | None:
    """Why `model` can't use this implementation, or None if it can."""
    if not hf.supports_flash_attention(model):
        return f"the attention of {type(model).__name__} is more than causal masks and windows"
    if not hf.supports_sdpa(model) and not has_sinks(model):
        return f"{type(model).__name__} changes its scores in a way that no fused kernel knows"
    return None


def has_sinks(model: nn.Module) -> bool:
    """Whether a layer of `model` has attention sinks."""
    return any(isinstance(getattr(module, "sinks", None), nn.Parameter) for module in model.modules())


def has_device() -> bool:
    """Whether this process has a GPU that the kernels run on."""
    return HAS_FLASH and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def why(model: PreTrainedModel) -> str:
    """What `model` runs, for `describe`."""
    if has_sinks(model):
        return "FlashAttention-2 and cuDNN kernels, with the sinks worked into their softmax"
    return (
        "PyTorch picks the kernel for plain rows, cuDNN first on Hopper; "
        "FlashAttention-2 for documents of unequal length and windows"
    )


def install(model: PreTrainedModel) -> None:
    """Let `model` use this implementation; `obstacle(model)` must be None."""
    hf.let_packing_be_known(known_rows)
    decoder: Any = model.base_model
    if not {"input_ids", "inputs_embeds"} & set(_parameters(type(decoder).forward)):  # Bart's wrapper, which is not run
        decoder = decoder.get_decoder()
    if _enter not in decoder._forward_pre_hooks.values():  # pickle keeps hooks
        decoder.register_forward_pre_hook(_enter, with_kwargs=True)
        decoder.register_forward_hook(_leave, always_call=True)
    model.set_attn_implementation(NAME)


@contextmanager
def rows_known(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let layers of `model` that run outside its decoder know the rows that the decoder was called with."""
    before = _rows.set(_rows_seen(model, inputs))
    try:
        yield
    finally:
        _rows.reset(before)


def _enter(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        names = _parameters(type(decoder).forward)
        _rows.set(_rows_seen(decoder, {**dict(zip(names, args, strict=False)), **kwargs}))


def _rows_seen(model: nn.Module, inputs: Mapping[str, Any]) -> Rows | None:
    """`rows_of`, as long as `model` has not been given another implementation: that one's masks ask nobody else."""
    return rows_of(inputs) if hf.attention_implementation(model) == NAME else None


def _leave(decoder: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _rows.set(None)


@functools.cache
def _parameters(forward: Any) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


hf.register_attention(NAME, attention_forward, attention_mask_for)
