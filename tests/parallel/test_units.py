"""What FSDP2 gathers at once: the rule, and that models of all layouts follow it."""

from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule

import slipstream.parallel.shard as shard_module
from slipstream import AutoModelForCausalLM
from slipstream.parallel.units import KEPT_BYTES, frees_after_forward, joined
from tests.distributed.harness import run_ranks
from tests.tiny_models import tiny_config


@pytest.mark.parametrize(
    ("sizes", "units"),
    [
        ([], []),
        ([3, 3, 3, 3, 3], [[0, 1, 2], [3, 4]]),
        ([10, 3, 3, 20, 1], [[0], [1, 2], [3], [4]]),
        ([11], [[0]]),
        ([5, 5, 1], [[0, 1], [2]]),
    ],
)
def test_joined(sizes: list[int], units: list[list[int]]) -> None:
    assert joined(sizes, most=10) == units


def test_freed_only_where_much_would_stay() -> None:
    assert not frees_after_forward(None, KEPT_BYTES)
    assert frees_after_forward(None, KEPT_BYTES + 1)
    assert frees_after_forward(True, 1)
    assert not frees_after_forward(False, 10 * KEPT_BYTES)


def units_of(setup: dict[str, Any], most: int) -> list[tuple[list[str], bool, bool]]:
    """Of a model with four layers, each unit's modules, whether it is freed after forward and gathered for backward."""
    joined_by = shard_module.joined
    shard_module.joined = lambda sizes: joined_by([min(size, most) for size in sizes], most)
    config = tiny_config("qwen3_moe", num_hidden_layers=4)
    model = AutoModelForCausalLM.from_config(config, distributed_setup=setup)
    units: dict[int, tuple[list[str], bool, bool]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            freed, again = group.post_forward_mesh_info is not None, group.unshard_in_backward
            units.setdefault(id(group), ([], freed, again))[0].append(name)
    return list(units.values())


def layer(number: int) -> str:
    return f"model.layers.{number}"


@pytest.mark.parametrize(
    ("setup", "most", "layers"),
    [
        ({"ep_size": 2}, 10**6, [[0, 1, 2, 3]]),
        ({"ep_size": 2}, 30_000, [[0, 1], [2, 3]]),
        ({}, 30_000, [[0], [1], [2], [3]]),
    ],
    ids=["one", "two", "with experts"],
)
def test_units_of_a_model(setup: dict[str, Any], most: int, layers: list[list[int]]) -> None:
    units = run_ranks(units_of, 2, setup, most)[0]
    assert units == [
        (["model.embed_tokens"], True, False),
        *(([layer(number) for number in unit], False, True) for unit in layers),
        (["model.norm", "lm_head"], False, True),
    ]


def test_freed_where_asked() -> None:
    _, layers, _ = run_ranks(units_of, 2, {"ep_size": 2, "reshard_after_forward": True}, 10**6)[0]
    assert layers == ([layer(number) for number in range(4)], True, True)
