"""What slipstream/hf.py relies on in Transformers. A failure here means that upstream moved something."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import CONFIG_MAPPING, Trainer, masking_utils
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slipstream import DistributedSetup, hf
from slipstream.attention import interface
from slipstream.moe import dispatch, experts
from tests.tiny_models import tiny_config, tiny_model


def test_experts_registry() -> None:
    assert ALL_EXPERTS_FUNCTIONS["slipstream"] is experts.experts_forward
    assert ALL_EXPERTS_FUNCTIONS["slipstream_balanced"] is experts.balanced_experts_forward


def test_experts_flags() -> None:
    flags = {name for name in inspect.signature(use_experts_implementation).parameters if name[:3] in ("is_", "has")}
    assert flags == {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}
    model = tiny_model("gpt_oss", None)
    modules = dict(hf.experts_modules(model))
    assert len(modules) == model.config.num_hidden_layers
    assert "model.layers.0.mlp.experts" in modules


def test_implementation_names() -> None:
    model = tiny_model("qwen3_moe", "eager")
    assert hf.experts_implementation(model) == "eager"
    assert hf.attention_implementation(model) == "sdpa"


def test_trainer_leaves_alone_what_is_averaged_already() -> None:
    source = inspect.getsource(Trainer._sync_replicated_trainable_parameters)
    parameter = torch.nn.Parameter(torch.zeros(1))
    hf.mark_averaged(parameter)
    (name,) = vars(parameter)
    assert f'getattr(param, "{name}", False)' in source


def test_loss() -> None:
    assert hf.causal_lm_loss is LOSS_MAPPING["ForCausalLM"]
    assert list(inspect.signature(hf.causal_lm_loss).parameters)[:6] == [
        "logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels",
    ]  # fmt: skip
    model = tiny_model("llama", None)
    assert hf.uses_causal_lm_loss(model)
    model.loss_function = print
    assert not hf.uses_causal_lm_loss(model)


def test_number_of_experts() -> None:
    for model_type in ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "ernie4_5_moe", "granitemoe"):
        assert hf.num_routed_experts(tiny_config(model_type)) == 8, model_type
    assert hf.num_routed_experts(tiny_config("llama")) is None


def test_distributed_config() -> None:
    config = hf.distributed_config(DistributedSetup(ep_size=1), "slipstream_all_to_all")
    assert (config.dp_replicate_size, config.fsdp_size, config.ep_size, config.ep_implementation) == (1, 1, 1, "auto")
    assert not hf.is_distributed(tiny_model("llama", None))


def test_exchanges_and_initialisation() -> None:
    assert EPImplementationInterface()["slipstream_all_to_all"] is dispatch.AllToAllExchange
    assert issubclass(dispatch.AllToAllExchange, hf.Exchange)
    assert hf.exchange("slipstream_nvlink") is dispatch.NvlinkExchange
    assert issubclass(hf.exchange("all_to_all"), hf.Exchange)
    seen = []
    with hf.observing_initialization(lambda model, module, initialize: seen.append(module) or initialize()):
        model = tiny_model("llama", None)
    assert set(seen) == set(model.modules())
    weight = model.model.norm.weight
    weight.data.zero_()
    hf.initialize_module(model, model.model.norm)
    assert weight.min() == 1
    hf.mark_fsdp_managed(model)
    assert is_fsdp_managed_module(model)


def test_routers_and_their_biases() -> None:
    for model_type, place in (("deepseek_v3", "gate"), ("minimax_m2", ""), ("ernie4_5_moe", "gate.moe_statics")):
        model = tiny_model(model_type)
        name, experts, router, block = next(hf.routers(model))
        assert model.get_submodule(name) is experts
        assert router is block.gate
        holder = block.get_submodule(place)
        assert hf.selection_bias(router, block) is holder.e_score_correction_bias
    *_, router, block = next(hf.routers(tiny_model("qwen3_moe")))
    assert hf.selection_bias(router, block) is None


def test_config_fields_of_each_layer() -> None:
    with pytest.raises(hf.PerLayerFieldError):
        _ = CONFIG_MAPPING["gemma4_text"]().head_dim


def test_attention_registries_and_flags() -> None:
    assert ALL_ATTENTION_FUNCTIONS["slipstream"] is interface.attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["slipstream"] is interface.attention_mask_for
    found = {
        name: (hf.supports_flash_attention(model), hf.supports_sdpa(model))
        for name, model in ((name, tiny_model(name)) for name in ("qwen3_moe", "gpt_oss", "gemma2", "deepseek_v32"))
    }
    assert found == {
        "qwen3_moe": (True, True), "gpt_oss": (True, False), "gemma2": (True, False), "deepseek_v32": (False, True),
    }  # fmt: skip


def test_attention_masks() -> None:
    """What our mask function is called with, and how SDPA's fares on it."""
    mask = inspect.signature(hf.sdpa_mask).parameters
    ours = inspect.signature(interface.attention_mask_for).parameters
    assert [name for name in ours if name not in mask] == ["config"]
    assert list(mask)[:9] == [name for name in ours if name in mask][:9]
    document = torch.tensor([[0, 0, 1]])
    inside = hf.within_documents(masking_utils.causal_mask_function, document)
    seen = hf.sdpa_mask(1, 3, 3, mask_function=inside, allow_is_causal_skip=False)
    assert seen.int().tolist() == [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    assert hf.sdpa_attention is ALL_ATTENTION_FUNCTIONS["sdpa"]
    # Only masks without a causal triangle are made with this argument.
    for maker, expected in (("causal", False), ("sliding_window_causal", False), ("bidirectional", True)):
        call = inspect.getsource(getattr(masking_utils, f"create_{maker}_mask")).split("= mask_interface(")[1]
        assert ("allow_is_bidirectional_skip=" in call) == expected, maker


def test_packing_is_looked_for_by_this_name() -> None:
    assert "find_packed_sequence_indices(position_ids)" in inspect.getsource(masking_utils._preprocess_mask_arguments)
    known: list[object] = [None]
    original = masking_utils.find_packed_sequence_indices
    try:
        masking_utils.find_packed_sequence_indices = getattr(original, "original", original)
        hf.let_packing_be_known(lambda batch, length: known[0])
        positions = torch.tensor([[0, 1, 0]])
        assert masking_utils.find_packed_sequence_indices(positions).tolist() == [[0, 0, 1]]
        known[0] = "something"
        assert masking_utils.find_packed_sequence_indices(positions) is None
        once = masking_utils.find_packed_sequence_indices
        hf.let_packing_be_known(lambda batch, length: None)
        assert masking_utils.find_packed_sequence_indices is once
    finally:
        masking_utils.find_packed_sequence_indices = original


def test_a_layer_that_is_computed_again() -> None:
    model = tiny_model("qwen3_moe")
    layer = model.get_decoder().layers[0]
    assert not hf.is_recomputed(layer)
    hf.checkpoint_layers(model)
    assert not hf.is_recomputed(layer.eval())
    assert hf.is_recomputed(layer.train())
    with torch.no_grad():
        assert not hf.is_recomputed(layer)
    assert "checkpoint" not in hf.without_checkpoint(layer).__code__.co_names
    assert hf.without_checkpoint(layer).__code__ is not type(layer).forward.__code__
    calls = []
    run = hf.recomputed(layer, lambda x: calls.append(None) or (x * x).sin())
    run(torch.ones(2, requires_grad=True)).sum().backward()
    assert len(calls) == 2


def test_the_code_of_a_model_that_came_with_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that FSDP2 shards, whose class is in another file."""
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("modeling_own").OwnForCausalLM
    kind.register_for_auto_class("AutoModelForCausalLM")
    model = kind(tiny_config("llama"))
    model.__class__ = type("FSDPOwnForCausalLM", (FSDPModule, kind), {"__module__": FSDPModule.__module__})
    folder = tmp_path / "saved"
    folder.mkdir()
    hf.save_modelling_code(model, model.config, folder)
    assert model.config.auto_map == {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    assert [file.name for file in folder.iterdir()] == ["modeling_own.py"]
