"""Softmax cross-entropy of rows of logits, whose gradient takes the logits' place.

Two passes over a row (Milakov and Gimelshein 2018, arXiv 1805.02867: maximum and sum of exponentials in one), fp32
inside: the logits are read twice and written once, and no other `[C, V]` tensor is made.

Dims: C rows, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from slipstream.kernels import HAS_TRITON, runs_on

BLOCK = 8192  # logits of a row that a program works on at a time
NUM_WARPS = 16


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
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    transform: Transform,
    ignore_index: int,
    scale: torch.Tensor | None = None,
    z_loss: float = 0.0,
    need_grad: bool = True,
) -> torch.Tensor:
    """Losses `[C]` in fp32 (0 where ignored); `logits_CV` becomes the gradient of `scale` times their sum.

    A loss is `logsumexp(x) - x[label] + z_loss * logsumexp(x)^2` with `x = transform(logits)`; the z-loss keeps the
    logits from drifting (Chowdhery et al. 2022, PaLM, arXiv 2204.02311).

    Example: logits [[0, 0]], label [0] -> loss [0.6931], logits become [[-0.5, 0.5]].

    Args:
        logits_CV: contiguous rows; fastest where the row stride is a multiple of 16.
        labels_C: below `transform.vocabulary`, or `ignore_index`. Anything else makes its loss and row nan on a GPU,
            where raising would stall the device, and raises IndexError elsewhere.
        scale: scalar in fp32 on the same device; None is 1. Ignored rows are 0 even where it is infinite.
        need_grad: False leaves `logits_CV` as it is.
    """
    if not runs_on(logits_CV):
        return cross_entropy_reference_(logits_CV, labels_C, transform, ignore_index, scale, z_loss, need_grad)
    rows, columns = logits_CV.shape
    losses_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    if rows:
        outer = transform.outer if transform.tanh else 1.0
        _cross_entropy_kernel[(rows,)](
            logits_CV,
            labels_C.contiguous(),
            losses_C,
            losses_C if scale is None else scale,
            logits_CV.stride(0),
            columns,
            transform.vocabulary,
            transform.inner,
            outer * math.log2(math.e),
            transform.inner * outer,
            z_loss,
            ignore_index,
            SCALED=scale is not None,
            GRAD=need_grad,
            TANH=transform.tanh,
            BLOCK=min(BLOCK, max(16, 1 << (columns - 1).bit_length())),
            num_warps=NUM_WARPS,
        )
    return losses_C


def cross_entropy_reference_(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    transform: Transform,
    ignore_index: int,
    scale: torch.Tensor | None = None,
    z_loss: float = 0.0,
    need_grad: bool = True,
) -> torch.Tensor:
    """What `cross_entropy_` computes, by autograd."""
    ignored_C = labels_C == ignore_index
    with torch.enable_grad():
        z_CV = logits_CV.detach().requires_grad_()
        x_CV = transform.apply(z_CV.float())
        losses_C = F.cross_entropy(x_CV, labels_C, ignore_index=ignore_index, reduction="none")
        if z_loss:
            losses_C = losses_C + z_loss * x_CV.logsumexp(1).square().masked_fill(ignored_C, 0)
        if need_grad:
            (grad_CV,) = torch.autograd.grad(losses_C.sum(), z_CV)
            if scale is not None:
                grad_CV = (grad_CV.float() * scale).masked_fill_(ignored_C[:, None], 0)
            logits_CV.copy_(grad_CV)
    return losses_C.detach()


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _bounded(z, inner, TANH: tl.constexpr):
        """`inner * z`, or its tanh, in fp32."""
        z = z.to(tl.float32) * inner
        if TANH:
            z = 2 * tl.sigmoid(2 * z) - 1
        return z

    @triton.jit
    def _cross_entropy_kernel(
        logits,
        labels,
        losses,
        scale,
        stride,
        columns,
        vocabulary,
        inner,
        outer,  # in units of ln 2: exponentials and logarithms are to base 2, as the hardware has them
        slope,
        z_loss,
        ignore_index,
        SCALED: tl.constexpr,
        GRAD: tl.constexpr,
        TANH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        LN2: tl.constexpr = 0.6931471805599453
        # A thread holds a run of 8, so the maximum and the sum over axis 1 need no other thread.
        offsets = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(labels + row)
        logits += row * stride
        if label == ignore_index:
            tl.store(losses + row, 0.0)
            if GRAD:
                for start in range(0, columns, BLOCK):
                    tl.store(logits + start + offsets, 0.0, mask=start + offsets < columns)
        else:
            known = (label >= 0) & (label < vocabulary)
            bounded = _bounded(tl.load(logits + label, mask=known, other=float("nan")), inner, TANH)
            at_label = bounded * outer

            peak = tl.full((BLOCK // 8,), -3.4e38, tl.float32)  # finite: inf - inf is nan
            total = tl.zeros((BLOCK // 8,), tl.float32)
            for start in range(0, columns, BLOCK):
                column = start + offsets
                z = tl.load(logits + column, mask=column < columns, other=0.0)
                x = tl.where(column < vocabulary, _bounded(z, inner, TANH) * outer, -float("inf"))
                new_peak = tl.maximum(peak, tl.max(x, 1))
                total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(x - new_peak[:, None]), 1)
                peak = new_peak
            row_peak = tl.max(peak, 0)
            log_sum = row_peak + tl.log2(tl.sum(total * tl.exp2(peak - row_peak), 0))
            z_term = z_loss * LN2 * log_sum
            tl.store(losses + row, (log_sum - at_label + z_term * log_sum) * LN2)

            if GRAD:
                if SCALED:
                    slope *= tl.load(scale)
                slope = tl.where(known, slope, float("nan"))
                of_softmax = slope * (1 + 2 * z_term)
                tl.debug_barrier()  # every thread has the label's logit before one overwrites it
                # Backwards: the end of the row is still in the cache.
                for block in range(tl.cdiv(columns, BLOCK) - 1, -1, -1):
                    column = block * BLOCK + offsets
                    z = tl.load(logits + column, mask=column < columns, other=0.0)
                    t = _bounded(z, inner, TANH)
                    grad = tl.exp2(t * outer - log_sum) * of_softmax
                    if TANH:
                        grad *= 1 - t * t
                    grad = tl.where(column < vocabulary, grad, 0.0)
                    tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < columns)
                tl.debug_barrier()  # the label's gradient goes over what its block wrote
                grad = tl.exp2(at_label - log_sum) * of_softmax - slope
                if TANH:
                    grad *= 1 - bounded * bounded
                tl.store(logits + label, grad.to(logits.dtype.element_ty), mask=known)
