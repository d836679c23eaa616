"""NF4 against its definition, and the operator on packed weights against the same on what they unpack to."""

from statistics import NormalDist

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from slipstream.kernels.nf4 import QUANTILES, dequantize_nf4, dequantize_nf4_reference, quantize_nf4
from slipstream.moe.activation import register
from slipstream.moe.grouped_mlp import grouped_mlp
from slipstream.moe.grouped_mlp_4bit import Packed, grouped_mlp_4bit
from slipstream.moe.lora import low_rank
from tests.moe.test_grouped_mlp import FUSED, assert_matches, layouts, problem, run
from tests.moe.test_lora import FACTORS, adapted

# Of `numbers()`, by bitsandbytes 0.50.2: quantize_4bit(numbers, blocksize=64, quant_type="nf4").
THEIRS = bytes.fromhex(
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"
    "6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18"
)
THEIR_LARGEST = 2.941176414489746
THEIR_FIRST = [-2.941176414489746, -0.8365922570228577, 1.2962054014205933, -2.047625780105591]


def numbers() -> torch.Tensor:
    return ((torch.arange(128) * 37) % 101 - 50) / 17


def test_quantiles_are_those_of_the_paper() -> None:
    """Appendix E: of the normal distribution, evenly spaced in probability on both sides of zero, over the largest."""
    offset, inverse = (1 - 1 / 32 + 1 - 1 / 30) / 2, NormalDist().inv_cdf

    def half(values: int) -> list[float]:
        return [inverse(offset + (0.5 - offset) * at / values) for at in range(values)]

    largest = inverse(offset)
    expected = sorted([*(value / largest for value in half(8)), 0.0, *(-value / largest for value in half(7))])
    torch.testing.assert_close(torch.tensor(QUANTILES), torch.tensor(expected), rtol=0, atol=2e-6)


def test_numbers_and_bytes_are_bitsandbytes_own() -> None:
    packed = quantize_nf4(numbers()[None])
    assert packed[0, :64].tolist() == list(THEIRS)
    assert packed[0, 64:].view(torch.float32).tolist() == [THEIR_LARGEST] * 2
    assert dequantize_nf4(packed, (1, 128), torch.float32)[0, :4].tolist() == THEIR_FIRST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 8, 16), (2, 5, 13), (1, 1, 1)])
def test_every_value_becomes_the_nearest(size, dtype) -> None:
    """Of 16, by trying all; also in a last block that is not full, and in one of zeros."""
    torch.manual_seed(0)
    weight = torch.randn(size).to(dtype)
    weight[0, 0] = 0
    got = dequantize_nf4_reference(quantize_nf4(weight), size, torch.float32)
    for one, found in zip(weight.float().flatten(1), got.flatten(1), strict=True):
        for values, ours in zip(one.split(64), found.split(64), strict=True):
            choices = values.abs().max() * torch.tensor(QUANTILES)
            nearest = (values[:, None] - choices).abs().amin(1)
            torch.testing.assert_close((values - ours).abs(), nearest, rtol=1e-5, atol=1e-6)
    assert torch.equal(got[0, 0], torch.zeros(size[2]))


def as_stored(weight_EAB: torch.Tensor, transposed: bool) -> tuple[Packed, torch.Tensor]:
    """A weight packed in the layout that it has in memory, and what it unpacks to, as it was given."""
    stored = weight_EAB if transposed else weight_EAB.transpose(1, 2)
    bytes_EP = quantize_nf4(stored)
    values = dequantize_nf4(bytes_EP, stored.shape, weight_EAB.dtype)
    return Packed(bytes_EP, (stored.shape[1], stored.shape[2])), values if transposed else values.transpose(1, 2)


@pytest.mark.parametrize("with_lora", [True, False], ids=["adapters", "none"])
@pytest.mark.parametrize(("transposed", "biased"), [(False, False), (True, True)], ids=["out-in", "in-out and bias"])
@pytest.mark.parametrize("shape", ["plain", "no token", "odd widths"])
def test_as_with_the_unpacked_weights(shape, transposed, biased, with_lora) -> None:
    idx, inputs, function = adapted(shape, "swiglu", biased, transposed)
    name = register(function.__name__, FUSED[function])
    stored = {}
    for key in ("up", "down"):
        weight = "up_EHN" if key == "up" else "down_EIH"
        stored[key], inputs[weight] = as_stored(inputs[weight], transposed)
    factors = {key: inputs.pop(key) for key in FACTORS}
    if with_lora:
        inputs |= factors

    def lora(plain):
        found = {key: plain.pop(key, None) for key in FACTORS}
        if not with_lora:
            return {}
        return {
            f"{key}_lora": low_rank([(found[f"{key}_a"], found[f"{key}_b"], 0.7)], torch.float32)
            for key in ("up", "down")
        }

    def whole(idx, inputs):
        plain = dict(inputs)
        return grouped_mlp(idx_TK=idx, activation=name, **lora(plain), **plain)

    def in_4bit(idx, inputs):
        plain = {key: value for key, value in inputs.items() if key not in ("up_EHN", "down_EIH")}
        return grouped_mlp_4bit(
            idx_TK=idx, activation=name, **stored, **lora(plain), transposed=transposed, dtype=torch.float32, **plain
        )

    grad = torch.randn(inputs["x_TH"].shape)
    out, expected = run(whole, idx, inputs, grad)
    got = run(in_4bit, idx, inputs, grad)
    assert got[1].pop("up_EHN") is None
    assert got[1].pop("down_EIH") is None
    trained = {key: value.double() for key, value in expected.items() if key in got[1]}
    assert_matches(got, (out.double(), trained), 1e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
def test_what_the_compiler_is_told_is_true(transposed) -> None:
    idx, inputs, function = problem("plain", "swiglu", True, transposed, torch.bfloat16)
    name = register(function.__name__, FUSED[function])
    (up, _), (down, _) = (as_stored(inputs[key], transposed) for key in ("up_EHN", "down_EIH"))
    factors = []
    for weight in (inputs["up_EHN"], inputs["down_EIH"]):
        experts, wide, out_width = weight.shape
        factors += [*low_rank([(torch.randn(experts, 4, wide), torch.randn(out_width, 4, experts), 1.0)], weight.dtype)]
    arguments = (
        inputs["x_TH"], inputs["weights_TK"], idx, up.bytes_EP, down.bytes_EP, inputs["up_bias_EN"],
        inputs["down_bias_EH"], *factors, name, up.inner, down.inner, transposed, torch.bfloat16,
    )  # fmt: skip
    out = torch.ops.slipstream.experts_4bit(*arguments, None)
    needs = [True, True, False, False, *[True] * 6]
    backward = (torch.randn_like(inputs["x_TH"]), *arguments, out[1], list(out[2:]), needs)
    grads = torch.ops.slipstream.experts_4bit_backward(*backward)
    assert len(grads) == sum(needs)
    with FakeTensorMode() as mode:
        fake, told = (tree_map_only(torch.Tensor, mode.from_tensor, given) for given in (backward, arguments))
        assert layouts(torch.ops.slipstream.experts_4bit(*told, None)) == layouts(out)
        assert layouts(torch.ops.slipstream.experts_4bit_backward(*fake)) == layouts(grads)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The kernel gives the reference's numbers, bit for bit, at the widths of Qwen3-30B-A3B."""
    for size in ((4, 1536, 2048), (4, 2048, 768), (3, 5, 13)):
        weight = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        packed = quantize_nf4(weight)
        assert torch.equal(packed.cpu(), quantize_nf4(weight.cpu()))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(dequantize_nf4(packed, size, dtype), dequantize_nf4_reference(packed, size, dtype))
