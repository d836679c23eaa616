"""Quantised checkpoints load as the plain ones that they stand for, whole and split over ranks."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import slipstream
from slipstream.checkpoint import dequantize
from tests.distributed.harness import run_ranks
from tests.test_mtp import make_checkpoint
from tests.tiny_models import tiny_batch, tiny_model

BLOCK = 24  # divides neither the widths nor the ranks' parts of them


def _fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 values, a scale a block, and what they stand for."""
    rows, columns = (torch.arange(size) // BLOCK for size in weight.shape)
    scale = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) * 0.01 + 0.001
    spread = scale[rows][:, columns]
    quantised = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return quantised, scale, quantised.float() * spread


def _quantise(folder: Path, model_type: str, *, made: bool = False) -> dict[str, torch.Tensor]:
    """Leave a tiny quantised checkpoint, or make one of what is there; what it stands for, by name."""
    if not made:
        tiny_model(model_type, None).save_pretrained(folder)
    tensors, stored, meant = load_file(folder / "model.safetensors"), {}, {}
    config = json.loads((folder / "config.json").read_text())
    for name, tensor in tensors.items():
        if model_type == "gpt_oss" and name.endswith(("gate_up_proj", "down_proj")):
            experts, into, out = tensor.shape
            blocks = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 126, (experts, out, into // 32), dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            # Transformers' own, which lays experts out as [E, in, out] too.
            meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        elif model_type != "gpt_oss" and "_proj" in name and tensor.ndim == 2:
            stored[name], stored[f"{name}_scale_inv"], meant[name] = _fp8(tensor)
        else:
            stored[name] = meant[name] = tensor
    method = {"quant_method": "mxfp4"} if model_type == "gpt_oss" else {
        "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


def _load_and_save(source: Path, target: Path, setup: dict[str, Any] | None) -> float:
    kwargs = {} if setup is None else {"distributed_setup": setup}
    model, info = slipstream.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True, **kwargs
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not hasattr(model.config, "quantization_config")
    assert model.config.name_or_path == str(source)
    model.save_pretrained(target)
    ids = tiny_batch(1, 16)
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


@pytest.mark.parametrize(
    ("model_type", "setup"),
    [("deepseek_v3", None), ("deepseek_v3", {"ep_size": 2}), ("gpt_oss", None), ("gpt_oss", {"ep_size": 2})],
)
def test_loads_what_it_stands_for(tmp_path: Path, model_type: str, setup: dict[str, Any] | None) -> None:
    meant = _quantise(tmp_path / "a", model_type)
    if setup is None:
        losses = [_load_and_save(tmp_path / "a", tmp_path / "b", None)]
    else:
        losses = run_ranks(_load_and_save, 2, tmp_path / "a", tmp_path / "b", setup)
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved.keys() == meant.keys()
    for name, tensor in meant.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-6, atol=0, msg=name)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    ids = tiny_batch(1, 16)
    assert losses == pytest.approx([plain(input_ids=ids, labels=ids).loss.item()] * len(losses), rel=1e-5)


def test_parts_are_parts_of_the_whole(tmp_path: Path) -> None:
    for model_type in ("deepseek_v3", "gpt_oss"):
        meant = _quantise(tmp_path / model_type, model_type)
        with ExitStack() as stack:
            block = (BLOCK, BLOCK)
            found = dequantize.open_plain(str(tmp_path / model_type), {}, block, torch.float32, stack)
            assert found.keys() == meant.keys()
            for name, tensor in meant.items():
                if not isinstance(found[name], dequantize.Fp8Slice | dequantize.Mxfp4Slice):
                    continue
                assert found[name].get_shape() == list(tensor.shape)
                for part in ((slice(1, 5),), (slice(0, None), slice(7, 23)), (slice(3, 3),)):
                    torch.testing.assert_close(found[name][part], tensor[part], rtol=1e-6, atol=0)
                torch.testing.assert_close(found[name][...], tensor, rtol=1e-6, atol=0)


def _slice(folder: Path, weight: torch.Tensor, scale: torch.Tensor, block: list[int] | None) -> Any:
    save_file({"w": weight, "w_scale_inv": scale}, folder / "model.safetensors")
    config = transformers.PreTrainedConfig(quantization_config={"quant_method": "fp8", "weight_block_size": block})
    stack = ExitStack()
    return dequantize.open_plain(str(folder), {}, dequantize.block_of(config), torch.float32, stack)["w"]


@pytest.mark.parametrize("of", [(), (1,), (1, 1), (200, 1), (1, 300), (3, 200, 1), (3, 1, 1), (1, 1, 300)])
def test_without_blocks_scales_are_broadcast(of: tuple[int, ...], tmp_path: Path) -> None:
    shape = (3, 200, 300) if len(of) == 3 else (200, 300)
    weight, scale = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(of) + 0.1
    found, meant = _slice(tmp_path, weight, scale, None), weight.float() * scale
    assert torch.equal(found[...], meant)
    for part in (slice(1, 2), slice(0, 0)), (slice(1, 3), slice(7, 150)), (slice(2, 3), slice(130, 140), slice(1, 9)):
        assert torch.equal(found[part[: len(shape)]], meant[part[: len(shape)]])


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    weight = torch.zeros(200, 300).to(torch.float8_e4m3fn)
    assert not _slice(tmp_path, weight, torch.ones(1, 1), [128, 128])[...].any()
    for of, block in (((2, 2), [128, 128]), ((200, 1), [128, 128]), ((200,), None), ((2, 3), None)):
        with pytest.raises(ValueError, match=r"w_scale_inv is \[.*\] for a weight of \[200, 300\].*weight_block_size"):
            _slice(tmp_path, weight, torch.ones(of), block)


def test_multi_token_prediction_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a", "deepseek_v3")
    meant = _quantise(tmp_path / "a", "deepseek_v3", made=True)
    for number, trains in enumerate((False, True)):
        model = slipstream.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
        if trains:
            slipstream.train_mtp(model)
        model.save_pretrained(tmp_path / str(number))
        saved = load_file(tmp_path / str(number) / "model.safetensors")
        assert saved.keys() == meant.keys()
        assert all(torch.allclose(saved[name], tensor, rtol=1e-6, atol=0) for name, tensor in meant.items())


def test_only_what_is_known_is_dequantised(tmp_path: Path) -> None:
    config = tiny_model("llama").config
    assert dequantize.method_of(config) is None
    config.quantization_config = {"quant_method": "gptq"}
    assert dequantize.method_of(config) is None
    config.quantization_config = {"quant_method": "fp8"}
    assert dequantize.method_of(config) == "fp8"
    assert dequantize.block_of(config) == (128, 128)
    with pytest.raises(ValueError, match="has to be in safetensors"), ExitStack() as stack:
        dequantize.open_plain(str(tmp_path), {}, (128, 128), torch.float32, stack)
