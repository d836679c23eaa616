"""An embedding whose rows lie on several ranks for good, against one process and against FSDP2's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as Transformers

from slipstream import AutoModelForCausalLM, clip_grad_norm_
from slipstream.optim import AdamW
from slipstream.parallel import embedding
from tests.distributed.harness import run_ranks
from tests.distributed.test_models import batches, checkpoints, distances_from_one_process  # noqa: F401
from tests.tiny_models import tiny_batch, tiny_config, tiny_model


def spread(path: Any, **options: Any) -> Any:
    """A tiny model with a tiny vocabulary, whose embedding is spread all the same."""
    embedding.USUAL_TOKENS = 1
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_setup=options)
    assert model.get_input_embeddings().forward.__func__ is embedding.forward
    return model.train()


def step(path: Path, ep_size: int) -> tuple[float, dict[str, float], int]:
    model = spread(path, ep_size=ep_size)
    ids = batches(dist.get_world_size())[dist.get_rank()]  # of another length on each rank
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    weight = model.get_input_embeddings().weight
    return *distances_from_one_process(model, loss, path), weight.to_local().shape[0]


@pytest.mark.parametrize(("ranks", "ep_size"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_loss_and_gradients(checkpoints: Any, architecture: str, ranks: int, ep_size: int) -> None:  # noqa: F811
    path = checkpoints(architecture, ranks)
    words = 0
    for loss_error, distances, rows in run_ranks(step, ranks, path, ep_size):
        assert loss_error < 1e-5
        assert max(distances.values()) < 1e-3, max(distances, key=lambda name: distances[name])
        words += rows
    assert words == tiny_config(architecture).vocab_size


def trained(path: Path, folder: Path, usual: int) -> tuple[list[float], float]:
    """Losses of a plain loop with accumulation, clipping and our AdamW; what it saves in `folder`; a held-out loss."""
    embedding.USUAL_TOKENS = usual
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_setup={"ep_size": 2}).train()
    is_spread = "forward" in vars(model.get_input_embeddings())
    assert is_spread == (usual == 1)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    losses = []
    for number in range(4):
        for micro in range(2):
            ids = tiny_batch(2, 16 + 4 * dist.get_rank(), seed=4 * number + 2 * micro + dist.get_rank())
            loss = model(input_ids=ids, labels=ids).loss / 2
            loss.backward()
            losses.append(loss.item())
        losses.append(float(clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        held_out = model(input_ids=tiny_batch(1, 24), labels=tiny_batch(1, 24)).loss.item()
    model.save_pretrained(folder)
    return losses, held_out


def test_training_and_saving_are_those_of_fsdp2(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "start")
    runs = [run_ranks(trained, 2, tmp_path / "start", tmp_path / str(usual), usual) for usual in (1, 10**6)]
    for (mine, held_out), (theirs, expected) in zip(*runs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
        assert held_out == pytest.approx(expected, rel=1e-4)
    loaded = Transformers.from_pretrained(tmp_path / "1").eval()
    ids = tiny_batch(1, 24)
    with torch.no_grad():
        assert loaded(input_ids=ids, labels=ids).loss.item() == pytest.approx(runs[0][0][1], rel=1e-5)


def padded() -> list[float]:
    """A table with a padding word and rows that do not divide evenly: gradients against plain PyTorch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = nn.Embedding(11, 6, padding_idx=3)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
    mine = nn.Embedding(11, 6, padding_idx=3)
    mine.load_state_dict(whole.state_dict())
    embedding.spread(mine, mesh)
    errors = []
    for lengths in ((5, 2, 0, 9), (1, 1, 1, 1)):
        every = [torch.randint(0, 11, (1, length), generator=torch.Generator().manual_seed(7)) for length in lengths]
        out = mine(every[rank])
        expected = whole(every[rank])
        errors.append((out - expected).abs().sum().item())
        out.pow(3).sum().backward()
        sum(whole(ids).pow(3).sum() for ids in every[:ranks]).div(ranks).backward()
        assert isinstance(mine.weight.grad, DTensor)
        errors.append((mine.weight.grad.full_tensor() - whole.weight.grad).abs().max().item())
    assert whole.weight.grad[3].abs().sum() == 0
    return errors


@pytest.mark.parametrize("ranks", [2, 4])
def test_padding_uneven_rows_and_ranks_without_tokens(ranks: int) -> None:
    for errors in run_ranks(padded, ranks):
        assert max(errors) < 1e-5


def adapted(path: Path) -> tuple[float, bool]:
    model = spread(path, ep_size=2)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    ids = batches(2)[dist.get_rank()]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / 2, model.get_input_embeddings().weight.grad is None


def test_frozen_beside_adapters(checkpoints: Any) -> None:  # noqa: F811
    path = checkpoints("qwen3_moe", 2)
    expected = torch.load(path / "expected-2.pt")["loss"]
    for loss, frozen in run_ranks(adapted, 2, path):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert frozen


def test_where_it_pays() -> None:
    assert embedding.most_ranks(nn.Embedding(151_936, 8, device="meta")) == 18
    assert embedding.most_ranks(nn.Embedding(4000, 8, device="meta")) == 1
    assert embedding.most_ranks(nn.Embedding(151_936, 8, device="meta", max_norm=1.0)) == 1
    assert embedding.most_ranks(nn.Linear(4, 4)) == 1

    class Scaled(nn.Embedding):
        pass

    assert embedding.most_ranks(Scaled(151_936, 8, device="meta")) == 1


def drawn(architecture: str) -> list[bool]:
    """Whether random weights are those of one process, name by name."""
    embedding.USUAL_TOKENS = 1
    config = tiny_config(architecture)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, distributed_setup={})
    assert "forward" in vars(model.get_input_embeddings())
    torch.manual_seed(5)
    expected = AutoModelForCausalLM.from_config(config).state_dict()
    found = {name: value.full_tensor() for name, value in model.state_dict().items() if isinstance(value, DTensor)}
    return [torch.equal(expected[name], value) for name, value in found.items()]


def test_random_weights_are_those_of_one_process() -> None:
    for same in run_ranks(drawn, 2, "qwen3_moe"):
        assert len(same) > 10
        assert all(same)
