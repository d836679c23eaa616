"""Whole models under FSDP2 and expert parallelism, with Slipstream's exchange, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementationInterface

import slipstream
from slipstream import hf
from slipstream.optim import AdamW
from tests.distributed import stand_in_deep_ep
from tests.distributed.harness import run_ranks
from tests.tiny_models import tiny_batch, tiny_model

ARCHITECTURES = ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "mixtral", "olmoe"]
LAYOUTS = [(2, 2), (4, 4), (4, 2)]  # ranks, ep_size
LENGTHS = (32, 24, 40, 16)


def batches(ranks: int) -> list[torch.Tensor]:
    """A batch for each rank, of different lengths."""
    return [tiny_batch(1, LENGTHS[rank], seed=10 + rank) for rank in range(ranks)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that saves a tiny model of an architecture once, and beside it the loss and gradients that one
    process gets for the mean over the ranks' batches."""
    folder = tmp_path_factory.mktemp("models")

    def checkpoint(architecture: str, ranks: int) -> Path:
        path = folder / architecture
        model = tiny_model(architecture)
        if not path.exists():
            model.save_pretrained(path)
        if not (path / f"expected-{ranks}.pt").exists():
            losses = [model(input_ids=ids, labels=ids).loss for ids in batches(ranks)]
            loss = torch.stack(losses).mean()
            loss.backward()
            grads = {name: parameter.grad for name, parameter in model.named_parameters()}
            torch.save({"loss": loss.item(), "grads": grads}, path / f"expected-{ranks}.pt")
        return path

    return checkpoint


def _step(
    path: Path, ep_size: int, dispatcher: str, replicas: int, checkpointing: bool
) -> tuple[float, dict[str, float]]:
    """One forward and backward of a plain loop; the loss's and each gradient's distance from one process."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    transformers.logging.set_verbosity_error()
    if dispatcher == "deepep":
        stand_in_deep_ep.install()
    config = DistributedConfig(
        fsdp_size=ranks // replicas,
        dp_replicate_size=replicas,
        ep_size=ep_size,
        ep_implementation=f"slipstream_{dispatcher}",
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=config)
    model = slipstream.accelerate(model.train(), distributed_setup={"ep_size": ep_size})
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = batches(ranks)[rank]
    exchanged = _count_calls(EPImplementationInterface()[f"slipstream_{dispatcher}"])
    loss = model(input_ids=ids, labels=ids).loss
    assert len(exchanged) == len(list(hf.experts_modules(model))) > 0
    loss.backward()
    return distances_from_one_process(model, loss, path)


def distances_from_one_process(model: Any, loss: torch.Tensor, path: Path) -> tuple[float, dict[str, float]]:
    """The loss's, mean over the ranks, and each gradient's, from what `checkpoints` has left in `path`."""
    ranks = dist.get_world_size()
    expected = torch.load(path / f"expected-{ranks}.pt")
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    distances = {}
    for name, parameter in model.named_parameters():
        want = expected["grads"].pop(name)
        assert (want is None) == (parameter.grad is None), name
        if want is not None:
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            distances[name] = ((grad - want).abs().max() / want.abs().max().clamp(min=1e-6)).item()
    assert not expected["grads"], "every parameter of the one process is here too"
    return abs(mean.item() / ranks / expected["loss"] - 1), distances


def _count_calls(exchange: Any) -> list[None]:
    """A list that grows by one with every dispatch through `exchange`."""
    calls: list[None] = []
    original = exchange.dispatcher_class.dispatch

    def counted(*args: Any) -> Any:
        calls.append(None)
        return original(*args)

    exchange.dispatcher_class.dispatch = counted
    return calls


def _check(
    path: Path, ranks: int, ep_size: int, dispatcher: str, replicas: int = 1, checkpointing: bool = False
) -> None:
    for loss, distances in run_ranks(_step, ranks, path, ep_size, dispatcher, replicas, checkpointing):
        assert loss < 1e-5
        assert len(distances) > 10
        far = {name: distance for name, distance in distances.items() if not distance < 1e-4}
        assert not far, far


@pytest.mark.parametrize(("ranks", "ep_size"), LAYOUTS)
@pytest.mark.parametrize(
    ("architecture", "dispatcher"),
    [
        *((name, "all_to_all") for name in ARCHITECTURES),
        *((name, "all_gather") for name in ARCHITECTURES[:2]),
        *(pytest.param(name, "all_gather", marks=pytest.mark.slow) for name in ARCHITECTURES[2:]),
    ],
)
def test_loss_and_every_gradient(
    checkpoints: Any, architecture: str, ranks: int, ep_size: int, dispatcher: str
) -> None:
    _check(checkpoints(architecture, ranks), ranks, ep_size, dispatcher)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_two_replicas(checkpoints: Any, architecture: str) -> None:
    _check(checkpoints(architecture, 4), 4, 2, "all_to_all", replicas=2)


def test_loss_and_every_gradient_through_deepep(checkpoints: Any) -> None:
    _check(checkpoints("qwen3_moe", 2), 2, 2, "deepep")


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather", "deepep"])
def test_gradient_checkpointing(checkpoints: Any, dispatcher: str) -> None:
    _check(checkpoints("qwen3_moe", 4), 4, 2, dispatcher, checkpointing=True)


def _load_with_tensor_parallelism(path: Path) -> str:
    config = DistributedConfig(tp_size=2, fsdp_size=1, ep_size=2, ep_implementation="slipstream_all_to_all")
    with pytest.raises(ValueError, match="tp_size=2") as error:
        transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
    return str(error.value)


def test_tensor_parallelism_is_refused(checkpoints: Any) -> None:
    said = run_ranks(_load_with_tensor_parallelism, 2, checkpoints("qwen3_moe", 2))
    assert all("tp_size=1" in message for message in said)


def _in_bf16(path: Path, out: Path | None) -> tuple[float, float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A clipped step in bf16: the loss, the norm, and the gradients and new values of what stays in fp32."""
    transformers.logging.set_verbosity_error()
    spread = out is not None
    model: Any = slipstream.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, distributed_setup={"ep_size": 2} if spread else None
    ).train()
    given = batches(2)[dist.get_rank() :][:1] if spread else batches(2)
    losses = [model(input_ids=ids, labels=ids).loss for ids in given]
    loss = torch.stack(losses).mean()
    loss.backward()
    whole = {name: parameter for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    grads = {name: parameter.grad.clone() for name, parameter in whole.items() if parameter.grad is not None}
    norm = slipstream.clip_grad_norm_(model.parameters(), 1.0)
    AdamW(model.parameters(), lr=1e-3).step()
    if out is not None:
        model.save_pretrained(out)
    return loss.item(), float(norm), grads, {name: parameter.detach().clone() for name, parameter in whole.items()}


@pytest.mark.parametrize("architecture", ["ernie4_5_moe", "deepseek_v4"])
def test_what_stays_in_fp32(architecture: str, tmp_path: Path) -> None:
    """FSDP2 takes one dtype in a unit: these lie whole on each rank."""
    tiny_model(architecture).save_pretrained(tmp_path / "model")
    _, norm, grads, _ = _in_bf16(tmp_path / "model", None)
    (_, first_norm, first, values), (_, second_norm, second, others) = run_ranks(
        _in_bf16, 2, tmp_path / "model", tmp_path / "saved"
    )
    assert grads
    assert first.keys() == second.keys() == grads.keys()
    size = max(grad.abs().max().item() for grad in grads.values())
    for name, grad in grads.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - grad).abs().max() <= 0.05 * size, name
    assert first_norm == second_norm == pytest.approx(norm, rel=0.05)
    saved = slipstream.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    for name, value in values.items():
        assert torch.equal(value, others[name]), name
        assert torch.equal(value, saved.get_parameter(name)), name
