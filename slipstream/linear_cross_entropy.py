"""Linear cross-entropy: from hidden states to the loss and its gradients, a chunk of tokens at a time.

The gradients are computed chunk by chunk in the forward pass (Liger Kernel, Hsu et al. 2024, arXiv 2410.10989), so
that no more than one chunk's logits exist. They leave the softmax with the loss's scale in them: backward has nothing
left to do where the incoming gradient is 1.

Dims: T tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from slipstream.kernels.cross_entropy import Transform, cross_entropy_
from slipstream.kernels.scale import scale_
from slipstream.numerics import compute_dtype

# Enough rows for the head's GEMMs to run at full rate, few enough that a chunk's logits stay below the weights in
# memory: 2048 x 151,936 x 2 B = 0.6 GB.
CHUNK_TOKENS = 2048
# Row starts and widths that are multiples of this let GEMMs and the softmax move 16 bytes or more at a time.
_ALIGNMENT = 16
_GEMM_ALIGNMENT = 8  # of a vocabulary, 16 bytes in 16 bits; see `_spans`


def linear_cross_entropy(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    transform: Transform | None = None,
    ignore_index: int = -100,
    scale: torch.Tensor | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """`scale` times the sum over tokens of `cross_entropy(x, label) + z_loss * logsumexp(x)^2`, scalar in fp32.

    `x = transform(hidden @ weight^T + bias)`. The softmax runs in fp32, the GEMMs in the inputs' dtype (autocast
    honoured), and a weight gradient that takes several chunks is summed in fp32. Tokens without loss are left out on a
    CPU; elsewhere they take part and count for nothing, as the host would have to wait to learn which they are.
    Oracle: `linear_cross_entropy_reference`.

    Args:
        labels_T: below `transform.vocabulary`, or `ignore_index`. Others raise IndexError on a CPU; on a GPU loss and
            gradients become nan.
        transform: what the model does to its logits; None for nothing.
        scale: scalar in fp32 on the tokens' device, not differentiated; None is 1.
        z_loss: coefficient that keeps the logits from drifting (Chowdhery et al. 2022, PaLM, arXiv 2204.02311: 1e-4).

    Raises:
        ValueError: as many labels as tokens are needed, and a `z_loss` >= 0.
    """
    if labels_T.shape != hidden_TH.shape[:1]:
        raise ValueError(
            f"{tuple(labels_T.shape)} labels for hidden states {tuple(hidden_TH.shape)}: give one label a token, "
            f"ignore_index={ignore_index} where there is none"
        )
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss}: give a coefficient of 0 or more, for instance 1e-4")
    dtype = compute_dtype(hidden_TH)
    if hidden_TH.device.type == "cpu":
        # Only where looking at the labels does not stall a device: leave out the rows that carry no loss.
        kept = (labels_T != ignore_index).nonzero().squeeze(1)
        hidden_TH, labels_T = hidden_TH[kept], labels_T[kept]
    return _LinearCrossEntropy.apply(
        hidden_TH.to(dtype),
        weight_VH.to(dtype),
        None if bias_V is None else bias_V.to(dtype),
        labels_T,
        transform or Transform(weight_VH.shape[0]),
        ignore_index,
        scale,
        z_loss,
        torch.is_grad_enabled(),
    )


def linear_cross_entropy_reference(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    transform: Transform | None = None,
    ignore_index: int = -100,
    scale: torch.Tensor | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """What `linear_cross_entropy` computes, with the logits whole."""
    transform = transform or Transform(weight_VH.shape[0])
    logits_TV = F.linear(hidden_TH, weight_VH, bias_V)
    if logits_TV.dtype != torch.float64:
        logits_TV = logits_TV.float()
    logits_TV = transform.apply(logits_TV)
    total = F.cross_entropy(logits_TV, labels_T, ignore_index=ignore_index, reduction="sum")
    total = total + z_loss_sum(logits_TV, labels_T, ignore_index, z_loss)
    return total if scale is None else total * scale


def z_loss_sum(logits_TV: torch.Tensor, labels_T: torch.Tensor, ignore_index: int, z_loss: float) -> torch.Tensor:
    """The z-loss of `linear_cross_entropy` alone, on logits that exist, in their dtype."""
    squares_T = logits_TV.logsumexp(-1).square()
    return z_loss * squares_T.masked_fill(labels_T == ignore_index, 0).sum()


def one_over(num_items: Any, labels_T: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """One over `num_items`, or over the number of labels, on the labels' device; the host does not wait for it."""
    if num_items is None:
        num_items = (labels_T != ignore_index).sum()
    elif not isinstance(num_items, torch.Tensor) or num_items.device.type == "cpu":
        num_items = torch.full((), float(num_items), dtype=torch.float32, device=labels_T.device)
    return num_items.to(labels_T.device, torch.float32).reciprocal()


def _chunk_size(tokens: int) -> int:
    """Rows a chunk, so that chunks are about equal."""
    chunks = max(1, -(-tokens // CHUNK_TOKENS))
    return max(1, -(-tokens // (chunks * _ALIGNMENT))) * _ALIGNMENT


def _spans(vocabulary: int, device: torch.device) -> list[slice]:
    """The columns of logits that a GEMM takes at once. On a GPU the few that make a vocabulary odd (128,167; any that
    tokens were added to) are apart: cuBLAS may have slow kernels for such widths, whatever the rows' stride.

    They come first, so that the sum of both is rounded where it is whole.
    """
    aligned = vocabulary // _GEMM_ALIGNMENT * _GEMM_ALIGNMENT
    if device.type == "cpu" or aligned in (0, vocabulary):
        return [slice(0, vocabulary)]
    return [slice(aligned, vocabulary), slice(0, aligned)]


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_T: torch.Tensor,
        transform: Transform,
        ignore_index: int,
        scale: torch.Tensor | None,
        z_loss: float,
        grad_enabled: bool,
    ) -> torch.Tensor:
        need_hidden, need_weight, need_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        need_any = need_hidden or need_weight or need_bias
        tokens, vocabulary, dtype = hidden_TH.shape[0], weight_VH.shape[0], weight_VH.dtype
        chunk = _chunk_size(tokens)
        # fp16 has no room for gradients divided by the number of tokens: theirs wait for backward and its loss scale.
        late = scale if dtype == torch.float16 else None
        losses = []
        grad_hidden = torch.empty_like(hidden_TH) if need_hidden else None
        sum_dtype = dtype if tokens <= chunk else torch.float32
        grad_weight = torch.empty_like(weight_VH, dtype=sum_dtype) if need_weight else None
        grad_bias = None
        spans = _spans(vocabulary, hidden_TH.device)
        with torch.autocast(hidden_TH.device.type, enabled=False):
            padded_CV = hidden_TH.new_empty(min(chunk, tokens), -(-vocabulary // _ALIGNMENT) * _ALIGNMENT)
            for start in range(0, max(tokens, 1), chunk):
                rows = slice(start, start + chunk)
                hidden_CH, labels_C = hidden_TH[rows], labels_T[rows]
                padded = padded_CV[: len(labels_C)]
                grad_CV = padded[:, :vocabulary]  # the logits, until the softmax puts the gradient there
                for span in spans:
                    if bias_V is None:
                        torch.mm(hidden_CH, weight_VH[span].t(), out=grad_CV[:, span])
                    else:
                        torch.addmm(bias_V[span], hidden_CH, weight_VH[span].t(), out=grad_CV[:, span])
                applied = scale if late is None else None
                losses.append(cross_entropy_(padded, labels_C, transform, ignore_index, applied, z_loss, need_any))
                for number, span in enumerate(spans):
                    if grad_hidden is not None:
                        _add_mm(grad_hidden[rows], grad_CV[:, span], weight_VH[span], number == 0)
                    if grad_weight is not None:
                        _add_mm(grad_weight[span], grad_CV[:, span].t(), hidden_CH, start == 0)
                if need_bias:
                    part = grad_CV.sum(0, dtype=torch.float32)
                    grad_bias = part if grad_bias is None else grad_bias + part
        del padded_CV, padded, grad_CV  # make room for the 16-bit copy
        # Stored in the parameters' own dtype: the fp32 sums would stay until backward.
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(dtype),
            None if grad_bias is None else grad_bias.to(dtype),
            late,
        )
        loss = torch.cat(losses).sum()
        return loss if scale is None else loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *grads, late = ctx.saved_tensors
        factor = grad if late is None else grad * late
        # In place, unless the graph is kept: then this may run again, and the caller may own what it returned before.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = [None if saved is None else scale_(saved.clone() if keep else saved, factor) for saved in grads]
        return (*scaled, None, None, None, None, None, None)


def _add_mm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """`a @ b` added to `total`, or put there if it is the `first`; accumulated in fp32 on any device."""
    beta = 0 if first else 1  # 0 reads nothing of what was there
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
