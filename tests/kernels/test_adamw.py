"""The AdamW kernel against its reference, and the bits it rounds with."""

from collections.abc import Sequence

import pytest
import torch

from slipstream.kernels import runs_on
from slipstream.kernels.adamw import Coefficients, Update, adamw_, adamw_reference_
from slipstream.kernels.adamw_many import adamw_all_
from slipstream.kernels.rounding import Random, join, philox, round_to, split
from tests.kernels.conditions import DEVICE, compiled_or_interpreted

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
COEFFICIENTS = Coefficients.of(1e-3, (0.9, 0.999), 1e-8, 0.1, 3)
KEY = 0xF23456789ABCDEF1
CASES = {
    "fp32": (FP32, FP32, "stochastic"),
    "fp32, bf16 states": (FP32, BF16, "stochastic"),
    "bf16": (BF16, BF16, "stochastic"),
    "bf16, fp32 states": (BF16, FP32, "stochastic"),
    "fp16": (FP16, BF16, "stochastic"),
    "fp16 states": (FP16, FP16, "stochastic"),
    "nearest": (BF16, BF16, "nearest"),
    "nearest fp16": (FP16, BF16, "nearest"),
    "master": (BF16, BF16, "master"),
    "master, fp32 states": (BF16, FP32, "master"),
}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def draw(size: Sequence[int], param: torch.dtype, state: torch.dtype, rounding: str, special: bool = True) -> Tensors:
    """Weights, gradient and states with infinities, NaN and negative zero among them, and a residual."""
    p = torch.randn(size, device=DEVICE).to(param)
    g = (torch.randn(size, device=DEVICE) * 1e-2).to(param)
    m = (torch.randn(size, device=DEVICE) * 1e-2).to(state)
    v = (torch.rand(size, device=DEVICE) * 1e-4).to(state)
    if special and p.numel() > 8:
        g.view(-1)[3], g.view(-1)[4] = float("inf"), float("nan")
        p.view(-1)[0], p.view(-1)[2], p.view(-1)[5] = -0.0, float("-inf"), float("nan")
        p.view(-1)[6], v.view(-1)[7] = torch.finfo(param).max, 0.0
        p.view(-1)[8] = 3e-6  # subnormal in fp16
    residual = torch.randint(-(1 << 15), 1 << 15, tuple(size), dtype=torch.int16, device=DEVICE)
    return p, g, m, v, residual if rounding == "master" else None


def copies(tensors: Tensors) -> Tensors:
    p, g, m, v, residual = (None if tensor is None else tensor.clone() for tensor in tensors)
    assert p is not None
    assert g is not None
    assert m is not None
    assert v is not None
    return p, g, m, v, residual


def both(tensors: Tensors, random: Random | None) -> tuple[Tensors, Tensors]:
    """What kernel and reference make of the tensors."""
    ours, expected = copies(tensors), copies(tensors)
    assert runs_on(ours[0])
    adamw_(*ours, COEFFICIENTS, random)
    flat = [None if tensor is None else tensor.view(-1) for tensor in expected]
    adamw_reference_(*flat, COEFFICIENTS, random)  # type: ignore[arg-type]
    return ours, expected


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> None:
    if one is not None:
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def same_update(ours: Tensors, expected: Tensors) -> None:
    """Bit for bit, but for a compiled kernel's weights: its root and its division may be off by an ulp of fp32."""
    for one, other in zip(ours[1:4], expected[1:4], strict=True):
        same(one, other)
    p, q = ours[0], expected[0]
    if DEVICE == "cpu":
        same(p, q)
        same(ours[4], expected[4])
    elif ours[4] is not None:
        assert expected[4] is not None
        torch.testing.assert_close(join(p, ours[4]), join(q, expected[4]), rtol=1e-6, atol=1e-8, equal_nan=True)
    elif p.dtype == FP32:
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, equal_nan=True)
    else:
        assert (~torch.isclose(p, q, rtol=0, atol=0, equal_nan=True)).sum() <= 1 + p.numel() // 1000
        torch.testing.assert_close(p, q, rtol=2.0**-7, atol=2.0**-24, equal_nan=True)


@compiled_or_interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("start", [0, 5, (1 << 32) - 700], ids=["first", "odd", "past 2**32"])
@pytest.mark.parametrize("size", [1, 48, 2048, 5001])
def test_kernel_is_the_reference(size, start, case) -> None:
    random = None if case[2] == "nearest" else Random(KEY, start)
    same_update(*both(draw([size], *case), random))


@compiled_or_interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_tensors_that_share_a_launch(case) -> None:
    """Sizes of several classes, some unaligned, one transposed, one empty, each with bits and a rate of its own."""
    given, expected = [], []
    for number, size in enumerate([16, 40, 4096, 4112, 5001, 1, 0, 64, 6000, 4096]):
        tensors = draw([size + 1], *case)
        if number in (3, 7):
            tensors = tuple(None if tensor is None else tensor[1:] for tensor in tensors)  # type: ignore[assignment]
        if number == 8:
            tensors = tuple(None if tensor is None else tensor[1:].view(60, 100).T for tensor in tensors)  # type: ignore[assignment]
        coefficients = COEFFICIENTS._replace(step_size=1e-3 * (1 + number % 2))
        random = None if case[2] == "nearest" else Random(KEY * number & (1 << 64) - 1, number << 31)
        given.append(Update(*tensors, coefficients, random))
        expected.append(copies(tensors))
        adamw_(*expected[-1], coefficients, random)
    adamw_all_(given)
    for update, one in zip(given, expected, strict=True):
        for tensor, other in zip(update[:5], one, strict=True):
            same(tensor, other)


@compiled_or_interpreted
@pytest.mark.parametrize("case", ["fp32", "bf16", "master", "nearest fp16"])
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_gradients_are_scaled_and_updates_skipped_by_the_device(scale, skip, case) -> None:
    """Alone and with others in a launch; one transposed, which goes through copies."""
    tensors = draw([5000], *CASES[case])
    random = None if "nearest" in case else Random(KEY)
    on_device = [None if value is None else torch.tensor(value, device=DEVICE) for value in (scale, skip)]
    expected = copies(tensors)
    flat = [None if tensor is None else tensor.view(-1) for tensor in expected]
    adamw_reference_(*flat, COEFFICIENTS, random, *on_device)  # type: ignore[arg-type]
    alone, shared, transposed = (copies(tensors) for _ in range(3))
    adamw_(*alone, COEFFICIENTS, random, *on_device)
    adamw_all_([Update(*shared, COEFFICIENTS, random, *on_device)])
    turned = [None if tensor is None else tensor.view(50, 100).T for tensor in transposed]
    adamw_all_([Update(*turned, COEFFICIENTS, random, *on_device)])  # type: ignore[arg-type]
    for ours in (alone, shared, transposed):
        same_update(ours, expected)
    if skip == 1.0:
        for tensor, other in zip(alone, tensors, strict=True):
            same(tensor, other)
    elif scale is not None and case == "fp32":
        before = (tensors[0], tensors[1] * scale, *tensors[2:])
        same_update((alone[0], before[1], *alone[2:]), both(before, random)[1])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("size", [1, 1000, (1 << 20) + 3])
def test_kernel_is_the_reference_on_a_gpu(size, case) -> None:
    random = None if case[2] == "nearest" else Random(KEY, 1 << 40)
    same_update(*both(draw([size], *case), random))


@compiled_or_interpreted
def test_unaligned_and_empty_tensors() -> None:
    tensors = draw([1030], *CASES["master"])
    odd = tuple(tensor[3:1030] for tensor in tensors if tensor is not None)
    same_update(*both(odd, Random(KEY)))  # type: ignore[arg-type]
    adamw_(*draw([0], *CASES["master"]), COEFFICIENTS, Random(KEY))


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_order_in_memory(rounding) -> None:
    """Transposed tensors are one run of memory too, and a gradient in another order is put into the weights'."""
    tensors = draw([24, 40], BF16, BF16, rounding, special=False)
    adamw_(*(expected := copies(tensors)), COEFFICIENTS, Random(KEY))
    transposed = tuple(None if tensor is None else tensor.clone().T for tensor in tensors)
    adamw_(*transposed, COEFFICIENTS, Random(KEY))  # type: ignore[arg-type]
    mixed = tuple(None if tensor is None else tensor.clone().T for tensor in tensors)
    mixed = (mixed[0], mixed[1].contiguous(), mixed[2].contiguous(), *mixed[3:])
    adamw_(*mixed, COEFFICIENTS, Random(KEY))  # type: ignore[arg-type]
    spread = tuple(None if tensor is None else tensor.repeat_interleave(2, 1)[:, ::2] for tensor in tensors)
    adamw_(*spread, COEFFICIENTS, Random(KEY))  # type: ignore[arg-type]
    for number, tensor in enumerate(expected):
        if tensor is not None:
            assert torch.equal(transposed[number].T, tensor)
            assert torch.equal(mixed[number].T, tensor)
            assert torch.equal(spread[number], tensor)
    assert not torch.equal(expected[0], tensors[0])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (0, 0, (0x257A3673, 0xCD26BE2A)),
        ((1 << 64) - 1, (1 << 32) - 1, (0xAB302C4D, 0x3DC9D239)),
        (0x85A308D3_243F6A88, 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected) -> None:
    """Random123's known answers for philox2x32 with 7 rounds; our key's upper half goes to the counter's."""
    key |= counter >> 32 << 32
    low, high = philox(Random(key, counter & 0xFFFFFFFF), 1, torch.device("cpu"))
    assert (low.item(), high.item()) == expected


def test_philox_numbers_elements_past_32_bits() -> None:
    start = (1 << 33) - 2
    whole = philox(Random(KEY, start), 4, torch.device("cpu"))
    for element in range(4):
        one = philox(Random(KEY, start + element), 1, torch.device("cpu"))
        assert [word.item() for word in one] == [word[element].item() for word in whole]
    assert len({*whole[0].tolist()}) == 4


def test_split_and_join_are_exact() -> None:
    patterns = torch.randint(-(1 << 31), 1 << 31, (1 << 20,)).to(torch.int32)
    edges = [0x0, 0x8000, 0x7FFF, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F800000, 0x1, 0x807FFF]
    patterns[: 2 * len(edges)] = torch.tensor(edges + [edge - (1 << 31) for edge in edges])
    x = patterns.view(FP32)
    high, low = split(x)
    number = ~x.isnan()
    assert torch.equal(join(high, low)[number].view(torch.int32), patterns[number])
    assert torch.equal(high.isnan(), x.isnan())
    assert torch.equal(join(high, low).isnan(), x.isnan())
    nearest = x.to(BF16)
    ties = low == -(1 << 15)
    assert torch.equal(high[number & ~ties], nearest[number & ~ties])
    assert (high[ties & number].float().abs() >= x[ties & number].abs()).all()


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7F80FFFF])
def test_a_nan_stays_one_whatever_its_payload(pattern) -> None:
    """CUDA's has all bits set, to which nothing can be added."""
    x = torch.tensor([pattern]).to(torch.int32).view(FP32)
    assert split(x)[0].isnan().all()
    for dtype in (FP32, BF16, FP16):
        p, m, v = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        adamw_(p, x, m, v, None, COEFFICIENTS, Random(KEY))
        assert p.isnan().all()
        assert m.isnan().all()
        assert v.isnan().all()


@pytest.mark.parametrize(
    ("x", "dtype", "below", "above"),
    [
        (1.0 + 0.3 / 128, BF16, 1.0, 1 + 1 / 128),
        (-1.0 - 0.3 / 128, BF16, -1.0, -1 - 1 / 128),
        (3e-39, BF16, 2.938735877055719e-39, 3.0305713732137e-39),  # subnormal
        (1.0 + 0.3 / 1024, FP16, 1.0, 1 + 1 / 1024),
        (-0.3 * 2.0**-24, FP16, 0.0, -(2.0**-24)),
        (5.7 * 2.0**-24, FP16, 5 * 2.0**-24, 6 * 2.0**-24),
    ],
)
def test_stochastic_rounding_has_the_exact_mean(x, dtype, below, above) -> None:
    count = 1 << 18
    value = torch.tensor([x])
    low, high = philox(Random(KEY), count, torch.device("cpu"))
    for bits in (low & 0xFFFF, low >> 16, high & 0xFFFF):
        rounded = round_to(value.expand(count).contiguous(), dtype, bits)
        found = rounded.double().unique()
        torch.testing.assert_close(found.sort().values, torch.tensor([below, above]).double().sort().values)
        share = (value.double().item() - below) / (above - below)
        ups = (rounded.double() != found[found.abs().argmin()]).double().mean().item()
        assert abs(ups - share) < 5 * (share * (1 - share) / count) ** 0.5 + 2.0**-13


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_can_be_stored_is_not_rounded(dtype) -> None:
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    x = x[~x.isnan()]
    assert torch.equal(round_to(x.float(), dtype, torch.full(x.shape, 0xFFFF)), x)


def test_bits_of_neighbours_steps_and_tensors_are_independent() -> None:
    count = 1 << 18
    streams = []
    for key in (KEY, KEY + 1, KEY + (1 << 32)):
        low, high = philox(Random(key), count + 1, torch.device("cpu"))
        streams += [low & 0xFFFF, low >> 16, high & 0xFFFF]
    streams += [streams[0].roll(1), streams[1].roll(1), streams[2].roll(1)]
    values = torch.stack([stream[1:] for stream in streams]).double()
    correlations = torch.corrcoef(values) - torch.eye(len(values))
    assert correlations.abs().max() < 5.5 / count**0.5
    # Each single bit is fair as well.
    for stream in streams[:3]:
        for bit in range(16):
            assert abs((stream >> bit & 1).double().mean().item() - 0.5) < 5 * 0.5 / count**0.5
