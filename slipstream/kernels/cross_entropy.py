"""Softmax cross-entropy of rows of logits, whose gradient takes the logits' place.

Two passes over a row (Milakov and Gimelshein 2018, arXiv 1805.02867: maximum and sum of exponentials in one), fp32
inside: the logits are read twice and written once, and no other `[C, V]` tensor is made.

Dims: C rows, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from slipstream.kernels import HAS_TRITON, runs_on


class Transform(NamedTuple):
    """What a model does to its logits: `x = outer * tanh(inner * z)`, or `inner * z` without the tanh, and only the
    first `vocabulary` columns count."""

    vocabulary: int
    inner: float = 1.0
    tanh: bool = False
    outer: float = 1.0

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The transform of `logits [..., V]`, differentiable."""
        if self.inner != 1:
            logits = logits * self.inner
        if self.tanh:
            logits = torch.tanh(logits) * self.outer
        return logits[..., : self.vocabulary]


def cross_entropy_(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, transform: Transform, ignore_index: int
) -> torch.Tensor:
    """Losses `[C]` in fp32 (0 where ignored). `logits_CV`, contiguous rows, becomes the gradient of their sum.

    Example: logits [[0, 0]], label [0] -> loss [0.6931], logits become [[-0.5, 0.5]].
    """
    if not runs_on(logits_CV):
        return cross_entropy_reference_(logits_CV, labels_C, transform, ignore_index)
    rows, columns = logits_CV.shape
    losses_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    if rows:
        _cross_entropy_kernel[(rows,)](
            logits_CV,
            labels_C,
            losses_C,
            logits_CV.stride(0),
            columns,
            transform.vocabulary,
            transform.inner,
            transform.outer if transform.tanh else 1.0,
            ignore_index,
            TANH=transform.tanh,
            BLOCK=min(8192, 1 << (columns - 1).bit_length()),
            num_warps=16,
        )
    return losses_C


def cross_entropy_reference_(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, transform: Transform, ignore_index: int
) -> torch.Tensor:
    """What `cross_entropy_` computes, by autograd."""
    with torch.enable_grad():
        z_CV = logits_CV.detach().requires_grad_()
        x_CV = transform.apply(z_CV.float())
        losses_C = F.cross_entropy(x_CV, labels_C, ignore_index=ignore_index, reduction="none")
        (grad_CV,) = torch.autograd.grad(losses_C.sum(), z_CV)
    logits_CV.copy_(grad_CV)
    return losses_C.detach()


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _cross_entropy_kernel(
        logits,
        labels,
        losses,
        stride,
        columns,
        vocabulary,
        inner,
        outer,
        ignore_index,
        TANH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(labels + row)
        logits += row * stride
        offsets = tl.arange(0, BLOCK)
        if label == ignore_index:
            for start in range(0, columns, BLOCK):
                tl.store(logits + start + offsets, 0.0, mask=start + offsets < columns)
            tl.store(losses + row, 0.0)
        else:
            peak = -float("inf")
            total = 0.0
            at_label = 0.0
            for start in range(0, vocabulary, BLOCK):
                column = start + offsets
                z = tl.load(logits + column, mask=column < vocabulary, other=0.0).to(tl.float32) * inner
                if TANH:
                    z = 2 * tl.sigmoid(2 * z) - 1
                x = tl.where(column < vocabulary, z * outer, -float("inf"))
                new_peak = tl.maximum(peak, tl.max(x, 0))
                total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(x - new_peak), 0)
                peak = new_peak
                # Picked here rather than loaded: another warp may overwrite the label's logit before a load gets there.
                at_label += tl.sum(tl.where(column == label, x, 0.0), 0)
            log_sum = peak + tl.log(total)
            tl.store(losses + row, log_sum - at_label)
            for start in range(0, columns, BLOCK):
                column = start + offsets
                z = tl.load(logits + column, mask=column < vocabulary, other=0.0).to(tl.float32) * inner
                slope = inner * outer
                if TANH:
                    z = 2 * tl.sigmoid(2 * z) - 1
                    slope *= 1 - z * z
                grad = (tl.exp(z * outer - log_sum) - tl.where(column == label, 1.0, 0.0)) * slope
                grad = tl.where(column < vocabulary, grad, 0.0)
                tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < columns)
