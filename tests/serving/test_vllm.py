"""What Slipstream saves, served by vLLM: prompt log-probabilities as Transformers computes them.

`make test-serving` makes vLLM's own environment and runs this; elsewhere it is skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

from tests.train.tiny_chat import make_tokenizer, write_recipe

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("SLIPSTREAM_SERVING_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="no SLIPSTREAM_SERVING_PYTHON: run make test-serving")

BOUNDS = {"float32": 1e-3, "bfloat16": 2e-2}
RANK = 8


def checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Qwen3-MoE of widths that vLLM's CPU kernels take, its weights large enough that experts matter."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4,
        num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=128, tie_word_embeddings=False,
        initializer_range=0.06, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def slipstream(*arguments: str) -> None:
    command = [sys.executable, "-m", "slipstream.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base; all its weights fine-tuned on two ranks with EP = 2; an adapter made so; and that one merged."""
    root = tmp_path_factory.mktemp("made")
    base = checkpoint(root / "base", make_tokenizer())
    train = {"max_steps": 6, "learning_rate": 0.003, "per_device_train_batch_size": 2}
    two = ["distributed.ep_size=2", "--nproc", "2"]
    for name, lora in (("tuned", {}), ("adapter", {"r": RANK, "target_modules": ["q_proj", "v_proj"]})):
        (root / name).mkdir()
        sections = {"lora": {**lora, "target_parameters": "all-experts", "use_rslora": True}} if lora else {}
        slipstream("finetune", str(write_recipe(root / name, base, train=train, **sections)), *two)
    folders = {"base": base, "tuned": root / "tuned" / "out", "adapter": root / "adapter" / "out"}
    slipstream("merge", str(folders["adapter"]), "--into", str(base), "--output", str(root / "merged"), "--verify")
    return {**folders, "merged": root / "merged"}


@pytest.fixture(scope="module")
def prompts(made: dict[str, Path]) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(made["base"])
    texts = ["What comes after one? After one comes the end.", "Be brief. Sure? 3 Yes, 3 times.", "the end of it all"]
    return [tokenizer(text)["input_ids"] for text in texts]


@torch.no_grad()
def expected(folder: Path, dtype: str, prompts: list[list[int]], adapter: Path | None = None) -> torch.Tensor:
    """Log-probabilities of all prompts' tokens but their first, in one row."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    rows = []
    for ids in prompts:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        rows.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return torch.cat(rows)


def served(folder: Path, dtype: str, prompts: list[list[int]], job: Path, adapter: Path | None = None) -> torch.Tensor:
    given = {"model": str(folder), "dtype": dtype, "prompts": prompts, "adapter": adapter and str(adapter)}
    job.write_text(json.dumps({**given, "rank": RANK}))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(PYTHON), str(ROOT / "scripts" / "vllm_logprobs.py"), str(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    result = json.loads(Path(f"{job}.out").read_text())
    print(result["versions"])
    return torch.tensor([value for row in result["logprobs"] for value in row])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ["tuned", "merged"])
def test_checkpoints(name: str, dtype: str, made: dict[str, Path], prompts: Any, tmp_path: Path) -> None:
    ours = expected(made[name], dtype, prompts)
    assert (ours - expected(made["base"], dtype, prompts)).abs().max() > 10 * BOUNDS[dtype]
    distance = (served(made[name], dtype, prompts, tmp_path / "job.json") - ours).abs()
    print(f"{name}, {dtype}: largest distance {distance.max():.1e}, mean {distance.mean():.1e}")
    assert distance.max() < BOUNDS[dtype]


@pytest.mark.xfail(reason="vLLM 0.32 multiplies by experts' adapters in Triton alone, which needs a GPU", strict=True)
def test_the_adapter_itself(made: dict[str, Path], prompts: Any, tmp_path: Path) -> None:
    ours = expected(made["base"], "float32", prompts, made["adapter"])
    found = served(made["base"], "float32", prompts, tmp_path / "job.json", made["adapter"])
    print(f"adapter, float32: largest distance {(found - ours).abs().max():.1e}")
    assert (found - ours).abs().max() < BOUNDS["float32"]
