"""What slipstream/hf.py relies on in Transformers. A failure here means that upstream moved something."""

import inspect

from transformers import Trainer
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.loss.loss_utils import LOSS_MAPPING

from slipstream import DistributedSetup, hf
from slipstream.moe import experts
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
    module = modules["model.layers.0.mlp.experts"]
    assert not hf.is_expert_parallel(module)
    assert not hf.has_default_gate(module)
    assert hf.has_default_gate(next(module for _, module in hf.experts_modules(tiny_model("mixtral", None))))


def test_implementation_names() -> None:
    model = tiny_model("qwen3_moe", "eager")
    assert hf.experts_implementation(model) == "eager"
    assert hf.attention_implementation(model) == "sdpa"


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


def test_checkpoint_hooks() -> None:
    """Methods of Trainer with these arguments; the one for RNG is called when the counters are set."""
    for name, hook in vars(hf.CheckpointHooks).items():
        if name.startswith("_") and not name.startswith("__"):
            theirs = inspect.signature(getattr(Trainer, name)).parameters
            assert list(theirs) == list(inspect.signature(hook).parameters), name
    assert "self._load_rng_state(resume_from_checkpoint)" in inspect.getsource(Trainer._run_epoch)
    assert "self._load_optimizer_and_scheduler(" in inspect.getsource(Trainer._prepare_for_training)
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert loop.index("self._tr_loss = ") < loop.index("self._run_epoch(")
    assert "self._globalstep_last_logged = " in loop


def test_exchanges_and_initialisation() -> None:
    assert issubclass(EPImplementationInterface()["slipstream_all_to_all"], hf.Exchange)
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
