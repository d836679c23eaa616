"""Causal attention over documents packed into rows, with windows and sinks, as one op that autograd follows.

A sink is one learned logit `s` per head that every query also attends to, with a value of zero (GPT-OSS; Xiao et al.
2023, arXiv 2309.17453). No fused kernel of PyTorch knows it, and none has to. With a kernel's output `o` and
`l = log sum_j exp(x_j)` of the scores `x`, the sink makes these

    l' = log(exp(l) + exp(s))        o' = o * exp(l - l') = o * sigmoid(l - s)

A flash backward (Dao 2023, arXiv 2307.08691) computes from what it is given
`P = exp(x - l)`, `D = rowsum(do * o)`, `dv = P^T do` and `dx = P * (do v^T - D)`. With a sink the same formulas hold
for `l'` and `o'`, so the unchanged kernel, given those two, returns the exact dq, dk and dv. The sink itself is a score
whose value is zero: `ds = - sum over rows of exp(s - l') * D'`.

Dims: B rows, S tokens in a row, T = B * S, H heads, G key-value heads (H is a multiple), D head width, N documents.
"""

import torch
from torch import Tensor

HAS_FLASH = torch.backends.cuda.is_flash_attention_available()
WIDEST_HEAD = 256  # what PyTorch's FlashAttention-2 takes; a multiple of 8 on top


def has_kernel(query: Tensor) -> bool:
    """Whether a fused kernel takes tensors like `query`; elsewhere the op computes with whole score matrices."""
    return (
        HAS_FLASH
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= WIDEST_HEAD
        and query.shape[-1] % 8 == 0
    )


def causal_attention(
    query_BSHD: Tensor,
    key_BSGD: Tensor,
    value_BSGD: Tensor,
    scale: float,
    sinks_H: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of every token to itself and the tokens before it in its document, `[B, S, H, D]`.

    Args:
        scale: of the scores.
        sinks_H: one logit per head that takes its share of the softmax and adds nothing.
        cu_seqlens: int32 `[N + 1]`, where documents begin in the flattened rows, and T; no document spans two rows.
            None: every row is one document.
        max_length: a scalar on the CPU, the longest document or more; comes with `cu_seqlens`.
        window: how many tokens a token sees, itself included; comes with `cu_seqlens`.
    """
    if window is not None and cu_seqlens is None:
        raise ValueError(f"window={window} needs cu_seqlens; for whole rows they are range(0, T + 1, S)")
    out_BSHD: Tensor = _forward(
        query_BSHD, key_BSGD, value_BSGD, sinks_H, cu_seqlens, max_length, float(scale), window
    )[0]
    return out_BSHD


@torch.library.custom_op("slipstream::causal_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    max_length: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The output `[B, S, H, D]` and the log of the softmax's sum, fp32 `[H, T]`, both with the sinks."""
    B, S, H, D = query.shape
    alike = documents_alike(B, S, cu_seqlens, max_length, window)
    if alike is not None and _cudnn_takes(*(rows := [x.reshape(*alike, *x.shape[2:]) for x in (query, key, value)])):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(x.transpose(1, 2) for x in rows), None, True, 0.0, True, False, scale=scale
        )
        out = out.transpose(1, 2).reshape(B, S, H, out.shape[-1])
        lse = lse.view(alike[0], H, alike[1]).transpose(0, 1).reshape(H, B * S)
    elif has_kernel(query):
        flat = (x.flatten(0, 1) for x in (query, key, value))
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *flat, *_lengths(query, cu_seqlens, max_length), 0.0, True, False, scale=scale, **_window(window)
        )
        out, lse = out.view(B, S, H, D), lse.view(H, B * S)
    else:
        out, lse = attention_reference(query, key, value, cu_seqlens, scale, window)
    out = out.contiguous()
    if sinks is not None:
        sinks = sinks.to(lse.dtype)[:, None]
        out = out.mul_(torch.sigmoid(lse - sinks).t().view(B, S, H, 1))
        lse = torch.logaddexp(lse, sinks)
    return out, lse.contiguous()


@_forward.register_fake
def _(query, key, value, sinks, cu_seqlens, max_length, scale, window):  # type: ignore[no-untyped-def]
    B, S, H, _ = query.shape
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((H, B * S), dtype=lse_dtype)


@torch.library.custom_op("slipstream::causal_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    max_length: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and sinks (empty without sinks)."""
    B, S, H, _ = query.shape
    alike = documents_alike(B, S, cu_seqlens, max_length, window)
    if alike is not None and _cudnn_takes(*(rows := [x.reshape(*alike, *x.shape[2:]) for x in (query, key, value)])):
        seed = torch.zeros((), dtype=torch.int64, device=query.device)  # of a dropout that is not there
        count, length = alike
        grad_rows, out_rows = (x.reshape(count, length, *x.shape[2:]) for x in (grad, out))
        rows = [x.transpose(1, 2) for x in (grad_rows, *rows, out_rows)]
        lse_NHL1 = lse.view(H, count, length).transpose(0, 1).contiguous().unsqueeze(-1)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *rows, lse_NHL1, seed, seed, None, None, None, length, length, 0.0, True, scale=scale
        )
        grads = [x.transpose(1, 2).reshape(y.shape) for x, y in zip(grads, (query, key, value), strict=True)]
    elif has_kernel(query):
        flat = (x.flatten(0, 1) for x in (grad, query, key, value, out))
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty(0, device=query.device)
        grads = torch.ops.aten._flash_attention_backward(
            *flat, lse, *_lengths(query, cu_seqlens, max_length), 0.0, True, seed, unused, scale=scale,
            **_window(window),
        )  # fmt: skip
        grads = [x.view(y.shape) for x, y in zip(grads, (query, key, value), strict=True)]
    else:
        grads = backward_reference(grad, query, key, value, out, lse, cu_seqlens, scale, window)
    if sinks is None:
        grad_sinks = query.new_empty(0)
    else:
        delta_HT = (grad.to(lse.dtype) * out).sum(-1).view(B * S, H).t()
        grad_sinks = -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * delta_HT).sum(1).to(sinks.dtype)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous(), grad_sinks


@_backward.register_fake
def _(grad, query, key, value, out, lse, sinks, cu_seqlens, max_length, scale, window):  # type: ignore[no-untyped-def]
    grads = [x.new_empty(x.shape) for x in (query, key, value)]
    return *grads, query.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, sinks, cu_seqlens, max_length, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, sinks, cu_seqlens, max_length)


def _autograd(ctx, grad, _grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, out, lse, sinks, cu_seqlens, max_length = ctx.saved_tensors
    *grads, grad_sinks = _backward(
        grad, query, key, value, out, lse, sinks, cu_seqlens, max_length, ctx.scale, ctx.window
    )
    return *grads, None if sinks is None else grad_sinks, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def documents_alike(
    batch: int, length: int, cu_seqlens: Tensor | None, max_length: Tensor | None, window: int | None
) -> tuple[int, int] | None:
    """(N, their length) where all documents are seen whole and known to be equally long, as rows of their own.

    The host knows how many documents there are and the longest; if that many of that length are all tokens, none is
    shorter. Example: 4 documents of at most 1024 tokens in 2 rows of 2048 -> (4, 1024).
    """
    if window is not None:
        return None
    if cu_seqlens is None:
        return batch, length
    count = cu_seqlens.numel() - 1
    longest = 0 if max_length is None else int(max_length)  # on the CPU: nothing waits
    return (count, longest) if count * longest == batch * length else None


def _cudnn_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether cuDNN computes whole rows `[B, S, heads, D]` here, twice as fast as FlashAttention-2 on Hopper."""
    if not has_kernel(query) or torch.cuda.get_device_capability(query.device)[0] < 9:
        return False
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, key.shape[1] != query.shape[1])
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.can_use_cudnn_attention(params)


def _lengths(query: Tensor, cu_seqlens: Tensor | None, max_length: Tensor | None) -> tuple[Tensor, Tensor, int, int]:
    """FlashAttention's (cum_seq_q, cum_seq_k, max_q, max_k)."""
    B, S = query.shape[:2]
    if cu_seqlens is None:
        cu_seqlens, longest = whole_rows(B, S, query.device), S
    else:
        longest = S if max_length is None else int(max_length)  # on the CPU: nothing waits
    return cu_seqlens, cu_seqlens, longest, longest


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def whole_rows(batch: int, length: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of rows that are one document each."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def visible(batch: int, length: int, cu_seqlens: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """Who sees whom, bool `[B, 1, S, S]`: `visible[b, 0, i, j]` where token i of row b attends to token j."""
    position = torch.arange(length, device=device)
    behind = position[:, None] - position
    seen = behind >= 0
    if window is not None:
        seen = seen & (behind < window)
    if cu_seqlens is None:
        return seen.expand(batch, 1, length, length)
    document = documents(batch, length, cu_seqlens)
    return (seen & (document[:, :, None] == document[:, None, :])).unsqueeze(1)


def documents(batch: int, length: int, cu_seqlens: Tensor) -> Tensor:
    """The number of each token's document, `[B, S]`. Example: [0, 2, 5] with one row of 5 -> [[0, 0, 1, 1, 1]]."""
    token = torch.arange(batch * length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True).view(batch, length)


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """What the kernels compute without sinks: the output and the log of the softmax's sum `[H, T]`."""
    scores, (_, _, value_BSHD) = _scores(query, key, value, cu_seqlens, scale, window)
    lse_BHS = scores.logsumexp(-1)
    out = torch.einsum("bhij,bjhd->bihd", torch.exp(scores - lse_BHS[..., None]), value_BSHD)
    return out.to(query.dtype), lse_BHS.transpose(0, 1).flatten(1)


def backward_reference(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
) -> list[Tensor]:
    """What the kernels' backward computes from any `out` and `lse`: the gradients of query, key and value."""
    B, S, H, D = query.shape
    scores, (query_BSHD, key_BSHD, value_BSHD) = _scores(query, key, value, cu_seqlens, scale, window)
    grad = grad.to(scores.dtype)
    weights = torch.exp(scores - lse.view(H, B, S).transpose(0, 1)[..., None])
    delta = (grad * out).sum(-1).transpose(1, 2)
    grad_scores = weights * (torch.einsum("bihd,bjhd->bhij", grad, value_BSHD) - delta[..., None]) * scale
    grads = [
        torch.einsum("bhij,bjhd->bihd", grad_scores, key_BSHD),
        torch.einsum("bhij,bihd->bjhd", grad_scores, query_BSHD),
        torch.einsum("bhij,bihd->bjhd", weights, grad),
    ]
    # A key-value head serves H / G neighbouring heads.
    shapes = ((B, S, x.shape[2], H // x.shape[2], D) for x in (query, key, value))
    return [x.view(shape).sum(3).to(query.dtype) for x, shape in zip(grads, shapes, strict=True)]


def _scores(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, scale: float, window: int | None
) -> tuple[Tensor, list[Tensor]]:
    """The scores `[B, H, S, S]`, -inf where not visible, and the inputs with H heads, all in fp32 or more."""
    B, S, H, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    inputs = [x.to(dtype).repeat_interleave(H // x.shape[2], 2) for x in (query, key, value)]
    scores = torch.einsum("bihd,bjhd->bhij", inputs[0], inputs[1]) * scale
    return scores.masked_fill(~visible(B, S, cu_seqlens, window, query.device), float("-inf")), inputs
