"""The analytic count against PyTorch's own counter of the operations that really run."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from slipstream.bench.presets import build_config
from slipstream.planning.devices import peak_bf16_tflops
from slipstream.planning.flops import count_parameters, forward_flops, top_k, training_flops
from tests.tiny_models import tiny_batch, tiny_config, tiny_model

BATCH, LENGTH = 2, 32


def counted(model_type: str, **changes: object) -> tuple[float, float]:
    """What torch counts in forward and backward, per token: (all but the rotary embedding, the attention alone)."""
    model = tiny_model(model_type, "eager", **changes)
    model.set_attn_implementation("eager")
    ids = tiny_batch(BATCH, LENGTH)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    by_module = counter.get_flop_counts()
    # Angles as an outer product, in fp32 and without a gradient: no work of the model's matrices.
    rotary = sum(sum(ops.values()) for name, ops in by_module.items() if name.endswith("rotary_emb"))
    attention = sum(count for op, count in by_module["Global"].items() if "bmm" in str(op)) - rotary
    tokens = BATCH * LENGTH
    return (counter.get_total_flops() - rotary) / tokens, attention / tokens


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
        ("mixtral", {"sliding_window": None}),
        ("olmoe", {}),
        ("gpt_oss", {"sliding_window": 8}),
        ("deepseek_v3", {}),
        ("qwen2_moe", {}),
        ("glm4_moe", {}),
    ],
)
def test_equals_what_torch_counts(model_type: str, changes: dict[str, object]) -> None:
    config = tiny_config(model_type, **changes)
    flops = forward_flops(config, LENGTH)
    total, attention = counted(model_type, **changes)
    assert 3 * (flops.total - flops.attention) == pytest.approx(total - attention, rel=1e-9)
    # Eager attention computes what the mask then removes: twice the causal half, in every layer.
    full = forward_flops(tiny_config(model_type, **{**changes, "sliding_window": None}), LENGTH).attention
    assert 3 * 2 * full == pytest.approx(attention, rel=1e-9)


def test_nemotron_without_its_scan() -> None:
    """Mamba2's scan runs as elementwise products on a CPU, which torch does not count: compare the rest."""
    config = tiny_config("nemotron_h", layers_block_type=["moe", "full_attention", "mlp", "moe"])
    total, attention = counted("nemotron_h", layers_block_type=["moe", "full_attention", "mlp", "moe"])
    flops = forward_flops(config, LENGTH)
    assert 3 * (flops.dense + flops.experts + flops.head) == pytest.approx(total - attention, rel=1e-9)
    assert flops.scan == 0
    with_scan = forward_flops(tiny_config("nemotron_h"), LENGTH)
    # 1 layer: chunks of 16, 2 groups of state 16, 8 heads of 16.
    assert with_scan.scan == 16 * (2 * 16 + 128) + 4 * 128 * 16


def test_attention_of_windows_and_documents() -> None:
    config = tiny_config("gpt_oss", sliding_window=8)
    layer = 2 * 2 * config.num_attention_heads * config.head_dim  # scores and values, 2 operations each
    # Tokens 0 … 7 see half a window on average, the other 24 a whole one; every second layer sees all.
    windowed = (8 * 4 + 24 * 8) / 32
    assert forward_flops(config, 32).attention == 2 * layer * windowed + 2 * layer * 16
    assert forward_flops(config, 32, document=8).attention == 4 * layer * 4
    assert training_flops(config, 32, 8) == 3 * forward_flops(config, 8).total


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("qwen3-30b-a3b", 30.5, 3.3),
        ("qwen3-235b-a22b", 235, 22),
        ("nemotron-3-nano-30b-a3b", 31.6, 3.6),
        ("gpt-oss-20b", 20.9, 3.6 + 0.58),  # the published count leaves the embedding out
        ("gpt-oss-120b", 116.8, 5.1 + 0.58),
        ("deepseek-v3", 671, 37),
        ("mixtral-8x7b", 46.7, 12.9),
        ("olmoe-1b-7b", 6.9, 1.3),
        ("qwen3-8b", 8.2, 8.2),
        ("llama-3.2-1b", 1.24, 1.24),
        ("nemotron-3-ultra-550b", 550, 56),
    ],
)
def test_parameters_as_published(preset: str, total: float, active: float) -> None:
    found = count_parameters(build_config(preset, layers=0, experts=0))
    assert found.total / 1e9 == pytest.approx(total, rel=0.01)
    assert found.active / 1e9 == pytest.approx(active, rel=0.03)


def test_operations_of_qwen3_30b() -> None:
    """23.0 GFLOP a token at 4096, by hand from the widths (DESIGN's research notes) without the router's 0.1."""
    assert training_flops(build_config("qwen3-30b-a3b", layers=0), 4096) / 1e9 == pytest.approx(23.0, rel=0.01)


def test_parameters_equal_a_real_model() -> None:
    model = tiny_model("qwen3_moe")
    found = count_parameters(model.config)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    assert found.total - found.active == found.routed * (1 - top_k(model.config) / 8)


def test_the_config_stays_as_it_is() -> None:
    config = tiny_config("qwen3_moe")
    before = config.to_dict()
    forward_flops(config, LENGTH)
    assert config.to_dict() == before


def test_peaks() -> None:
    assert peak_bf16_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_bf16_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_bf16_tflops("NVIDIA H200") == 989.0
    assert peak_bf16_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_bf16_tflops("NVIDIA L40S") == 362.0
    assert peak_bf16_tflops("CPU") is None
