"""When tokens travel by stores into other ranks' memory, and what is said where they can't."""

import warnings
from typing import Any

import pytest
import torch

from slipstream import AutoModelForCausalLM
from slipstream.acceleration import choose_dispatcher
from slipstream.backend import BackendConfig
from slipstream.moe import dispatch
from slipstream.moe.dispatch import peers
from slipstream.parallel.setup import DistributedSetup
from tests.distributed.harness import run_ranks
from tests.tiny_models import tiny_config


def _refused(dispatcher: str) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            AutoModelForCausalLM.from_config(
                tiny_config("qwen3_moe"), backend={"dispatcher": dispatcher}, distributed_setup={"ep_size": 2}
            )
        except peers.NoPeerAccessError as error:
            return str(error)
    return " ".join(str(warning.message) for warning in caught)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a way here")
def test_without_gpus() -> None:
    for heard in run_ranks(_refused, 2, "nvlink"):
        assert "stores into other ranks' memory need GPUs; use dispatcher='all_to_all'" in heard
    # Automatic is all-to-all from the start.
    assert not any("NVLink" in heard for heard in run_ranks(_refused, 2, "auto"))


def _falls_back(_: None) -> tuple[list[str], bool]:
    """A model whose tokens were to travel by stores, where they can't: the warnings, and whether it trains."""
    dispatch.obstacle = lambda ranks: None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), distributed_setup={"ep_size": 2})
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trains = all(parameter.grad is not None for parameter in model.model.layers[0].mlp.experts.parameters())
    said = [str(warning.message) for warning in caught if "NVLink" in str(warning.message)]
    return said, trains


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a way here")
def test_automatic_falls_back_with_one_warning() -> None:
    for said, trains in run_ranks(_falls_back, 2, None):
        assert len(said) == 1
        assert said[0].startswith("tokens travel by all-to-all instead of stores over NVLink: rank 0: stores into")
        assert trains


@pytest.mark.parametrize(
    ("ranks", "local", "visible", "cut", "expected"),
    [
        (2, 2, 2, None, None),
        (4, 8, 8, (0, 1), None),  # the other group's
        (4, 8, 8, (6, 4), "GPU 6 can't reach GPU 4"),
        (16, 8, 8, None, "2 nodes of 8 ranks: a token crosses the network once for each node it needs"),
        (12, 8, 8, None, "12 ranks do not fit into a machine of 8"),
        (2, 1, 1, None, "2 ranks do not fit into a machine of 1"),
        (2, 2, 1, None, "sees 1 of the machine's GPUs"),
        (2, 2, 0, None, "no GPU"),
    ],
)
def test_automatic(monkeypatch: Any, ranks: int, local: int, visible: int, cut: Any, expected: str | None) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("LOCAL_RANK", str(local - 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) != cut)
    choice = choose_dispatcher(BackendConfig(), DistributedSetup(ep_size=ranks))
    if expected is None:
        assert choice.chosen == "nvlink"
        assert dispatch.exchange_name("auto", choice.chosen) == "slipstream_nvlink_auto"
    else:
        assert choice.chosen == ("hierarchical" if "nodes" in expected else "all_to_all")
        assert expected in choice.why
    asked_for = choose_dispatcher(BackendConfig(dispatcher="nvlink"), DistributedSetup(ep_size=ranks))
    assert dispatch.exchange_name("nvlink", asked_for.chosen) == "slipstream_nvlink"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ([("a", "g0", [], 1), ("b", "g1", [], 1)], "on 2 machines"),
        ([("a", "g0", [], 1), ("a", "g0", [], 1)], "share a GPU"),
        ([("a", "g0", ["g1"], 1), ("a", "g1", [], 1)], "rank 0 of the group can't reach rank 1's"),
    ],
)
def test_obstacles(facts: Any, words: str) -> None:
    with pytest.raises(peers.NoPeerAccessError, match=words):
        peers._check_facts(facts)
    peers._check_facts([("a", "g0", ["g7"], 1), ("a", "g1", [], 1)])
