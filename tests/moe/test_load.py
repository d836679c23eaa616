"""Counting the tokens of each expert, with layers as they are and compiled, and what follows from the counts."""

import math

import pytest
import torch
from torch import nn

import slipstream
from slipstream import hf
from slipstream.compilation import compile_layers
from slipstream.moe.balance import BiasBalancing, RouterNorms, check_routers, freeze_routers, load_health
from slipstream.moe.load import ExpertLoad, layer_name
from tests.distributed.harness import run_ranks
from tests.tiny_models import moe_architectures, tiny_batch, tiny_config, tiny_model

CPU = torch.device("cpu")
# Of the tiny models whose own forward runs in training as it is.
BIASED = ("deepseek_v3", "glm4_moe", "nemotron_h", "ernie4_5_moe", "afmoe", "lfm2_moe", "minimax_m2", "hy_v3")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def expected_counts(model: nn.Module, run, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens of each expert `[N, E]`, by bincount of the ids that each experts module is called with."""
    rows: dict[str, torch.Tensor] = {}
    handles = []
    for name, experts in hf.experts_modules(model):

        def record(module, args, name=name, experts=experts) -> None:
            ids = args[1] if mask is None else args[1][mask.flatten().bool()]
            rows[name] = torch.bincount(ids.flatten(), minlength=experts.num_experts)

        handles.append(experts.register_forward_pre_hook(record))
    run()
    for handle in handles:
        handle.remove()
    return torch.stack(list(rows.values()))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "nemotron_h", "gpt_oss"])
def test_counts_are_those_of_the_ids(model_type) -> None:
    model, ids = tiny_model(model_type), tiny_batch()
    load = ExpertLoad(model, CPU)
    wanted = expected_counts(model, lambda: model(input_ids=ids))
    assert wanted.sum(dim=1).unique().tolist() == [ids.numel() * 2]
    assert torch.equal(load.take(), wanted)
    assert load.take().sum() == 0
    for _ in range(3):
        model(input_ids=ids)
    assert torch.equal(load.take(), 3 * wanted)
    # Evaluation and generation do not count.
    model.eval()
    model(input_ids=ids)
    assert load.take().sum() == 0


def test_padding_does_not_count() -> None:
    model, ids = tiny_model("qwen3_moe"), tiny_batch()
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    load = ExpertLoad(model, CPU)
    load.see(mask)
    wanted = expected_counts(model, lambda: model(input_ids=ids, attention_mask=mask), mask)
    assert torch.equal(load.take(), wanted)
    assert wanted.sum(dim=1).unique().item() == int(mask.sum()) * 2
    load.see(None)
    model(input_ids=ids)
    assert load.take().sum(dim=1).unique().item() == ids.numel() * 2


def test_an_id_behind_the_last_expert_is_left_out() -> None:
    model = tiny_model("qwen3_moe")
    load = ExpertLoad(model, CPU)
    _, experts = next(hf.experts_modules(model))
    idx_TK = torch.tensor([[0, 8], [8, 3]])
    experts(torch.zeros(2, 64), idx_TK.clamp(max=7), torch.ones(2, 2))
    load.take()
    hook = next(iter(experts._forward_pre_hooks.values()))
    hook(experts, (torch.zeros(2, 64), idx_TK, torch.ones(2, 2)))
    assert load.take()[0].tolist() == [1, 0, 0, 1, 0, 0, 0, 0]


def step(model, ids, load=None, mask=None) -> torch.Tensor:
    if load is not None:
        load.see(mask)
    model.zero_grad()
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    ("checkpointing", "padded"),
    [("none", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("full", False), ("selective", True)))],
)
def test_compiled_layers_count_too_and_nothing_is_compiled_more(checkpointing, padded) -> None:
    """As many graphs as without counting, no graph break, whatever the batch's shape; the same counts and losses."""
    seen = []
    batches = [tiny_batch(), tiny_batch()[:, :-5], torch.cat([tiny_batch(), tiny_batch()])[:, :-3]]
    masks = [torch.ones_like(ids) if padded else None for ids in batches]
    for counted in (False, True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        setup = {"activation_checkpointing": checkpointing}
        model = slipstream.accelerate(tiny_model("qwen3_moe", None), distributed_setup=setup)
        model.config.use_cache = False
        load = ExpertLoad(model, CPU) if counted else None
        plain = [step(model, ids, load, mask) for ids, mask in zip(batches, masks, strict=True)]
        counts = None if load is None else load.take()
        compile_layers(model, "aot_eager")
        torch.testing.assert_close(
            [step(model, ids, load, mask) for ids, mask in zip(batches, masks, strict=True)], plain
        )
        counters = torch._dynamo.utils.counters
        seen.append((counters["stats"]["unique_graphs"], dict(counters["graph_break"])))
        if load is not None and counts is not None:
            compiled = load.take()
            shares = [of / of.sum(dim=1, keepdim=True) for of in (counts.float(), compiled.float())]
            torch.testing.assert_close(*shares)
    assert seen[0] == seen[1]
    assert not seen[0][1]


@pytest.mark.slow
def test_layers_that_were_compiled_before_count_as_well() -> None:
    model, ids = slipstream.accelerate(tiny_model("qwen3_moe", None)), tiny_batch()
    model.config.use_cache = False
    compile_layers(model, "aot_eager")
    step(model, ids)
    load = ExpertLoad(model, CPU)
    step(model, ids)
    assert load.take().sum(dim=1).unique().tolist() == [ids.numel() * 2]


def test_health() -> None:
    loads = torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0], [3, 1, 0, 0]])
    health = {name: value.tolist() for name, value in load_health(loads, [4, 4, 2]).items()}
    assert health["load_max_over_mean"] == [1, 4, 1.5]
    assert health["dead_experts"] == [0, 3, 0]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert health["load_entropy"] == pytest.approx([1, 0, entropy])
    assert all(torch.isfinite(value).all() for value in load_health(torch.zeros(2, 4).long(), [4, 4]).values())


def test_layer_names() -> None:
    assert layer_name("model.layers.12.mlp.experts") == "12"
    assert layer_name("base_model.model.model.layers.3.mlp.experts.base_layer") == "3"
    assert layer_name("mtp.layers.1.mtp_block.mlp.experts") == "mtp 1"
    assert layer_name("experts") == "experts"


@pytest.mark.parametrize("model_type", moe_architectures())
def test_every_architecture_has_one_router_a_layer(model_type) -> None:
    """Freezing stops its parameters, and no others."""
    model = tiny_model(model_type)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    experts = [name for name, _ in hf.experts_modules(model)]
    assert [name for name, *_ in hf.routers(model)] == experts
    assert freeze_routers(model) == len(experts)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad} & trained
    assert frozen == {name for name in trained if {"gate", "router"} & set(name.split("."))}


def test_frozen_routers_get_no_gradient() -> None:
    model = tiny_model("qwen3_moe")
    freeze_routers(model)
    step(model, tiny_batch())
    assert RouterNorms(model).take() is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_dense_model_has_no_router() -> None:
    model = tiny_model("llama")
    assert ExpertLoad(model, CPU).layers == []
    with pytest.raises(ValueError, match=r"freeze_router: LlamaForCausalLM has no router"):
        check_routers(model, True, 0.0)
    with pytest.raises(ValueError, match=r"update_rate=0.001: the routers of LlamaForCausalLM have no bias"):
        BiasBalancing(model, 0.001)
    assert RouterNorms(model).take() is None


def test_router_gradient_norms() -> None:
    model = tiny_model("qwen3_moe")
    assert RouterNorms(model).take() is None
    step(model, tiny_batch())
    norms = RouterNorms(model).take()
    wanted = [router.weight.grad.norm() for _, _, router, _ in hf.routers(model)]
    torch.testing.assert_close(norms, torch.stack(wanted))


@pytest.mark.parametrize("model_type", BIASED)
def test_balancing_moves_each_bias_against_its_load(model_type) -> None:
    model = tiny_model(model_type)
    balancing = BiasBalancing(model, 0.5)
    assert len(balancing.biases) == len(list(hf.routers(model)))
    before = [bias.clone().flatten() for _, bias in balancing.biases]
    counts = torch.tensor([[4, 0, 2, 2, 2, 2, 2, 2]]).expand(len(before), 8)
    balancing.update(counts)
    for old, (_, bias) in zip(before, balancing.biases, strict=True):
        assert (bias.flatten() - old).tolist() == pytest.approx([-0.5, 0.5, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("model_type", ["deepseek_v3", "nemotron_h", "minimax_m2"])
def test_balancing_balances(model_type) -> None:
    """From a choice that favours some experts, group-limited top-k included."""
    model, ids = tiny_model(model_type), tiny_batch(4, 64)
    load, balancing = ExpertLoad(model, CPU), BiasBalancing(model, 0.01)
    for _, bias in balancing.biases:
        bias.copy_(torch.linspace(0, 0.4, 8))
    ratios = []
    for _ in range(60):
        with torch.no_grad():
            model(input_ids=ids)
        counts = load.take()
        ratios.append(load_health(counts, load.num_experts)["load_max_over_mean"].mean().item())
        balancing.update(counts)
    assert ratios[0] > 1.7
    assert sum(ratios[-5:]) / 5 < 1.35


def test_bias_of_a_bfloat16_model_is_kept_exact() -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(tiny_config("nemotron_h"), dtype=torch.bfloat16)
    _, _, router, _ = next(hf.routers(model))
    router.e_score_correction_bias.fill_(8.0)
    balancing = BiasBalancing(model, 0.001)
    balancing.update(torch.tensor([[4, 0, 2, 2, 2, 2, 2, 2]] * 2))
    assert router.e_score_correction_bias[:2].tolist() == pytest.approx([7.999, 8.001], abs=1e-5)
    model(input_ids=tiny_batch())


# On two ranks


def spread(model_type: str, folder: str, setup: dict, compiled: bool) -> dict:
    """Counts, gradient norms and biases of a model over two ranks, each with half of the batch."""
    import torch.distributed as dist

    from slipstream.moe.load import sum_over_ranks

    model = slipstream.AutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup).train()
    model.config.use_cache = False
    load = ExpertLoad(model, CPU)
    if compiled:
        compile_layers(model, "aot_eager")
    ids = tiny_batch().chunk(2)[dist.get_rank()]
    step(model, ids, load, torch.ones_like(ids))
    own = load.take()
    counts = sum_over_ranks(own.clone())
    norms = RouterNorms(model).take()
    found = {"own": own, "counts": counts, "norms": norms}
    if model_type != "qwen3_moe":
        balancing = BiasBalancing(model, 0.5)
        balancing.update(counts)
        biases = [bias.full_tensor() if hasattr(bias, "full_tensor") else bias for _, bias in balancing.biases]
        found["biases"] = [bias.detach().clone() for bias in biases]
    return found


SPREAD = [
    pytest.param("qwen3_moe", 1, True, marks=pytest.mark.slow),
    ("afmoe", 2, False),
    pytest.param("deepseek_v3", 2, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model_type", "ep_size", "compiled"), SPREAD)
def test_two_ranks_see_what_one_sees(model_type, ep_size, compiled, tmp_path) -> None:
    """Each counts its own tokens, by global ids also where it holds half of the experts; biases stay equal."""
    model, ids = tiny_model(model_type, None), tiny_batch()
    model.save_pretrained(tmp_path)
    load = ExpertLoad(model, CPU)
    step(model, ids)
    counts, norms = load.take(), RouterNorms(model).take()
    results = run_ranks(spread, 2, model_type, str(tmp_path), {"ep_size": ep_size}, compiled, timeout=180)
    for result in results:
        assert torch.equal(result["counts"], counts)
        torch.testing.assert_close(result["norms"], norms, rtol=1e-4, atol=1e-6)
    assert torch.equal(results[0]["own"] + results[1]["own"], counts)
    assert not torch.equal(results[0]["own"], results[1]["own"])
    if model_type != "qwen3_moe":
        balancing = BiasBalancing(model, 0.5)
        balancing.update(counts)
        for layer, (_, bias) in enumerate(balancing.biases):
            for result in results:
                torch.testing.assert_close(result["biases"][layer], bias.detach())
