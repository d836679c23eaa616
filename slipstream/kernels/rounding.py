"""Storing fp32 results in 16 bits: to nearest, stochastically, or exactly, in bf16 and 16 bits more.

Stochastic rounding goes up with the probability of the distance from below, so that the mean is exact and updates
smaller than half a step of bf16 are not lost (Zamirai et al. 2020, arXiv 2010.06192).

Its bits come from Philox-2x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a function of a
key and of the element's number: 64 bits an element.
"""

from typing import NamedTuple

import torch

from slipstream.kernels import HAS_TRITON

_WORD = 0xFFFFFFFF


class Random(NamedTuple):
    """The random bits of a tensor's elements: `key`, of 64 bits, and the number of its first element."""

    key: int
    start: int = 0


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 as the nearest bf16 (away from zero at a tie) and the int16 that is missing, as bit patterns: exact.

    A pattern is a sign and a magnitude, so adding to it rounds the magnitude up whatever the sign. NaN loses its
    payload, for a payload in the low half would look like infinity.

    Example: 1.0 + 2**-23 has the pattern 0x3F800001 -> bf16 1.0 (0x3F80), int16 1.
    """
    bits = torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view(torch.int32).to(torch.int64)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 that `split` has taken apart."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def round_to(x: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor | None) -> torch.Tensor:
    """fp32 `x` in `dtype`: to nearest, or up where the low part of `x` and random `bits` make a carry.

    `bits` is 16 bits for each element, 0 for NaN.

    Example: bf16 keeps 0x3F80 of the pattern 0x3F80C000; with bits 0x4000 and above, that is three times of four,
    it becomes 0x3F81.
    """
    if bits is None or dtype == torch.float32:
        return x.to(dtype)
    bits = bits.to(torch.int32)
    if dtype == torch.bfloat16:
        return ((x.view(torch.int32) + bits) >> 16).to(torch.int16).view(torch.bfloat16)
    # fp16 has 13 bits less, and below 2**-14 ever more less. There 2**-14 is added, so that they are 13 again.
    magnitude = x.abs()
    lift = torch.where(magnitude < 2.0**-14, 2.0**-14, 0.0)
    patterns = (magnitude + lift).view(torch.int32)
    rounded = ((patterns + (bits >> 3)) & ~0x1FFF).view(torch.float32) - lift
    return rounded.copysign(x).to(dtype)


def philox(random: Random, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two words of 32 random bits, as int64 `[count]`, for each of the elements from `random.start` on."""
    number = torch.arange(random.start, random.start + count, device=device)
    key = random.key & _WORD
    low, high = number & _WORD, (number >> 32) ^ (random.key >> 32)
    for _ in range(7):
        product = low * 0xD256D193  # its 64 bits are right, whatever sign int64 makes of them
        low, high = (product >> 32) & _WORD ^ key ^ high, product & _WORD
        key = (key + 0x9E3779B9) & _WORD
    return low, high


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def philox_words(low, high, key):
        """`philox` of a counter's two words and a key's lower one."""
        for _ in tl.static_range(7):
            product = low.to(tl.uint64) * 0xD256D193
            low = (product >> 32).to(tl.uint32) ^ key ^ high
            high = product.to(tl.uint32)
            key += 0x9E3779B9
        return low, high

    @triton.jit
    def store_rounded(pointer, x, bits, inside, STOCHASTIC: tl.constexpr):
        """`round_to` what `pointer` points to, and store."""
        dtype: tl.constexpr = pointer.dtype.element_ty
        if dtype == tl.bfloat16:
            # Not `x.to(tl.bfloat16)`: the interpreter would truncate.
            pattern = x.to(tl.uint32, bitcast=True)
            if STOCHASTIC:
                pattern += bits
            else:
                pattern += tl.where(x == x, 0x7FFF + ((pattern >> 16) & 1), 0)
            tl.store(pointer, (pattern >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
        elif STOCHASTIC and dtype == tl.float16:
            magnitude = tl.abs(x)
            lift = tl.where(magnitude < 6.103515625e-05, 6.103515625e-05, 0.0)
            pattern = (magnitude + lift).to(tl.uint32, bitcast=True) + (bits >> 3)
            magnitude = (pattern & 0xFFFFE000).to(tl.float32, bitcast=True) - lift
            tl.store(pointer, tl.where(x < 0, -magnitude, magnitude).to(tl.float16), mask=inside)
        else:
            tl.store(pointer, x.to(dtype), mask=inside)

    @triton.jit
    def joined(high, low):
        """`join`."""
        pattern = (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) + low.to(tl.int32).to(tl.uint32)
        return pattern.to(tl.float32, bitcast=True)

    @triton.jit
    def parts(x):
        """`split`."""
        pattern = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
        kept = (pattern + 0x8000) >> 16
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True), (pattern - (kept << 16)).to(tl.int16)
