"""The memory model: what its parts are, and how they answer to each setting."""

import dataclasses
import math

import pytest

from slipstream.bench.presets import build_config
from slipstream.planning.activations import Experts, Shape, model_shape
from slipstream.planning.memory import (
    GIB,
    OPTIMIZERS,
    Layout,
    adapter_parameters,
    loss_bytes,
    ranks_a_token,
    step_memory,
)
from tests.tiny_models import tiny_config


@pytest.fixture(scope="module")
def shape() -> Shape:
    return model_shape(build_config("qwen3-30b-a3b", 4), 4096)


def test_parts_of_one_gpu(shape: Shape) -> None:
    """8 bytes a parameter, and at the fullest moment nothing twice."""
    memory = step_memory(shape, Layout())
    parameters = shape.dense + shape.routed
    assert memory.parts["dense weights"] * GIB == pytest.approx(2 * shape.dense)
    assert memory.parts["expert weights"] * GIB == pytest.approx(2 * shape.routed)
    assert memory.parts["optimizer"] * GIB == pytest.approx(4 * parameters)
    assert memory.gradients_gib * GIB == pytest.approx(2 * parameters)
    assert memory.peak_gib == pytest.approx(sum(memory.parts.values()))
    assert memory.peak_gib * GIB > 8 * parameters - 2 * shape.embedding
    assert "dispatched rows" not in memory.parts
    assert "gathered weights" not in memory.parts


def test_the_fullest_moment(shape: Shape) -> None:
    """Few tokens: all gradients. Many: all activations, with the last layer's backward or the loss."""
    few, many = Layout(seq_len=64), Layout(micro_batch=16)
    assert step_memory(shape, few).moment in ("the end of backward", "the backward of layer 0")
    assert step_memory(shape, many).moment == f"the backward of layer {len(shape.layers) - 1}"
    assert step_memory(shape, many).activations_gib == pytest.approx(16 * step_memory(shape, Layout()).activations_gib)


def test_sharding_splits_what_stays(shape: Shape) -> None:
    one = step_memory(shape, Layout())
    for ep_size in (1, 2, 8):
        eight = step_memory(shape, Layout(gpus=8, ep_size=ep_size))
        for part in ("dense weights", "expert weights", "optimizer"):
            assert eight.parts[part] == pytest.approx(one.parts[part] / 8)
    replicated = step_memory(shape, Layout(gpus=16, ep_size=8, dp_replicate=2))
    assert replicated.parts["optimizer"] == pytest.approx(one.parts["optimizer"] / 8)
    # Experts that stay with their owner are not gathered; those that FSDP2 shards are, a layer's of them.
    buffers = [step_memory(shape, Layout(gpus=8, ep_size=size)).parts.get("gathered weights", 0) for size in (1, 2, 8)]
    assert buffers[0] > buffers[1] > buffers[2]
    assert buffers[0] * GIB > 2 * shape.layers[0].routed


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(shape: Shape, optimizer: str) -> None:
    memory = step_memory(shape, Layout(optimizer=optimizer))
    expected = OPTIMIZERS[optimizer][0] * (shape.dense + shape.routed)
    assert memory.parts.get("optimizer", 0) * GIB == pytest.approx(expected)
    whole = step_memory(shape, Layout(optimizer=optimizer, weight_bytes=4))
    assert whole.parts["expert weights"] == pytest.approx(2 * memory.parts["expert weights"])


def test_unknown_optimizer(shape: Shape) -> None:
    with pytest.raises(
        ValueError, match=r"train\.optim=adamw_xyz: its memory is not known; use one of slipstream_adamw"
    ):
        step_memory(shape, Layout(optimizer="adamw_xyz"))


def test_adapters_leave_the_rest_without_gradients(shape: Shape) -> None:
    layout = Layout(lora_rank=16, optimizer="adamw_torch_fused")
    memory = step_memory(shape, layout)
    adapters = 16 * sum(linear.inputs + linear.outputs for linear in shape.linears)
    assert adapter_parameters(shape, 16) == adapters
    assert memory.gradients_gib * GIB == pytest.approx(4 * adapters)
    assert memory.parts["optimizer"] * GIB == pytest.approx(8 * adapters)
    assert memory.peak_gib < step_memory(shape, Layout()).peak_gib / 2


def test_checkpointing_and_compiling(shape: Shape) -> None:
    def kept(**settings: object) -> float:
        return step_memory(shape, dataclasses.replace(Layout(micro_batch=4), **settings)).activations_gib

    assert kept(checkpointing="full") < kept(checkpointing="selective") == kept() < kept(compiled=False)
    layer = 2 * 4 * 4096 * 2048 * len(shape.layers)
    outside = 4 * 4096 * shape.kept_outside
    assert kept(checkpointing="full") * GIB == pytest.approx(layer + outside)


def test_accumulating_keeps_gradients(shape: Shape) -> None:
    once, twice = (step_memory(shape, Layout(micro_batch=8, accumulation=n)) for n in (1, 2))
    assert twice.parts["gradients"] == pytest.approx(once.gradients_gib)
    assert twice.peak_gib > once.peak_gib


def test_loss() -> None:
    """The figures of benchmarks/NOTES.md, 4096 and 16,384 x 2048 x 151,936: 1.8 GiB fused, 8.1 and 32.5 not."""
    shape = model_shape(build_config("qwen3-30b-a3b", 1), 4096)
    for tokens, plain in ((4096, 8.1), (16384, 32.5)):
        layout = Layout(seq_len=tokens)
        assert loss_bytes(shape, layout) / GIB == pytest.approx(1.8, rel=0.05)
        assert loss_bytes(shape, dataclasses.replace(layout, fused_loss=False)) / GIB == pytest.approx(plain, rel=0.05)
    assert step_memory(shape, Layout(micro_batch=8, fused_loss=False)).moment == "the loss"


def test_ranks_a_token() -> None:
    """Against counting: all ways to choose 2 of 8 experts, 4 ranks of 2."""
    pairs = [(a, b) for a in range(8) for b in range(a)]
    counted = sum(len({a // 2, b // 2}) for a, b in pairs) / len(pairs)
    assert ranks_a_token(Experts(8, 2), 4) == pytest.approx(counted)
    assert ranks_a_token(Experts(128, 8), 1) == 1
    assert ranks_a_token(Experts(128, 8), 128) == pytest.approx(8)
    assert math.isclose(ranks_a_token(Experts(8, 8), 2), 2)


def test_dispatch_buffers(shape: Shape) -> None:
    one = step_memory(shape, Layout(gpus=8, ep_size=8, micro_batch=4, dispatcher="all_to_all"))
    gather = step_memory(shape, Layout(gpus=8, ep_size=8, micro_batch=4, dispatcher="all_gather"))
    rows = 4 * 4096 * ranks_a_token(shape.layers[0].experts, 8) * len(shape.layers)
    assert one.parts["dispatched rows"] * GIB == pytest.approx(2 * 2048 * rows)
    assert gather.parts["dispatched rows"] > one.parts["dispatched rows"]
    assert gather.activations_gib > one.activations_gib
    # DeepEP receives the same rows, through areas of a fixed size.
    deepep = step_memory(shape, Layout(gpus=8, ep_size=8, micro_batch=4, dispatcher="deepep"))
    assert deepep.activations_gib == one.activations_gib
    assert (deepep.peak_gib - one.peak_gib) * GIB == pytest.approx(20480 * (2 * 2048 + 2048) + 2**25)


def test_room_for_tokens_over_nvlink(shape: Shape) -> None:
    """Whatever the routing, while that is not much; then for the rows that come."""
    experts, layers = shape.layers[0].experts, len(shape.layers)
    layout = Layout(gpus=2, ep_size=2)
    assert layout.exchange == "nvlink"
    assert dataclasses.replace(layout, peer_access=False).exchange == "all_to_all"
    assert dataclasses.replace(layout, gpus=16, ep_size=16).exchange == "hierarchical"
    assert dataclasses.replace(layout, gpus=16, ep_size=16, per_host=1).exchange == "all_to_all"
    few, plain = step_memory(shape, layout), step_memory(shape, dataclasses.replace(layout, dispatcher="all_to_all"))
    tokens = 2 * 4096 - 4096 * ranks_a_token(experts, 2)
    more = layers * 2 * (4096 * experts.top_k * experts.up + tokens * experts.hidden)
    assert (few.activations_gib - plain.activations_gib) * GIB == pytest.approx(more)
    four = dataclasses.replace(layout, micro_batch=4)
    many, plain = step_memory(shape, four), step_memory(shape, dataclasses.replace(four, dispatcher="all_to_all"))
    more = layers * 2 * 4 * tokens * experts.hidden
    assert (many.activations_gib - plain.activations_gib) * GIB == pytest.approx(more)
    area = 2 * 4 * 4096 * (2 * experts.hidden + 8 * experts.top_k)
    assert many.parts["exchange areas"] * GIB == pytest.approx(2 * area)


def test_tied_head_has_one_gradient() -> None:
    shape = model_shape(tiny_config("llama", tie_word_embeddings=True), 64)
    assert shape.head == 0
    memory = step_memory(shape, Layout(seq_len=64))
    assert memory.gradients_gib * GIB == pytest.approx(2 * shape.dense)
