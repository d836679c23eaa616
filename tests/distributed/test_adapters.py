"""LoRA adapters on experts that are spread over ranks, against one process."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import slipstream
from slipstream import adapters, clip_grad_norm_, hf
from slipstream.adapters import all_experts, install
from slipstream.shared_adapters import share_experts
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import compare, full, train
from tests.test_linear_adapters import PROJECTIONS, adapted, error, layer_of
from tests.tiny_models import tiny_batch, tiny_model

SETUPS = {
    "ep 2": (2, {"ep_size": 2}),
    "fsdp 2": (2, {}),
    "fsdp 4, ep 2": (4, {"ep_size": 2}),
    "2 replicas, ep 2": (4, {"ep_size": 2, "dp_replicate": 2}),
    "ep 2, all_gather, checkpointing": (2, {"ep_size": 2, "activation_checkpointing": "full"}),
}


def adapt(model: Any, shared: bool = False, **changes: Any) -> Any:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False,
                           "target_parameters": all_experts(model), **changes})  # fmt: skip
    if shared:
        install(model)  # PEFT knows nothing of it
    return get_peft_model(model, share_experts(config, shared))


def trained(model: Any, *of: Any) -> Any:
    """What `train` returns, of what trains alone."""
    losses, norms, grads, weights = train(model, clip_grad_norm_, *of)
    return losses, norms, grads, {name: weights[name] for name in grads}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: a tiny checkpoint, and an adapter beside it that plain PEFT made on plain Transformers."""
    root = tmp_path_factory.mktemp("models")

    def make(model_type: str) -> tuple[Path, Path]:
        base, adapter = root / model_type, root / f"{model_type}-adapter"
        if not base.exists():
            model = tiny_model(model_type, "grouped_mm")
            model.save_pretrained(base)
            torch.manual_seed(3)
            adapt(model).save_pretrained(adapter)
        return base, adapter

    return make


def load(base: Path, adapter: Path | None, setup: dict[str, Any] | None) -> Any:
    model = slipstream.AutoModelForCausalLM.from_pretrained(base, distributed_setup=setup).train()
    if adapter is None:
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # what they draw differs
        return adapt(model)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def worker(base: Path, adapter: Path, setup: dict[str, Any], out: Path) -> Any:
    model = load(base, adapter, setup)
    experts = {name: p for name, p in model.named_parameters() if p.requires_grad and ".experts." in name}
    assert experts
    for name, parameter in experts.items():
        assert isinstance(parameter, DTensor), name
        ranks = dist.get_world_size() // setup.get("dp_replicate", 1)
        assert parameter.to_local().numel() * ranks == parameter.numel()
    result = trained(model, dist.get_rank(), dist.get_world_size())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.save_pretrained(out)
    return result


@pytest.mark.parametrize("name", SETUPS)
def test_three_clipped_steps_and_the_saved_adapter(folders: Any, name: str, tmp_path: Path) -> None:
    base, adapter = folders("qwen3_moe")
    ranks, setup = SETUPS[name]
    expected = trained(load(base, adapter, None))
    got = run_ranks(worker, ranks, base, adapter, setup, tmp_path / "saved")
    for result in got:
        compare(result, expected)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    plain = PeftModel.from_pretrained(tiny_model_at(base), tmp_path / "saved")
    for key, parameter in plain.named_parameters():
        if key in expected[3]:
            torch.testing.assert_close(parameter, expected[3][key], rtol=1e-4, atol=1e-5)


def owned(base: Path, adapter: Path, whole: dict[str, torch.Tensor]) -> None:
    """Each rank has its experts' factors, and a step gathers none."""

    def refuse(*_: Any) -> None:
        raise AssertionError("factors were gathered")

    adapters.gather_parts = refuse  # type: ignore[assignment]
    model, rank = load(base, adapter, {"ep_size": 2}), dist.get_rank()
    for name, module in model.named_modules():
        if not hasattr(module, "parameter_name"):
            continue
        experts, r = module.num_experts, module.r["default"]
        mine = slice(rank * experts // 2, (rank + 1) * experts // 2)
        a, b = (whole[f"{name}.lora_{kind}.default.weight"] for kind in "AB")
        found_a, found_b = (factors["default"].weight.to_local() for factors in (module.lora_A, module.lora_B))
        torch.testing.assert_close(found_a, a.unflatten(0, (experts, r))[mine].flatten(0, 1), rtol=0, atol=0)
        torch.testing.assert_close(found_b, b.unflatten(1, (r, experts))[..., mine].flatten(1), rtol=0, atol=0)
        module.get_delta_weight("default").to_local().sum().backward()  # what PEFT's own forward would put in place
        for factors in (module.lora_A, module.lora_B):
            assert factors["default"].weight.grad.to_local().abs().max() > 0
    ids = tiny_batch(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()


def test_factors_lie_with_their_experts(folders: Any) -> None:
    base, adapter = folders("qwen3_moe")
    whole = {name: p.detach() for name, p in PeftModel.from_pretrained(tiny_model_at(base), adapter).named_parameters()}
    run_ranks(owned, 2, base, adapter, {name: p for name, p in whole.items() if ".experts." in name})


def merged(base: Path, adapter: Path) -> list[torch.Tensor]:
    model = load(base, adapter, {"ep_size": 2}).eval()
    with torch.no_grad():
        before = model(input_ids=tiny_batch(2, 16)).logits + 0
        model.merge_adapter()
        return [before, model(input_ids=tiny_batch(2, 16)).logits + 0]


@pytest.mark.parametrize("shared", [False, True])
def test_merging_keeps_the_logits(folders: Any, tmp_path: Path, shared: bool) -> None:
    base, adapter = folders("qwen3_moe")
    if shared:
        torch.manual_seed(3)
        adapter = tmp_path / "adapter"
        adapt(tiny_model_at(base), shared=True).save_pretrained(adapter)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_model_at(base), adapter)(input_ids=tiny_batch(2, 16)).logits
    for logits in run_ranks(merged, 2, base, adapter):
        for found in logits:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def tiny_model_at(base: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h"])
def test_other_flavours(folders: Any, model_type: str, tmp_path: Path) -> None:
    base, adapter = folders(model_type)
    expected = trained(load(base, adapter, None))
    compare(run_ranks(worker, 2, base, adapter, {"ep_size": 2}, tmp_path / "saved")[0], expected)


@pytest.mark.parametrize("name", ["ep 2", "fsdp 4, ep 2"])
def test_one_pair_for_all_experts(folders: Any, name: str, tmp_path: Path) -> None:
    base, _ = folders("qwen3_moe")
    torch.manual_seed(3)
    adapt(tiny_model_at(base), shared=True).save_pretrained(tmp_path / "adapter")
    ranks, setup = SETUPS[name]
    expected = trained(load(base, tmp_path / "adapter", None))
    factors = [weight for key, weight in expected[3].items() if ".experts." in key]
    assert {min(factor.shape) for factor in factors} == {4}, "one pair"
    for result in run_ranks(worker, ranks, base, tmp_path / "adapter", setup, tmp_path / "saved"):
        compare(result, expected)
    again = PeftModel.from_pretrained(tiny_model_at(base), tmp_path / "saved")
    found = {key: parameter for key, parameter in again.named_parameters() if key in expected[3]}
    assert found.keys() == expected[3].keys()
    for key, parameter in found.items():
        torch.testing.assert_close(parameter, expected[3][key], rtol=1e-4, atol=1e-5)


def new_adapter(base: Path, out: Path) -> torch.Tensor:
    model = load(base, None, {"ep_size": 2})
    model.save_pretrained(out)
    with torch.no_grad():
        return model(input_ids=tiny_batch(2, 16)).logits + 0


def test_ranks_that_draw_differently_train_one_adapter(folders: Any, tmp_path: Path) -> None:
    base, _ = folders("qwen3_moe")
    logits = run_ranks(new_adapter, 2, base, tmp_path / "saved")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_model_at(base), tmp_path / "saved")(
            input_ids=tiny_batch(2, 16)
        ).logits
    for found in logits:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # What AutoPeftModel loads, and not FSDP2's class.
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["auto_mapping"]
    assert saved == {
        "base_model_class": "Qwen3MoeForCausalLM",
        "parent_library": "transformers.models.qwen3_moe.modeling_qwen3_moe",
    }


def averaged(base: Path) -> list[int]:
    """The sizes of what is reduced in each of two backwards, whose gradients add up."""
    model = load(base, None, {"ep_size": 2})
    dense = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    for seed in (5, 6):
        ids = tiny_batch(1, 16, seed=seed + 2 * dist.get_rank())
        model(input_ids=ids, labels=ids).loss.backward()
    dist.all_reduce = all_reduce
    for parameter in dense:
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        mean = parameter.grad / 2
        dist.all_reduce(mean)
        torch.testing.assert_close(parameter.grad, mean)
    assert set(sizes) == {sum(parameter.numel() + 1 for parameter in dense)}  # each with whether it was reached
    return sizes


def test_dense_adapters_are_averaged_at_once(folders: Any) -> None:
    assert [len(sizes) for sizes in run_ranks(averaged, 2, folders("qwen3_moe")[0])] == [2, 2]


def gathered(base: Path, adapter: Path, out: Path) -> tuple[int, int]:
    """How many tensors were made whole while saving, and how many of the adapters' are spread."""
    model = load(base, adapter, {"ep_size": 2})
    spread = sum(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
    calls: list[None] = []
    original = DTensor.full_tensor

    def counted(self: DTensor, **kwargs: Any) -> torch.Tensor:
        calls.append(None)
        return original(self, **kwargs)

    DTensor.full_tensor = counted  # type: ignore[method-assign]
    model.save_pretrained(out)
    return len(calls), spread


def test_saving_gathers_no_base_weight(folders: Any, tmp_path: Path) -> None:
    base, adapter = folders("qwen3_moe")
    assert run_ranks(gathered, 2, base, adapter, tmp_path / "saved") == [(16, 16)] * 2


def unwritable(base: Path, adapter: Path, out: Path) -> str:
    model = load(base, adapter, {"ep_size": 2})
    if dist.get_rank() == 0:
        peft.peft_model.safe_save_file = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no space left"))
    with pytest.raises(RuntimeError, match="saving the model failed") as error:
        model.save_pretrained(out)
    return str(error.value)


def test_ranks_fail_together(folders: Any, tmp_path: Path) -> None:
    base, adapter = folders("qwen3_moe")
    said = run_ranks(unwritable, 2, base, adapter, tmp_path / "saved")
    assert said == ["saving the model failed on rank 0: OSError: no space left"] * 2


def refused(base: Path) -> str:
    model = slipstream.AutoModelForCausalLM.from_pretrained(base, distributed_setup={"ep_size": 2})
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\]: .* spread over ranks cannot be copied"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="spread over ranks") as error:
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["experts.down_proj_bias"]))
    return str(error.value)


def test_what_peft_cannot_do_on_several_ranks_is_refused(folders: Any) -> None:
    """Biases of experts, and copies of modules."""
    base, _ = folders("gpt_oss")
    assert all("leave it out of target_parameters" in said for said in run_ranks(refused, 2, base))


def all_linear(base: Path) -> tuple[float, int]:
    """ "all-linear", which PEFT takes to include experts and routers of this architecture."""
    model = slipstream.AutoModelForCausalLM.from_pretrained(base, distributed_setup={"ep_size": 2}).train()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert [*hf.experts_modules(model)]
    adapted(input_ids=tiny_batch(2, 16), labels=tiny_batch(2, 16)).loss.backward()
    grads = [full(p.grad) for p in adapted.parameters() if p.requires_grad]
    return float(torch.stack([grad.norm() for grad in grads]).norm()), len(grads)


def test_all_linear(folders: Any) -> None:
    base, _ = folders("qwen3_moe")
    first, second = run_ranks(all_linear, 2, base)
    assert first == second
    assert first[1] == 4 * 2 * (4 + 1 + 2)


def in_bf16(base: Path, setup: dict[str, Any] | None, by_hand: bool) -> dict[str, torch.Tensor]:
    """Gradients of adapters whose projections of attention compute in bf16."""
    model: Any = slipstream.AutoModelForCausalLM.from_pretrained(base, distributed_setup=setup, dtype=torch.bfloat16)
    model = adapted(model, target_modules=PROJECTIONS)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if by_hand:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    factors = (layer_of(model).lora_A["default"], layer_of(model).lora_B["default"])
    assert all(isinstance(factor.weight, DTensor) == by_hand for factor in factors)
    seen: list[torch.dtype] = []
    for factor in factors:
        factor.register_forward_hook(lambda _, given, out: seen.append(out.dtype))
    rows = tiny_batch(4, 16)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
    model(input_ids=rows, labels=rows).loss.backward()
    assert seen == [torch.bfloat16] * 2
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    return {name: full(grad).clone() for name, grad in grads.items()}


@pytest.mark.parametrize("by_hand", [False, True], ids=["ours", "with fully_shard"])
def test_projections_in_bf16(folders: Any, by_hand: bool) -> None:
    base, _ = folders("qwen3_moe")
    expected = in_bf16(base, None, False)
    first, second = run_ranks(in_bf16, 2, base, None if by_hand else {}, by_hand)
    assert first.keys() == second.keys() == expected.keys()
    for name, grad in first.items():
        assert torch.equal(grad, second[name]), name
        assert error(grad, expected[name]) < 0.02, name
