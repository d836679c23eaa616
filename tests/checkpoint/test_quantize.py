"""GPT-OSS in MXFP4: every value against a search for the nearest, there and back, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

import slipstream
from slipstream.checkpoint import quantize as module
from slipstream.checkpoint.quantize import quantize, to_mxfp4
from slipstream.cli import main
from tests.tiny_models import tiny_batch, tiny_model

IDS = tiny_batch(2, 16)


def nearest(block: list[float]) -> tuple[list[int], int]:
    """The bits and the biased exponent of a block, found by trying all."""
    largest = max(map(abs, block))
    lower = max(math.frexp(largest)[1] - 3, -127) if largest else -127
    found = []
    for exponent in (lower, lower + 1):
        bits = [
            min(
                (bits for bits in range(16) if (bits >= 8) == (math.copysign(1, value) < 0)),
                key=lambda bits, value=value: (abs(math.ldexp(FP4_VALUES[bits], exponent) - value), bits % 2),  # type: ignore[misc]
            )
            for value in block
        ]
        steps = [math.ldexp(value, -exponent) - FP4_VALUES[b] for value, b in zip(block, bits, strict=True)]
        found.append((sum(math.ldexp(step, exponent + 140) ** 2 for step in steps), exponent, bits))
    _, exponent, bits = min(found, key=lambda of: of[:2])
    return bits, exponent + 127


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def dense(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[rows, values]` by Transformers' own functions."""
    return convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0].t()


def test_every_value_goes_to_the_nearest() -> None:
    torch.manual_seed(0)
    steps = torch.arange(32) / 4  # halfway between any two neighbours, and all of them
    values = torch.cat([
        torch.randn(100, 32) * torch.logspace(-6, 6, 100)[:, None],
        torch.randn(20, 32).bfloat16().float(),
        torch.stack([steps, -steps, steps / 2, steps.clamp(max=4), steps.clamp(max=6.5), steps.clamp(max=2.5)]),
        torch.randint(-28, 29, (50, 32)) / 4 * 2.0**-3,
        torch.randn(10, 32).sign() * torch.rand(10, 1) * 8,  # one size each
        torch.tensor([1e-38, 3e-39, 1e-40, 1e-45, 1e38])[:, None] * torch.randn(5, 32).clamp(-2, 2),
        torch.stack([torch.zeros(32), -torch.zeros(32)]),
    ])  # fmt: skip
    packed, scales, _ = to_mxfp4(values)
    for row, bits, scale in zip(values.tolist(), unpacked(packed).tolist(), scales.tolist(), strict=True):
        assert (bits[0], scale[0]) == nearest(row)
    _, _, change = to_mxfp4(values[:120])
    moved = (dense(packed, scales)[:120].double() - values[:120].double()).square().sum().item()
    assert change == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_representable_stays(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scales = torch.arange(253, dtype=torch.uint8).repeat_interleave(8)[:, None]
    bits = torch.randint(0, 16, (len(scales), 32), dtype=torch.uint8)
    for largest in (7, 6, 5, 3, 0):
        bits = torch.where((bits & 7) > largest, (bits & 8) + largest, bits)
        bits[:, 0] = largest
        packed = (bits[:, ::2] | bits[:, 1::2] << 4)[:, None]
        values = dense(packed, scales, dtype)
        blocks, exponents, change = to_mxfp4(values)
        assert change == 0
        assert torch.equal(dense(blocks, exponents, dtype), values)
        if largest >= 6:  # else several exponents say the same
            assert torch.equal(blocks, packed)
            assert torch.equal(exponents, scales)
        if largest == 0:
            assert torch.equal(blocks, packed)  # signs too
            assert not exponents.any()


def test_exponents_are_found_again_after_a_little_training() -> None:
    torch.manual_seed(0)
    bits = torch.randint(0, 16, (500, 32), dtype=torch.uint8)
    even = torch.arange(500)[:, None] % 2 == 0
    bits = torch.where(even & ((bits & 7) > 6), bits - 1, bits)  # 4 steps the largest in these rows, 6 in the others
    bits[:, :1] = torch.where(even, 6, 15)
    packed, scales = (bits[:, ::2] | bits[:, 1::2] << 4)[:, None], torch.full((500, 1), 120, dtype=torch.uint8)
    # Smaller, so that the largest has a lower exponent, or larger, so that rounding the exponent up would move it.
    blocks, exponents, _ = to_mxfp4(dense(packed, scales) * (1 + torch.where(even, -0.02, 0.02) * torch.rand(500, 32)))
    assert torch.equal(exponents, scales)
    assert torch.equal(blocks, packed)


def make(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    tiny_model("gpt_oss", None, **changes).to(dtype).save_pretrained(folder, max_shard_size="300KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("of the run")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def test_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "a")
    monkeypatch.setattr(module, "MAX_SHARD", "60KB")
    done = quantize(source, tmp_path / "b")
    before, after = weights(source), weights(tmp_path / "b")
    config = json.loads((source / "config.json").read_text())
    assert done.tensors == 2 * config["num_hidden_layers"]
    assert done.bytes_before == sum(tensor.nbytes for tensor in before.values())
    assert done.bytes_after == sum(tensor.nbytes for tensor in after.values())
    # As the published ones: names, shapes, dtypes, config.
    experts = {name for name in before if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert after.keys() == (before.keys() - experts) | {n + end for n in experts for end in ("_blocks", "_scales")}
    change = total = 0.0
    for name, tensor in before.items():
        if name not in experts:
            assert torch.equal(after[name], tensor)
            continue
        count, into, out = tensor.shape
        blocks, scales = after[f"{name}_blocks"], after[f"{name}_scales"]
        assert blocks.shape == (count, out, into // 32, 16)
        assert scales.shape == (count, out, into // 32)
        assert blocks.dtype == scales.dtype == torch.uint8
        change += (convert_moe_packed_tensors(blocks, scales, dtype=torch.float32) - tensor).square().sum().item()
        total += tensor.float().square().sum().item()
    assert done.error == pytest.approx(math.sqrt(change / total), rel=1e-4)
    assert 0.05 < done.error < 0.15
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config | {
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        }
    }  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "b").iterdir())
    shards = [f"model-{n:05d}-of-{len(files) - 4:05d}.safetensors" for n in range(1, len(files) - 3)]
    assert len(shards) > 2
    assert files == sorted([*shards, "config.json", "generation_config.json", "model.safetensors.index.json",
                            "tokenizer.json"])  # fmt: skip
    # Transformers and we read the same, and what we save of it becomes the same bytes again.
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    ours = slipstream.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in ours.state_dict().items())
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-5)
    slipstream.AutoModelForCausalLM.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    assert quantize(tmp_path / "c", tmp_path / "d").error == 0
    again = weights(tmp_path / "d")
    assert again.keys() == after.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


def refused(source: Path, output: Path, **options: Any) -> str:
    before = sorted(output.parent.rglob("*"))
    with pytest.raises((ValueError, OSError)) as caught:
        quantize(source, output, **options)
    assert sorted(output.parent.rglob("*")) == before
    return str(caught.value)


def test_what_is_refused(tmp_path: Path) -> None:
    out, source = tmp_path / "out", make(tmp_path / "a", torch.float32)
    tiny_model("qwen3_moe", None).save_pretrained(tmp_path / "other")
    assert "model type is qwen3_moe" in refused(tmp_path / "other", out)
    assert "no config.json there" in refused(tmp_path / "nowhere", out)
    assert "is where the model comes from" in refused(source, source, overwrite=True)
    assert "already holds a model" in refused(source, tmp_path / "other")
    assert "it must be [experts, in, out], in divisible by 32" in refused(make(tmp_path / "odd", hidden_size=48), out)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    assert "no model.layers." in refused(source, out)
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    assert "its weights are quantised" in refused(source, out)
    (source / "config.json").write_text(json.dumps(config))
    name, path = next(
        (name, path) for path in sorted(source.glob("*.safetensors")) for name in load_file(path) if "down_proj" in name
        and "bias" not in name
    )  # fmt: skip
    tensors = load_file(path)
    tensors[name][3, 5, 7] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    assert f"{name}: expert 3 is not finite" in refused(source, out)
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or cut short" in refused(source, out)
    path.unlink()
    refused(source, out)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    tiny_model("qwen3_moe", None).save_pretrained(tmp_path / "b")
    arguments = ["quantize", str(tmp_path / "a"), "--output", str(tmp_path / "b")]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    assert "pass --overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--overwrite"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "8 tensors of experts" in said
    assert f"saved: {tmp_path / 'b'} after" in said
    assert slipstream.AutoModelForCausalLM.from_pretrained(tmp_path / "b").config.model_type == "gpt_oss"
