"""DTensors: shards draw the bits that their elements would draw in one process, replicas the same, and no two shards
the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from slipstream.optim import AdamW
from slipstream.optim.shards import mix
from tests.distributed.harness import run_ranks

SHAPES = {"experts": (5, 6, 4), "matrix": (8, 6), "vector": (3,), "one": (1, 8)}
OPTIONS: dict[str, dict[str, Any]] = {
    "stochastic": {},
    "master": {"rounding": "master", "state_dtype": torch.float32},
    "nearest": {"rounding": "nearest"},
}


def whole(name: str, seed: int) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed)).bfloat16()


def train(params: dict[str, nn.Parameter], optimizer: AdamW, first: int, last: int) -> None:
    for step in range(first, last):
        for name, param in params.items():
            grad = whole(name, 100 + step) * 1e-2
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()


def make(layouts: dict[str, list[Any]] | None, options: dict[str, Any]) -> tuple[dict[str, nn.Parameter], AdamW]:
    """Parameters of all shapes, spread as `layouts` says over all ranks; plain for None."""
    params = {}
    for seed, name in enumerate(SHAPES):
        tensor = whole(name, seed)
        if layouts is not None:
            ranks = dist.get_world_size()
            mesh = init_device_mesh("cpu", (ranks,) if len(layouts[name]) == 1 else (ranks // 2, 2))
            tensor = distribute_tensor(tensor, mesh, layouts[name])
        params[name] = nn.Parameter(tensor)
    return params, AdamW(params.values(), lr=1e-3, weight_decay=0.1, **options)


def full(params: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for name, p in params.items()}


def spread(layouts: dict[str, list[Any]], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    params, optimizer = make(layouts, options)
    train(params, optimizer, 0, 4)
    for name, param in params.items():
        for key, value in optimizer.state[param].items():
            if key != "step":
                assert isinstance(value, DTensor), (name, key)
                assert value.placements == param.placements
    return full(params)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, [Shard(0)]),  # unequal parts of 5 and of 3 rows, and of 1 row an empty one
        (2, [Replicate()]),
        (4, [Replicate(), Shard(0)]),
        (4, [Shard(0), Shard(0)]),
    ],
    ids=str,
)
def test_the_bits_of_one_process(ranks, layout, options) -> None:
    params, optimizer = make(None, options)
    train(params, optimizer, 0, 4)
    expected = full(params)
    for got in run_ranks(spread, ranks, dict.fromkeys(SHAPES, layout), options):
        for name, tensor in got.items():
            assert torch.equal(tensor, expected[name]), name


def inner_bits() -> tuple[torch.Tensor, torch.Tensor]:
    """Ones with one gradient, by columns and replicated across: how each rank's columns were rounded."""
    mesh = init_device_mesh("cpu", (2, 2))
    param = nn.Parameter(distribute_tensor(torch.ones(64, 32).bfloat16(), mesh, [Replicate(), Shard(1)]))
    param.grad = distribute_tensor(torch.ones(64, 32).bfloat16(), mesh, [Replicate(), Shard(1)])
    AdamW([param], lr=1e-3, weight_decay=0.0).step()
    return param.to_local().detach(), param.full_tensor().detach()


def test_shards_of_an_inner_dimension_draw_other_bits() -> None:
    (first, _), (second, _), (third, _), (fourth, tensor) = run_ranks(inner_bits, 4)
    assert torch.equal(first, third)
    assert torch.equal(second, fourth)
    assert torch.equal(tensor, torch.cat([first, second], 1))
    # Independent, each lowered with probability 0.256.
    assert (first != second).float().mean().item() == pytest.approx(2 * 0.256 * 0.744, abs=0.08)


def resharded(folder: Path, options: dict[str, Any]) -> None:
    """Saved by rows of two ranks, continued by columns, where they can be cut, and the state is what it was."""
    rows = {name: [Shard(0)] for name in SHAPES}
    params, optimizer = make(rows, options)
    model = nn.ParameterDict(params)
    train(params, optimizer, 0, 3)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    columns = {name: [Shard(len(shape) - 1)] for name, shape in SHAPES.items()}
    other, fresh = make(columns, options)
    moved = nn.ParameterDict(other)
    state = {"optimizer": get_optimizer_state_dict(moved, fresh)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(moved, fresh, state["optimizer"])
    for name in SHAPES:
        saved, loaded = optimizer.state[params[name]], fresh.state[other[name]]
        assert saved.keys() == loaded.keys()
        for key, value in saved.items():
            mine = loaded[key]
            assert mine.dtype == value.dtype, key
            if key != "step":
                assert mine.placements == tuple(columns[name])
                # gloo, like NCCL, has no int16.
                value, mine = value.to(torch.float32).full_tensor(), mine.to(torch.float32).full_tensor()
            assert torch.equal(mine, value), (name, key)
    train(other, fresh, 3, 4)


@pytest.mark.parametrize("options", [OPTIONS["stochastic"], OPTIONS["master"]], ids=["stochastic", "master"])
def test_states_are_resharded(tmp_path: Path, options) -> None:
    run_ranks(resharded, 2, tmp_path / "state", options)


def under_fsdp(rounding: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5)).bfloat16()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = AdamW(model.parameters(), lr=1e-2, rounding=rounding)
    before = {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    assert all(not torch.equal(after[name], before[name]) for name in after)
    return after


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_fsdp_gives_the_weights_of_one_rank(rounding) -> None:
    (expected,) = run_ranks(under_fsdp, 1, rounding)
    for got in run_ranks(under_fsdp, 2, rounding):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    spread = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    messages = []
    for param, grad in (
        (spread, DTensor.from_local(torch.ones(4), mesh, [Partial()])),
        (spread, torch.ones(4)),
        (torch.ones(4), spread),
    ):
        parameter = nn.Parameter(param)
        parameter.grad = grad
        with pytest.raises((TypeError, ValueError)) as caught:
            AdamW([parameter]).step()
        messages.append(str(caught.value))
    return messages


def test_gradients_of_another_layout_are_refused() -> None:
    for partial, plain_grad, plain_param in run_ranks(refusals, 2):
        assert "its gradient as (Partial(sum),)" in partial
        assert "grad.redistribute(param.device_mesh, param.placements)" in partial
        for message in (plain_grad, plain_param):
            assert "both must be DTensors or neither" in message


def test_mix_gives_the_published_words() -> None:
    """SplitMix64 from seed 0: its first word, and the second as the mix of its next state."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
