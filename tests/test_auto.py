"""The one-import API behaves as Transformers' class of that name, and says what it did."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

import slipstream
from slipstream import AutoModelForCausalLM, BackendConfig
from tests.tiny_models import tiny_batch, tiny_config, tiny_model


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "llama"])
def checkpoint(request, tmp_path):
    tiny_model(request.param, None).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_same_class_and_config(checkpoint) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    ours = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert issubclass(AutoModelForCausalLM, transformers.AutoModelForCausalLM)
    assert type(ours) is type(plain)
    assert isinstance(ours, transformers.PreTrainedModel)
    assert ours.config.to_dict() == plain.config.to_dict()
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_save_and_reload_in_transformers(checkpoint, tmp_path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(checkpoint)
    ours.save_pretrained(tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "saved")]
    assert configs[0] == configs[1]
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = tiny_batch()
    torch.testing.assert_close(reloaded(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)


def test_generate(checkpoint) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ours = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = tiny_batch(length=6)
    assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))


def test_every_keyword_reaches_transformers(checkpoint) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not info["missing_keys"]


def test_experts_implementation_asked_of_transformers_is_kept() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), experts_implementation="eager")
    report = slipstream.describe(model)
    assert (report["experts"].chosen, report["experts"].why) == ("eager", "asked for")


def test_from_config_leaves_the_config_alone() -> None:
    config = tiny_config("qwen3_moe")
    before = copy.deepcopy(config.__dict__)
    AutoModelForCausalLM.from_config(config)
    assert config.__dict__ == before


def test_gradient_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = slipstream.accelerate(tiny_model("qwen3_moe", None))
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = tiny_batch()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_accelerate_twice_changes_nothing() -> None:
    model = slipstream.accelerate(tiny_model("mixtral", None))
    loss_function, report = model.loss_function, slipstream.describe(model)
    assert slipstream.accelerate(model) is model
    assert slipstream.accelerate(model, backend=BackendConfig()) is model
    assert model.loss_function is loss_function
    assert slipstream.describe(model) == report
    with pytest.raises(ValueError, match="accelerated already"):
        slipstream.accelerate(model, backend={"loss": "transformers"})


def test_accelerate_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="takes a Transformers model"):
        slipstream.accelerate(torch.nn.Linear(2, 2))


def test_describe() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("gpt_oss"))
    report = slipstream.describe(model)
    assert "interleaved gate and up, transposed, biases, silu clamped at 7" in report["experts"].why
    assert report["attn"].chosen == "eager"
    assert "GptOssForCausalLM" in str(report)
    assert "[gate; up]" in str(slipstream.describe(AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))))
    assert json.loads(json.dumps(report.as_dict()))["model_class"] == "GptOssForCausalLM"
    with pytest.raises(ValueError, match="was not accelerated"):
        slipstream.describe(tiny_model("llama", None))


def test_balanced_gate_warns_and_spreads_tokens() -> None:
    with pytest.warns(UserWarning, match="meaningless"):
        model = slipstream.accelerate(tiny_model("qwen3_moe", None), backend={"gate": "balanced"})
    ids = tiny_batch()
    model(input_ids=ids, labels=ids).loss.backward()
    touched = [p.grad.flatten(1).abs().amax(1) for n, p in model.named_parameters() if n.endswith("down_proj")]
    assert all((grad > 0).all() for grad in touched)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ({"attn": "te"}, r"attn='te'.*use one of 'auto', 'sdpa'"),
        ({"speed": "high"}, "no field 'speed'; it has attn"),
        ({"loss": 3}, "loss=3"),
        ({"gate": "balanced", "experts": "transformers"}, "works with experts='slipstream' or 'fp8'"),
    ],
)
def test_bad_backend(backend, message) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(tiny_config("llama"), backend=backend)


def test_backend_whose_package_is_missing() -> None:
    with pytest.raises(ImportError, match=r"needs the package 'flash_attn'.*or use one of 'auto', 'sdpa'"):
        BackendConfig(attn="flash_attention_2")


def test_backend_that_does_not_fit_the_model() -> None:
    with pytest.raises(ValueError, match="a dense model"):
        slipstream.accelerate(tiny_model("llama", None), backend={"experts": "slipstream"})


def test_missing_checkpoint(tmp_path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_damaged_checkpoint(tmp_path) -> None:
    tiny_model("llama", None).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(OSError, match="damaged or cut short"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_import_is_light() -> None:
    """No torch, no optional package, no CUDA at import; the names resolve later."""
    code = (
        "import sys, time; start = time.perf_counter(); import slipstream; took = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert took < 1, took\n"
        "assert set(slipstream.__all__) <= set(dir(slipstream))\n"
        "import slipstream.acceleration, torch\n"
        "assert callable(slipstream.accelerate) and callable(slipstream.describe)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'trl', 'peft', 'datasets', 'deep_ep', 'liger_kernel'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'fast'"):
        slipstream.fast  # noqa: B018
