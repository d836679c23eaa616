"""The one-import API over several ranks against one process: loading, random weights, gradients, steps, clipping."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as Transformers
from transformers.distributed import DistributedConfig

import slipstream.deferred_logits
import slipstream.loss
from slipstream import AutoModelForCausalLM, clip_grad_norm_, hf
from slipstream.compilation import compile_layers
from slipstream.coverage.compare import worst_gradient
from tests.distributed.harness import run_ranks
from tests.tiny_models import tiny_batch, tiny_config, tiny_model

MODELS = ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "mixtral", "olmoe"]
SETUPS = {
    "fsdp 4, ep 4": (4, {"ep_size": 4}),
    "fsdp 4, ep 2": (4, {"ep_size": 2}),
    "2 replicas, ep 2": (4, {"ep_size": 2, "dp_replicate": 2}),
    "fsdp 2": (2, {}),
    "ddp 2": (2, {"strategy": "ddp"}),
}
STEPS = 3


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch_of(step: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a step; some labels are masked, the same number in each row, so that a mean of means is the mean."""
    ids = tiny_batch(batch=4, length=16, seed=10 + step)
    labels = ids.clone()
    labels[:, :3] = -100
    return ids, labels


def train(model: Any, clip: Any, rank: int = 0, ranks: int = 1) -> tuple[list[float], list[float], dict, dict]:
    """Losses, gradient norms, the first step's gradients, and the weights after three clipped steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses, norms, first = [], [], {}
    for step in range(STEPS):
        ids, labels = (part.chunk(ranks)[rank] for part in batch_of(step, ranks))
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        if step == 0:
            first = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        norms.append(float(clip(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
    return losses, norms, first, {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def refuse(logits: Any) -> Any:
    raise AssertionError("logits that nobody reads were computed")


def worker(folder: str, setup: dict[str, Any], backend: dict[str, Any] | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, backend=backend).train()
    assert slipstream.describe(model)["loss"].chosen == "fused"
    with mock.patch.object(slipstream.deferred_logits.DeferredLogits, "materialize", refuse):
        return train(model, clip_grad_norm_, dist.get_rank(), dist.get_world_size())


def worst(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert got.keys() == expected.keys()
    return worst_gradient(got, expected)


def compare(got: Any, expected: Any) -> None:
    losses, norms, grads, weights = got
    assert losses == pytest.approx(expected[0], rel=1e-4)
    assert norms == pytest.approx(expected[1], rel=1e-4)
    for actual, reference in ((grads, expected[2]), (weights, expected[3])):
        error, name = worst(actual, reference)
        assert error <= 1e-4, (name, error)


def compiled_worker(folder: str, setup: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup).train()
    compile_layers(model, "aot_eager")
    return train(model, clip_grad_norm_, dist.get_rank(), dist.get_world_size())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def reference(checkpoints: Path, model_type: str) -> tuple[str, Any]:
    folder = checkpoints / model_type
    if not folder.exists():
        tiny_model(model_type, None).save_pretrained(folder)
    model = Transformers.from_pretrained(folder, experts_implementation="eager").train()
    return str(folder), train(model, torch.nn.utils.clip_grad_norm_)


@pytest.mark.parametrize("model_type", MODELS)
def test_three_clipped_steps(checkpoints: Path, model_type: str) -> None:
    folder, expected = reference(checkpoints, model_type)
    compare(run_ranks(worker, 4, folder, {"ep_size": 2})[0], expected)


@pytest.mark.long
@pytest.mark.parametrize(
    "setup",
    [
        pytest.param({"ep_size": 2, "activation_checkpointing": "full"}, id="ep"),
        pytest.param({}, id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers(checkpoints: Path, setup: dict[str, Any]) -> None:
    folder, expected = reference(checkpoints, "qwen3_moe")
    compare(run_ranks(compiled_worker, 2, folder, setup)[0], expected)


@pytest.mark.parametrize("name", SETUPS)
def test_layouts(checkpoints: Path, name: str) -> None:
    ranks, setup = SETUPS[name]
    folder, expected = reference(checkpoints, "qwen3_moe")
    compare(run_ranks(worker, ranks, folder, setup)[0], expected)


@pytest.mark.parametrize(
    "extra",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"reshard_after_forward": True},
        {"param_dtype": "float32", "reduce_dtype": "float32"},
    ],
    ids=lambda extra: next(iter(extra.items())).__repr__(),
)
def test_options(checkpoints: Path, extra: dict[str, Any]) -> None:
    folder, expected = reference(checkpoints, "qwen3_moe")
    compare(run_ranks(worker, 2, folder, {"ep_size": 2, **extra})[0], expected)


@pytest.mark.parametrize("dispatcher", ["all_gather", "all_to_all"])
def test_dispatchers(checkpoints: Path, dispatcher: str) -> None:
    folder, expected = reference(checkpoints, "gpt_oss")
    compare(run_ranks(worker, 4, folder, {"ep_size": 4}, {"dispatcher": dispatcher})[0], expected)


def random_weights(model_type: str, setup: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(dist.get_rank())  # rank 0's seed decides
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), distributed_setup=setup)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return {name: full(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h", "llama"])
def test_random_weights_are_those_of_one_process(model_type: str) -> None:
    torch.manual_seed(0)
    expected = Transformers.from_config(tiny_config(model_type)).state_dict()
    setup = {} if model_type == "llama" else {"ep_size": 2}
    for ranks in (2, 4):
        got = run_ranks(random_weights, ranks, model_type, setup)[0]
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())


def uneven(folder: str, setup: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup).train()
    for _, experts in hf.experts_modules(model):
        assert all(parameter.to_local().numel() for parameter in experts.parameters() if parameter.ndim == 3)
    return train(model, clip_grad_norm_, dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize(
    ("model_type", "experts", "setup"),
    [("qwen3_moe", 5, {}), ("qwen3_moe", 2, {"ep_size": 2}), ("gpt_oss", 5, {}), ("nemotron_h", 2, {"ep_size": 2})],
)
def test_more_ranks_than_experts_to_shard(tmp_path: Path, model_type: str, experts: int, setup: dict) -> None:
    """5 experts over 4 ranks that hold the same ones, 1 over 2: by expert the last rank would have none."""
    name = "n_routed_experts" if model_type == "nemotron_h" else "num_local_experts"
    groups = {"n_group": 1, "topk_group": 1} if model_type == "nemotron_h" else {}
    tiny_model(model_type, None, **{name: experts}, **groups).save_pretrained(tmp_path)
    expected = train(
        Transformers.from_pretrained(tmp_path, experts_implementation="eager").train(), torch.nn.utils.clip_grad_norm_
    )
    compare(run_ranks(uneven, 4, str(tmp_path), setup)[0], expected)


def exchanges(folder: str, mode: str) -> int:
    """All-to-alls of one forward and backward."""
    setup = {"ep_size": 2, "activation_checkpointing": mode}
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup).train()
    calls = []
    original = dist.all_to_all_single
    dist.all_to_all_single = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    ids, labels = (part.chunk(2)[dist.get_rank()] for part in batch_of(0, 2))
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    return len(calls)


def test_selective_checkpointing_repeats_no_exchange(checkpoints: Path) -> None:
    folder, _ = reference(checkpoints, "qwen3_moe")
    counts = {mode: run_ranks(exchanges, 2, folder, mode)[0] for mode in ("none", "selective", "full")}
    assert counts["selective"] == counts["none"] < counts["full"]


def buffers(folder: str) -> list[bool]:
    """Whether FSDP2 holds what it gathered weights in, at each loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_setup={}).train()
    found = []
    fused = slipstream.loss.linear_cross_entropy

    def looking(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(model._get_fsdp_state()._comm_ctx.all_gather_state is not None)
        return fused(*args, **kwargs)

    slipstream.loss.linear_cross_entropy = looking  # type: ignore[assignment]
    for step in range(2):
        ids, labels = (part.chunk(2)[dist.get_rank()] for part in batch_of(step, 2))
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    return found


def test_the_loss_has_the_memory_that_the_head_was_gathered_in(checkpoints: Path) -> None:
    folder, _ = reference(checkpoints, "qwen3_moe")
    assert run_ranks(buffers, 2, folder) == [[False, False]] * 2


def accumulated(folder: str, setup: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of two micro-batches, added up."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup).train()
    for step in range(2):
        ids, labels = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in batch_of(step, 1))
        (model(input_ids=ids, labels=labels, use_cache=False).loss / 2).backward()
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_accumulation(checkpoints: Path) -> None:
    folder, _ = reference(checkpoints, "qwen3_moe")
    model = Transformers.from_pretrained(folder, experts_implementation="eager").train()
    for step in range(2):
        ids, labels = batch_of(step, 1)
        (model(input_ids=ids, labels=labels, use_cache=False).loss / 2).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for setup in ({"ep_size": 2}, {"ep_size": 4}):
        error, name = worst(run_ranks(accumulated, 4, folder, setup)[0], expected)
        assert error <= 1e-4, (setup, name, error)


def host_memory(folder: str) -> tuple[float, float]:
    """Bytes that loading added to this process's own memory at its peak, and bytes of its shards."""
    import threading

    def owned() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    before, peak, stop = owned(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], owned())

    thread = threading.Thread(target=watch)
    thread.start()
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_setup={"ep_size": 4})
    stop.set()
    thread.join()
    shards = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    return max(peak[0], owned()) - before, shards


def test_a_rank_reads_only_its_share(tmp_path: Path) -> None:
    """128 MB of weights on 4 ranks: a rank that read all of them would hold four times its share."""
    sizes = {"num_experts": 64, "moe_intermediate_size": 256, "hidden_size": 160, "num_hidden_layers": 4}
    model = tiny_model("qwen3_moe", None, **sizes)
    total = sum(p.numel() * 4 for p in model.parameters())
    assert total > 100e6
    model.save_pretrained(tmp_path)
    del model
    for peak, shards in run_ranks(host_memory, 4, str(tmp_path)):
        assert shards < 0.3 * total
        assert peak < shards + 40e6, (peak, shards)


def stock_clip(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_setup={"ep_size": 2}).train()
    assert len({parameter.device_mesh for parameter in model.parameters()}) == 1
    return train(model, lambda *args: full(torch.nn.utils.clip_grad_norm_(*args)), dist.get_rank(), 2)


def test_pytorchs_own_clipping_where_every_expert_has_one_owner(checkpoints: Path) -> None:
    folder, expected = reference(checkpoints, "qwen3_moe")
    compare(run_ranks(stock_clip, 2, folder)[0], expected)


def tensor_parallel(folder: str) -> tuple[float, dict[str, torch.Tensor], str]:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_setup={"tp_size": 2}).train()
    ids, labels = batch_of(0, 1)  # the ranks of a tensor-parallel group share a batch
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    grads = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads, slipstream.describe(model)["experts"].chosen


def test_tensor_parallelism_by_transformers_plan(checkpoints: Path) -> None:
    folder, expected = reference(checkpoints, "qwen3_moe")
    loss, grads, experts = run_ranks(tensor_parallel, 2, folder)[0]
    assert loss == pytest.approx(expected[0][0], rel=1e-5)
    assert worst(grads, expected[2])[0] <= 1e-4
    assert experts == "slipstream"


def transformers_own(folder: str) -> Any:
    config = DistributedConfig(fsdp_size=4, ep_size=2, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()
    return train(model, clip_grad_norm_, dist.get_rank(), 4)


def test_transformers_own_distributed_config_is_left_to_it(checkpoints: Path) -> None:
    folder, expected = reference(checkpoints, "qwen3_moe")
    compare(run_ranks(transformers_own, 4, folder)[0], expected)
