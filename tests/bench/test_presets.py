import pytest

from slipstream import hf
from slipstream.bench.presets import PRESETS, build_config
from slipstream.planning.flops import count_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_fits_one_gpu(name: str) -> None:
    """At 8 bytes a parameter: weights, gradients and AdamW's two states in bf16."""
    assert count_parameters(build_config(name)).total * 8 < 72e9


def test_depth_keeps_the_mixture_of_layers() -> None:
    nano = build_config("nemotron-3-nano-30b-a3b", 13)
    assert [nano.layers_block_type.count(kind) for kind in ("linear_attention", "moe", "full_attention")] == [6, 5, 2]
    assert build_config("nemotron-3-nano-30b-a3b", 0).num_hidden_layers == 52
    assert build_config("deepseek-v3", 4).first_k_dense_replace == 1
    assert build_config("deepseek-v3", 0).first_k_dense_replace == 3
    assert build_config("gpt-oss-20b", 3).layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_experts_and_fields_can_be_changed() -> None:
    assert hf.num_routed_experts(build_config("deepseek-v3")) == 64
    assert hf.num_routed_experts(build_config("deepseek-v3", experts=0)) == 256
    for name in ("qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b", "nemotron-3-nano-30b-a3b"):
        assert hf.num_routed_experts(build_config(name, experts=4)) == 4
        assert hf.num_routed_experts(build_config(name, experts=4, tiny=True)) == 4
    changed = build_config("qwen3-30b-a3b", changes={"num_experts_per_tok": 4, "attention_bias": True})
    assert (changed.num_experts_per_tok, changed.attention_bias, changed.hidden_size) == (4, True, 2048)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("qwen4", {}, "no such preset; use one of qwen3-30b-a3b"),
        ("qwen3-8b", {"layers": 37}, "qwen3-8b has 36 layers"),
        ("qwen3-8b", {"layers": -1}, "qwen3-8b has 36 layers"),
        ("qwen3-8b", {"experts": 4}, "dense model"),
        ("qwen3-8b", {"changes": {"colour": 1}}, "Qwen3Config has no such field"),
    ],
)
def test_mistakes(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_config(name, **options)
