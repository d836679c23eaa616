"""Expert parallelism on two GPUs over NCCL in bf16, at Qwen3-30B-A3B's layer shapes, against one GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as Transformers
from transformers import Qwen3MoeConfig

from slipstream import AutoModelForCausalLM, GraphedStep, clip_grad_norm_
from slipstream.adapters import all_experts
from tests.distributed.harness import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def layer_shapes() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=4, num_experts=128,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts_per_tok=8, use_cache=False,
    )  # fmt: skip


def batch(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 151936, (1, 1024), generator=generator).cuda()


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    # The uniform gate, so that no token changes its expert for a rounding error.
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            layer_shapes(), dtype=torch.bfloat16, backend={"gate": "balanced", **options.pop("backend", {})}, **options
        )
    return model.train()


def against_one_gpu(setup: dict[str, Any], dispatcher: str) -> tuple[float, float, str]:
    """Relative error of the loss, and the largest of the gradients' (in the 2-norm) with its name."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plain = build()
    losses = []
    for index in range(ranks):
        loss = plain(input_ids=batch(index), labels=batch(index)).loss / ranks
        loss.backward()
        losses.append(loss.item())
    model = build(distributed_setup=setup, backend={"dispatcher": dispatcher})
    loss = model(input_ids=batch(rank), labels=batch(rank)).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    errors = {}
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(parameter.grad, DTensor)
        grad, expected = parameter.grad.full_tensor().float(), reference.grad.float()
        errors[name] = ((grad - expected).norm() / expected.norm()).item()
    name = max(errors, key=lambda key: errors[key])
    norm = clip_grad_norm_(model.parameters(), 1.0)
    assert torch.isfinite(norm)
    return abs(mean.item() / ranks / sum(losses) - 1), errors[name], name


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather", "nvlink"])
def test_loss_and_gradients(dispatcher: str) -> None:
    for loss_error, grad_error, name in run_ranks(
        against_one_gpu, 2, {"ep_size": 2}, dispatcher, timeout=180, backend="nccl"
    ):
        assert loss_error < 1e-3
        assert grad_error < 3e-2, name


def graphed(adapters: bool, checkpointing: str) -> tuple[list[float], list[float], int]:
    """Losses of eager steps and of steps that become CUDA graphs, two micro-batches each; how many graphs there are."""
    found = []
    for graphs in (False, True):
        setup = {"ep_size": 2, "activation_checkpointing": checkpointing}
        model = build(distributed_setup=setup, backend={"dispatcher": "nvlink"})
        if adapters:
            torch.manual_seed(1)
            lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], target_parameters=all_experts(model))
            model = get_peft_model(model, lora)
        step = GraphedStep(model) if graphs else None
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, foreach=False)
        losses = []
        for _ in range(6):
            for micro in range(2):
                ids = batch(2 * micro + dist.get_rank())
                inputs = {"input_ids": ids, "labels": ids}
                if step is None:
                    loss = model(**inputs).loss
                    loss.backward()
                else:
                    loss = step(inputs)
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        found.append(losses)
    assert step is not None
    return found[0], found[1], len(step._captured)


@pytest.mark.parametrize(
    ("adapters", "checkpointing"),
    [(False, "none"), (True, "none"), (False, "full")],
    ids=["full", "lora", "recomputed"],
)
def test_cuda_graphs_train_as_eager_steps_do(adapters: bool, checkpointing: str) -> None:
    for eager, replayed, graphs in run_ranks(graphed, 2, adapters, checkpointing, timeout=180, backend="nccl"):
        assert graphs == (0 if checkpointing == "full" else 2)
        assert replayed == pytest.approx(eager, rel=2e-3)
        assert adapters or eager[-1] < eager[1] - 0.1  # it trains


def saved(folder: str) -> dict[str, torch.Tensor]:
    model = build(distributed_setup={"ep_size": 2}, backend={"dispatcher": "all_to_all"})
    model.save_pretrained(folder, max_shard_size="1GB")
    weight = model.model.layers[2].mlp.experts.down_proj.full_tensor()
    return {"down": weight[100].cpu(), "head": model.lm_head.weight.full_tensor()[:8].cpu()}


def test_save_and_reload_in_transformers(tmp_path: Path) -> None:
    expected = run_ranks(saved, 2, str(tmp_path), timeout=180, backend="nccl")[0]
    plain = Transformers.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(plain.model.layers[2].mlp.experts.down_proj[100], expected["down"])
    assert torch.equal(plain.lm_head.weight[:8], expected["head"])
