"""Models whose tokens travel by stores into other ranks' memory; on a CPU run by `test_nvlink.test_interpreted`."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model

from slipstream import AutoModelForCausalLM, fp8, kernels
from slipstream.adapters import all_experts
from slipstream.compilation import compile_layers
from slipstream.moe import grouped_mm
from slipstream.moe.dispatch import NvlinkDispatcher
from tests.distributed.test_adapters import adapt
from tests.distributed.test_nvlink import DEVICE, gpus, run, runnable
from tests.distributed.test_training import full, worst
from tests.kernels.conditions import INTERPRETED
from tests.tiny_models import sgd_losses, tiny_batch, tiny_config, tiny_model


def _train(
    dispatcher: str, compiled: bool, adapted: bool = False, experts: str = "auto", checkpointing: str = "none"
) -> tuple[list[float], int]:
    """Losses of a tiny model over two steps, and how many graphs its layers had, or -1 if one of them broke."""
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    if DEVICE == "cuda":
        torch.cuda.set_device(dist.get_rank())
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            tiny_config("qwen3_moe", num_hidden_layers=2),
            backend={"dispatcher": dispatcher, "compile": "none", "experts": experts},
            distributed_setup={"ep_size": dist.get_world_size(), "activation_checkpointing": checkpointing},
            dtype=torch.bfloat16 if experts == "fp8" else torch.float32,
        )  # fmt: skip
    if adapted:
        lora = LoraConfig(r=4, target_modules=[], target_parameters=all_experts(model), init_lora_weights=False)
        model = get_peft_model(model, lora)
    if compiled:
        compile_layers(model, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    generator, rank = torch.Generator().manual_seed(dist.get_rank()), dist.get_rank()
    ids = (torch.randint(0, 64, (1, 6 + 3 * step * rank), generator=generator) for step in range(2))
    losses = sgd_losses(model, (row.to(DEVICE) for row in ids))
    counters = torch._dynamo.utils.counters
    return losses, -1 if counters["graph_break"] else counters["stats"]["unique_graphs"]


class Adapted(NamedTuple):
    model_type: str
    only: str = ""  # the projection that has an adapter, not both
    shared: bool = False
    twice: bool = False
    in_4bit: bool = False


def _adapters_gradients(cases: dict[Adapted, Path]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The loss of the model and the adapter in each folder, and the gradients, on as many ranks as there are."""
    ranks, rank, setup, backend = 1, 0, None, {"compile": "none"}
    if dist.is_initialized():
        ranks, rank, setup, backend["dispatcher"] = dist.get_world_size(), dist.get_rank(), {"ep_size": 2}, "nvlink"
        NvlinkDispatcher.dispatch = None  # type: ignore[method-assign, assignment]  # what a fallback would call
    found = []
    for case, folder in cases.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_setup=setup, backend=backend, load_in_4bit=case.in_4bit
        )
        model = PeftModel.from_pretrained(model.train(), folder / "adapter", is_trainable=True)
        if case.twice:
            model.load_adapter(folder / "adapter", "other", is_trainable=True)
            model.base_model.set_adapter(["default", "other"])
        ids = tiny_batch(2, 8)[rank * 2 // ranks : (rank + 1) * 2 // ranks]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        grads = {name: full(p.grad) for name, p in model.named_parameters() if p.requires_grad}
        found.append((mean.item() / ranks, grads))
    return found


@pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreted")
def test_adapters_train_as_in_one_process(tmp_path: Path) -> None:
    """The same loss and gradients, without a dispatch around the experts."""
    cases = {
        Adapted("qwen3_moe", twice=True): {"target_modules": ["o_proj"]},  # one that is not FSDP2's either
        Adapted("qwen3_moe", only="gate_up_proj", shared=True): {"use_rslora": True},
        Adapted("gpt_oss", in_4bit=True): {},  # with biases
    }
    folders = {case: tmp_path / str(position) for position, case in enumerate(cases)}
    for case, settings in cases.items():
        model = tiny_model(case.model_type, None, num_hidden_layers=1)
        model.save_pretrained(folders[case])
        targets = [name for name in all_experts(model) if name.endswith(case.only)]
        adapt(model, case.shared, target_parameters=targets, **settings).save_pretrained(folders[case] / "adapter")
    expected = _adapters_gradients(folders)
    for results in run(_adapters_gradients, 2, folders):
        for case, (loss, grads), (wanted, references) in zip(cases, results, expected, strict=True):
            assert loss == pytest.approx(wanted, rel=1e-5), case
            factors = [grad for name, grad in grads.items() if ".experts." in name]
            assert {min(factor.shape) == 4 for factor in factors} == {case.shared}
            error, name = worst(grads, references)
            assert error < 1e-4, (case, name)


@pytest.mark.slow
@runnable
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])
def test_a_model_trains_as_with_all_to_all(adapted: bool) -> None:
    expected, found = (run(_train, 2, *how, adapted) for how in (("all_to_all", False), ("nvlink", True)))
    for (losses, graphs), (wanted, _) in zip(found, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-4)
        # With frozen weights what enters the first layer needs no gradient, which is a graph of its own.
        assert graphs == (2 if adapted else 1), "compiled layers share a graph, which contains the exchange"


def _train_each(*cases: tuple[Any, ...]) -> list[tuple[list[float], int]]:
    return [_train(*case) for case in cases]


@runnable
def test_layers_that_are_computed_again_compile() -> None:
    for (wanted, _), (losses, graphs) in run(
        _train_each, 2, ("nvlink", False), ("nvlink", True, False, "auto", "full")
    ):
        assert losses == pytest.approx(wanted, rel=1e-4)
        assert graphs == 1


def _train_in_fp8(*dispatchers: str) -> list[tuple[list[float], int]]:
    """Losses with each, and how many GEMMs were in FP8."""
    fp8.obstacle = lambda device: None
    if INTERPRETED:
        kernels.fp8.DTYPE = torch.float32  # the interpreter cannot cast to e4m3: see tests/kernels/test_fp8.py
    calls, original = [], grouped_mm.grouped_mm_fp8

    def counted(*operands: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return original(*operands)

    grouped_mm.grouped_mm_fp8 = counted
    found = []
    for dispatcher in dispatchers:
        losses, _ = _train(dispatcher, compiled=False, experts="fp8")
        found.append((losses, len(calls)))
        calls.clear()
    return found


@pytest.mark.slow
@runnable
@pytest.mark.skipif(gpus > 1 and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper GPUs")
def test_a_model_trains_in_fp8_as_with_all_to_all() -> None:
    for (wanted, others), (losses, calls) in run(_train_in_fp8, 2, "all_to_all", "nvlink"):
        assert losses == pytest.approx(wanted, rel=1e-2)
        assert calls == others == 16, "two GEMMs forward and two back, in two layers, at two steps"
