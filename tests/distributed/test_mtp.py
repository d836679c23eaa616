"""Multi-token prediction under FSDP2 and expert parallelism, against one process."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import slipstream
from slipstream.checkpoint import passthrough
from slipstream.train.recipe import Recipe
from slipstream.train.run import run
from tests.distributed.harness import run_ranks
from tests.distributed.test_export import weights
from tests.distributed.test_models import batches, distances_from_one_process
from tests.test_mtp import TYPES, make_checkpoint

WEIGHT, RATE = 0.3, 0.1


def load(folder: Path, setup: dict[str, Any] | None = None) -> Any:
    model = slipstream.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_setup=setup)
    return slipstream.train_mtp(model.train(), WEIGHT)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes a tiny checkpoint once, and beside it what one process gets for the mean over the ranks'
    batches: the loss, the gradients and the weights after a step."""
    root = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(model_type: str, modules: int, ranks: int) -> Path:
        folder = root / f"{model_type}-{modules}"
        if not folder.exists():
            make_checkpoint(folder, model_type, modules)
        if not (folder / f"after-{ranks}").exists():
            model = load(folder)
            loss = torch.stack([model(input_ids=ids, labels=ids).loss for ids in batches(ranks)]).mean()
            loss.backward()
            grads = {name: parameter.grad for name, parameter in model.named_parameters()}
            torch.save({"loss": loss.item(), "grads": grads}, folder / f"expected-{ranks}.pt")
            torch.optim.SGD(model.parameters(), lr=RATE).step()
            model.save_pretrained(folder / f"after-{ranks}")
        return folder

    return checkpoint


def step(folder: Path, output: Path, setup: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """One step of a plain loop, saved before and after; the loss's and each gradient's distance from one process."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    model = load(folder, setup)
    layers = model.mtp.layers
    assert all(isinstance(parameter, DTensor) for parameter in layers.parameters())
    assert sum(p.to_local().numel() for p in layers.parameters()) < 0.6 * sum(p.numel() for p in layers.parameters())
    model.save_pretrained(output / "before", max_shard_size="100KB")
    ids = batches(ranks)[rank]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(isinstance(p.grad, DTensor) for p in model.parameters() if p.grad is not None)
    found = distances_from_one_process(model, loss, folder)
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    model.save_pretrained(output / "after")
    return found


def steps(folder: Path, output: Path, setups: list[dict[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    return [step(folder, output / str(number), setup) for number, setup in enumerate(setups)]


LAYOUTS = [
    *((name, 1, 2, [{}, {"ep_size": 2}]) for name in TYPES),
    pytest.param(
        "deepseek_v3", 2, 4,
        [{"ep_size": 2, "activation_checkpointing": "full"}, {"ep_size": 2, "dp_replicate": 2}],
        marks=pytest.mark.slow,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "modules", "ranks", "setups"), LAYOUTS)
def test_loss_gradients_and_checkpoints(
    checkpoints: Any, tmp_path: Path, model_type: str, modules: int, ranks: int, setups: list[dict[str, Any]]
) -> None:
    folder = checkpoints(model_type, modules, ranks)
    for of_rank in run_ranks(steps, ranks, folder, tmp_path, setups, timeout=120):
        for loss, distances in of_rank:
            assert loss < 1e-5
            assert sum(name.startswith("mtp.") for name in distances) > 10
            far = {name: distance for name, distance in distances.items() if not distance < 1e-4}
            assert not far, far
    source, expected = load_file(folder / "model.safetensors"), weights(folder / f"after-{ranks}")
    assert expected.keys() == source.keys()
    for number in range(len(setups)):
        before, after = weights(tmp_path / f"{number}" / "before"), weights(tmp_path / f"{number}" / "after")
        assert before.keys() == after.keys() == source.keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in source.items())
        for name, tensor in expected.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def refusals(folder: Path) -> list[str]:
    """What is said of layouts that the modules can't have, and where one rank alone lacks their files."""
    said = []
    for config in (DistributedConfig(tp_size=2), DistributedConfig(fsdp_size=2, ep_size=2)):
        model = slipstream.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
        said.append(_refused(model))
    model = slipstream.AutoModelForCausalLM.from_pretrained(folder, distributed_setup={})
    if dist.get_rank() == 1:
        setattr(model, passthrough.KEPT, {})
    said.append(_refused(model))
    return said


def _refused(model: Any) -> str:
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="train_mtp") as error:
        slipstream.train_mtp(model)
    assert [name for name, _ in model.named_parameters()] == before
    return str(error.value)


def test_what_is_refused(checkpoints: Any) -> None:
    one, other = run_ranks(refusals, 2, checkpoints("glm4_moe", 1, 2))
    assert one == other
    assert "tensor parallelism (tp_size=2)" in one[0]
    assert "give slipstream.AutoModelForCausalLM.from_pretrained a distributed_setup" in one[1]
    assert "has no modules for multi-token prediction" in one[2]


def recipe_run(sections: dict[str, Any]) -> None:
    run(Recipe.model_validate(sections), file=io.StringIO())


def test_the_recipe_on_two_ranks(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "glm4_moe", vocab_size=512)
    rows = [{"text": f"{first} {second}"} for first in ("one", "two") for second in ("three four", "five six")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections: dict[str, Any] = {
        "model": {"name_or_path": str(tmp_path / "model"), "tokenizer": "bytes", "dtype": "float32"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32, "packing": False, "eval_fraction": 0},
    }
    train = {"max_steps": 2, "mtp_loss_weight": WEIGHT, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.5}
    saved = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        of_ranks = train | {"output_dir": str(output), "per_device_train_batch_size": 2 // ranks}
        run_ranks(recipe_run, ranks, sections | {"train": of_ranks, "distributed": {"ep_size": ranks}}, timeout=120)
        saved.append(weights(output))
    assert saved[0].keys() == saved[1].keys() == source.keys()
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch.equal(saved[1]["model.layers.4.eh_proj.weight"], source["model.layers.4.eh_proj.weight"])
