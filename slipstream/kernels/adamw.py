"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in one pass over memory: 14 bytes a bf16 parameter.

The arithmetic is fp32, each operation rounded by itself (no fused multiply-add), so that the interpreted kernel agrees
with the reference bit for bit; on a GPU all but the weights do, whose square root and division are faster and may be
off by an ulp. `rounding` says how results are stored in 16 bits.
"""

import math
from typing import Any, NamedTuple

import torch

from slipstream.kernels import HAS_TRITON, runs_on
from slipstream.kernels.rounding import Random, join, philox, round_to, split

BLOCK, WARPS = 2048, 8  # 8 elements a thread: one 16-byte access a bf16 tensor
_SHARED = 1 << 23  # smaller tensors share launches: one of their own takes the host longer than the GPU
_CHUNK = 1 << 18  # elements that the reference takes at once, so that its intermediate results stay in the cache
WORD = 0xFFFFFFFF


class Coefficients(NamedTuple):
    """What the update multiplies with, for one step."""

    beta1: float
    beta2: float
    decay: float  # 1 - lr * weight_decay
    step_size: float  # lr, corrected for exp_avg's start at zero
    root_scale: float  # the same correction of the root of exp_avg_sq
    eps: float

    @classmethod
    def of(
        cls, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int | float
    ) -> "Coefficients":
        """Those of step number `step`, which counts from 1."""
        beta1, beta2 = betas
        return cls(
            beta1, beta2, 1 - lr * weight_decay, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps
        )  # fmt: skip


class Facts(NamedTuple):
    """What a launch has to know of the tensors that stay from step to step; asking them anew is the host's time."""

    size: int
    kind: tuple[Any, ...] | None  # alike for all that can share a launch; None: has one of its own
    whole: bool  # begin and end at multiples of 16
    pointers: tuple[int, ...]

    @classmethod
    def of(
        cls, param: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, residual: torch.Tensor | None
    ) -> "Facts":
        tensors = [tensor for tensor in (param, exp_avg, exp_avg_sq, residual) if tensor is not None]
        size, pointers = param.numel(), tuple(tensor.data_ptr() for tensor in tensors)
        shared = 0 < size < _SHARED and runs_on(param) and all(tensor.is_contiguous() for tensor in tensors)
        kind = (param.device, *(tensor.dtype for tensor in tensors)) if shared else None
        return cls(size, kind, size % 16 == 0 and all(pointer % 16 == 0 for pointer in pointers), pointers)

    def still_of(
        self, param: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, residual: torch.Tensor | None
    ) -> bool:
        """Of the same tensors: whether none has other memory by now (`.data`, `to`)."""
        pointers: tuple[int, ...] = (param.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr())
        if residual is not None:
            pointers = (*pointers, residual.data_ptr())
        return pointers == self.pointers and (self.kind is None or self.kind[1] == param.dtype)


class Update(NamedTuple):
    """The arguments of `adamw_`, and `facts` of them where they are known."""

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    residual: torch.Tensor | None
    coefficients: Coefficients
    random: Random | None
    scale: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    facts: Facts | None = None


def adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    residual: torch.Tensor | None,
    coefficients: Coefficients,
    random: Random | None,
    scale: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> None:
    """One step of AdamW on tensors of one shape, in place.

    Elements are numbered in the order of `param`'s memory. Tensors in another order than `param` cost a copy.

    Args:
        param: weights in fp32, bf16 or fp16.
        grad: their gradient, in any of these types.
        exp_avg: the gradient's running mean, likewise.
        exp_avg_sq: its square's.
        residual: int16, for bf16 weights: the bits that fp32 weights have below them (see `split`), read and written.
        coefficients: of this step.
        random: round what is stored in 16 bits stochastically, with these bits; to nearest for None.
        scale: fp32 scalar on the same device; the gradient is multiplied by it as it is read.
        skip: likewise; where it is not 0, nothing is written. The host need not know.

    Example: param [1.], grad [2.], states [0.], lr 0.1, weight decay 0, step 1 -> param [0.9].
    """
    given = (param, grad, exp_avg, exp_avg_sq, residual)
    if not param.numel():
        return
    if all(tensor is None or tensor.is_contiguous() for tensor in given):
        _run(Update(*given, coefficients, random, scale, skip))
        return
    order = sorted(range(param.dim()), key=param.stride, reverse=True)

    def in_order(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.permute(order).contiguous()

    p, g, m, v = in_order(param), in_order(grad), in_order(exp_avg), in_order(exp_avg_sq)
    missing = None if residual is None else in_order(residual)
    _run(Update(p, g, m, v, missing, coefficients, random, scale, skip))
    for tensor, written in zip(given, (p, g, m, v, missing), strict=True):
        if tensor is not None and written is not None and tensor is not grad and not _same(tensor, written):
            tensor.permute(order).copy_(written)


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.data_ptr() == other.data_ptr()


def _run(update: Update) -> None:
    """On contiguous tensors: the kernel, or the reference a part at a time."""
    param, grad, exp_avg, exp_avg_sq, residual, coefficients, random, scale, skip, _ = update
    if runs_on(param):
        _launch(update)
        return
    for first in range(0, param.numel(), _CHUNK):
        p, g, m, v = (t.view(-1)[first : first + _CHUNK] for t in (param, grad, exp_avg, exp_avg_sq))
        missing = None if residual is None else residual.view(-1)[first : first + _CHUNK]
        bits = None if random is None else Random(random.key, random.start + first)
        adamw_reference_(p, g, m, v, missing, coefficients, bits, scale, skip)


def adamw_reference_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    residual: torch.Tensor | None,
    coefficients: Coefficients,
    random: Random | None,
    scale: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> None:
    """What `adamw_` computes, on tensors `[N]`, one operation at a time."""
    if skip is not None and skip:
        return
    beta1, beta2, decay, step_size, root_scale, eps = coefficients
    p_N = join(param, residual) if residual is not None else param.float()
    g_N = grad.float() if scale is None else grad.float() * scale
    m_N = exp_avg.float() * beta1 + g_N * (1 - beta1)
    v_N = exp_avg_sq.float() * beta2 + (g_N * g_N) * (1 - beta2)
    root_N = v_N.double().sqrt().float()  # the nearest; torch's fp32 root on a CPU (MKL's) may be its neighbour
    p_N = p_N * decay - (m_N / (root_N * root_scale + eps)) * step_size
    bits_N: list[torch.Tensor | None] = [None] * 3
    if random is not None:
        # NaN, which all three are where one is, could carry into the sign.
        low_N, high_N = (word.masked_fill(p_N.isnan(), 0) for word in philox(random, param.numel(), param.device))
        bits_N = [low_N >> 16, high_N & 0xFFFF, low_N & 0xFFFF]
    exp_avg.copy_(round_to(m_N, exp_avg.dtype, bits_N[0]))
    exp_avg_sq.copy_(round_to(v_N, exp_avg_sq.dtype, bits_N[1]))
    if residual is None:
        param.copy_(round_to(p_N, param.dtype, bits_N[2]))
    else:
        for tensor, part in zip((param, residual), split(p_N), strict=True):
            tensor.copy_(part)


def signed(word: int) -> int:
    """The same 32 bits as an int that Triton takes for an int32, whatever its value."""
    return word - (1 << 32) if word >> 31 else word


def _draws(update: Update) -> bool:
    """Whether random bits are needed: where nothing is rounded, none are made."""
    rounded = update[2:4] if update.residual is not None else (update.param, *update[2:4])
    return update.random is not None and any(tensor.dtype != torch.float32 for tensor in rounded)


def flags(update: Update) -> dict[str, bool]:
    """What is compiled in and what left out."""
    return {
        "STOCHASTIC": _draws(update),
        "MASTER": update.residual is not None,
        "SCALED": update.scale is not None,
        "SKIPS": update.skip is not None,
    }


def _launch(update: Update) -> None:
    param, grad, exp_avg, exp_avg_sq, residual, coefficients, random, scale, skip, _ = update
    beta1, beta2, decay, step_size, root_scale, eps = coefficients
    key, start = random or Random(0)
    with torch.cuda.device_of(param):
        _adamw_kernel[(-(-param.numel() // BLOCK),)](
            param, grad, exp_avg, exp_avg_sq, param if residual is None else residual,
            param if scale is None else scale, param if skip is None else skip,
            param.numel(), beta1, 1 - beta1, beta2, 1 - beta2, decay, step_size, root_scale, eps,
            signed(key & WORD), signed(key >> 32), start, 0,
            **flags(update), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


if HAS_TRITON:
    import triton
    import triton.language as tl

    from slipstream.kernels.rounding import joined, parts, philox_words, store_rounded

    @triton.jit
    def update_block(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        residual,
        scale,
        offsets,
        inside,
        beta1,
        rest1,
        beta2,
        rest2,
        decay,
        step_size,
        root_scale,
        eps,
        key,
        high_key,
        start,
        zero,
        STOCHASTIC: tl.constexpr,
        MASTER: tl.constexpr,
        SCALED: tl.constexpr,
    ):
        p = tl.load(param + offsets, mask=inside, other=0.0)
        g = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            g *= tl.load(scale)
        m = tl.load(exp_avg + offsets, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + offsets, mask=inside, other=0.0).to(tl.float32)
        if MASTER:
            p = joined(p, tl.load(residual + offsets, mask=inside, other=0))
        else:
            p = p.to(tl.float32)
        m = m * beta1 + g * rest1
        v = v * beta2 + (g * g) * rest2
        p = p * decay - m / (tl.sqrt(v) * root_scale + eps) * step_size
        low = tl.zeros_like(g).to(tl.uint32)
        high = low
        if STOCHASTIC:
            number = start.to(tl.int64) + offsets
            # A zero that the compiler does not know ties the numbers to the gradient's layout: 8 elements a thread.
            # Without it all bits go through shared memory.
            low = number.to(tl.uint32) ^ (g.to(tl.uint32, bitcast=True) & zero.to(tl.uint32))
            high = (number >> 32).to(tl.uint32) ^ high_key.to(tl.uint32)
            low, high = philox_words(low, high, key.to(tl.uint32))
            low, high = tl.where(p == p, low, 0), tl.where(p == p, high, 0)
        store_rounded(exp_avg + offsets, m, low >> 16, inside, STOCHASTIC)
        store_rounded(exp_avg_sq + offsets, v, high & 0xFFFF, inside, STOCHASTIC)
        if MASTER:
            kept, missing = parts(p)
            tl.store(param + offsets, kept, mask=inside)
            tl.store(residual + offsets, missing, mask=inside)
        else:
            store_rounded(param + offsets, p, low & 0xFFFF, inside, STOCHASTIC)

    # Without do_not_specialize each key of 1, or divisible by 16, would compile anew.
    @triton.jit(do_not_specialize=["key", "high_key", "start", "zero"])
    def _adamw_kernel(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        residual,
        scale,
        skip,
        size,
        beta1,
        rest1,
        beta2,
        rest2,
        decay,
        step_size,
        root_scale,
        eps,
        key,
        high_key,
        start,
        zero,
        STOCHASTIC: tl.constexpr,
        MASTER: tl.constexpr,
        SCALED: tl.constexpr,
        SKIPS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        applies = True
        if SKIPS:
            applies = tl.load(skip) == 0.0
        if applies:
            offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = offsets < size  # sizes divisible by 16 keep the accesses whole
            update_block(
                param, grad, exp_avg, exp_avg_sq, residual, scale, offsets, inside, beta1, rest1, beta2, rest2, decay,
                step_size, root_scale, eps, key, high_key, start, zero, STOCHASTIC, MASTER, SCALED,
            )  # fmt: skip
