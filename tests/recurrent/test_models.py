"""Whole hybrid models over packed rows: what stands beside a document changes nothing, in either direction."""

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import slipstream
from slipstream import hf_recurrent
from slipstream.compilation import compile_layers
from slipstream.coverage.checks import packed_batch
from tests.distributed.harness import run_ranks
from tests.tiny_models import tiny_batch, tiny_model

TYPES = [
    "nemotron_h", "granitemoehybrid", "bamba", "qwen3_next", "olmo_hybrid", "kimi_linear", "lfm2_moe", "minimax",
]  # fmt: skip
LENGTHS = (9, 23, 7)


def _gradients(model: Any, batch: dict[str, Any], labels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, labels=labels, num_items_in_batch=10, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _neighbours() -> tuple[dict[str, Any], dict[str, Any], slice, torch.Tensor]:
    """Two packed rows that have the document in the middle in common, where it lies, and labels for it alone."""
    one, other = packed_batch(LENGTHS, seed=5), packed_batch(LENGTHS, seed=6)
    inside = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    other["input_ids"][:, inside] = one["input_ids"][:, inside]
    labels = torch.full_like(one["input_ids"], -100)
    labels[:, inside] = one["input_ids"][:, inside]
    labels[:, inside.start] = -100
    return one, other, inside, labels


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_moving_a_neighbour_changes_nothing(model_type: str, checkpointing: bool) -> None:
    model = slipstream.accelerate(tiny_model(model_type), backend={"attn": "slipstream"})  # as on a GPU
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    one, other, inside, labels = _neighbours()
    found, moved = (_gradients(model, batch, labels) for batch in (one, other))
    alone = one["input_ids"][:, inside]
    # A row of its own takes Transformers' path, which also says what the scans have to compute.
    expected = _gradients(model, {"input_ids": alone}, alone)
    size = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        assert (moved[name] - found[name]).abs().max() <= 1e-5 * size, name
        assert (found[name] - grad).abs().max() <= 2e-5 * size, name


def _on_two_ranks(path: Path) -> tuple[str, float, float]:
    """What scans in a model that FSDP2 shards, the size of a rank's gradients, and how far a neighbour moves them."""
    model: Any = slipstream.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, backend={"attn": "slipstream"}, distributed_setup={"ep_size": 2}
    )
    one, other, _, labels = _neighbours()
    found, moved = (
        {name: grad.to_local() for name, grad in _gradients(model.train(), batch, labels).items()}
        for batch in (one, other)
    )
    size = max(grad.abs().max().item() for grad in found.values() if grad.numel())
    apart = max((found[name] - moved[name]).abs().max().item() for name in found if found[name].numel())
    return slipstream.describe(model)["recurrent"].chosen, size, apart


def test_moving_a_neighbour_changes_nothing_under_fsdp2(tmp_path: Path) -> None:
    """FSDP2 gives a model a class in a file of its own."""
    tiny_model("nemotron_h").save_pretrained(tmp_path)
    for chosen, size, apart in run_ranks(_on_two_ranks, 2, tmp_path):
        assert chosen == "torch"
        assert apart <= 1e-5 * size
        assert size > 0


def test_positions_alone_say_where_documents_begin() -> None:
    model = slipstream.accelerate(tiny_model("nemotron_h")).eval()
    batch = packed_batch(LENGTHS, seed=5)
    with torch.no_grad():
        told = model(**batch, use_cache=False).logits
        found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    torch.testing.assert_close(found, told)


@pytest.mark.parametrize("model_type", ["nemotron_h", "granitemoehybrid", "qwen3_next", "minimax", "lfm2_moe"])
def test_positions_without_labels(model_type: str) -> None:
    """Where Transformers makes a cache unless told otherwise: of plain rows, but packed ones are kept apart."""
    plain = tiny_model(model_type).eval()
    plain.config.use_cache = True
    model = slipstream.accelerate(copy.deepcopy(plain), backend={"attn": "slipstream"})
    ids = tiny_batch(2, 12)
    batch = packed_batch(LENGTHS, seed=5)
    packed = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        for positions in (torch.arange(12)[None], torch.arange(12).repeat(2, 1)):
            found, expected = (one(input_ids=ids, position_ids=positions) for one in (model, plain))
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
            assert found.past_key_values is not None
        found = model(**packed)
        assert found.past_key_values is None
        assert torch.equal(found.logits, model(**packed, use_cache=False).logits)
        alone = [model(input_ids=part).logits for part in batch["input_ids"].split(LENGTHS, 1)]
        torch.testing.assert_close(found.logits, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


def test_plain_transformers_stays_as_it_is() -> None:
    """In the same process, and generation with a cache in an accelerated model."""
    plain = tiny_model("nemotron_h").eval()
    model = slipstream.accelerate(copy.deepcopy(plain))
    assert slipstream.describe(model)["recurrent"].chosen == "torch"
    assert "recurrent" not in {
        c.operation for c in slipstream.describe(slipstream.accelerate(tiny_model("llama"))).choices
    }
    ids = packed_batch(LENGTHS, seed=5)["input_ids"][:, :12]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain(input_ids=ids, use_cache=False).logits)
    written = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (plain, model)]
    assert torch.equal(*written)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        plain(**packed_batch(LENGTHS, seed=5), seq_idx=torch.zeros(1, 39, dtype=torch.int32), use_cache=False)


def _as_fla_has_it(original: Any, told: list[Any]) -> Any:
    """What `hf_recurrent.runs_package` takes for a package's, with fla's way to be told of documents: one row."""
    is_new_implementation = True

    def scan(
        query: Any, key: Any, value: Any, *, g: Any, beta: Any, use_qk_l2norm_in_kernel: bool, cu_seqlens: Any = None,
        output_final_state: bool = False, initial_state: Any = None, **_: Any,
    ) -> Any:  # fmt: skip
        assert is_new_implementation
        told.append(cu_seqlens)
        given = (query, key, value, g, beta)
        bounds = [0, query.shape[1]]
        if cu_seqlens is not None:
            assert query.shape[0] == 1, "fla takes one row"
            bounds = cu_seqlens.tolist()
        outs = []
        for start, end in itertools.pairwise(bounds):
            *one, g_one, beta_one = (tensor[:, start:end] for tensor in given)
            out, state = original(*one, g=g_one, beta=beta_one, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
            outs.append(out)
        return torch.cat(outs, 1), state

    return scan


@pytest.mark.parametrize("told_by", ["cu_seq_lens_q", "position_ids"])
@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen3_next", "torch_chunk_gated_delta_rule"), ("kimi_linear", "chunk_kimi_delta_attention")],
)
def test_a_package_is_told_where_documents_begin(
    model_type: str, name: str, told_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers hands fla's kernels what the caller gave, or nothing at all (Kimi's)."""
    plain, told = tiny_model(model_type), []
    one, other = packed_batch(LENGTHS, seed=5), packed_batch(LENGTHS, seed=6)
    if told_by == "position_ids":
        rows = {key: torch.cat([one[key], other[key]]) for key in ("input_ids", "position_ids")}
    else:
        rows = {key: value for key, value in one.items() if key != "position_ids"}
    model = slipstream.accelerate(copy.deepcopy(plain), backend={"attn": "slipstream"})
    expected = _gradients(model, rows, rows["input_ids"])
    original = hf_recurrent.recurrent_functions(plain)[name]
    monkeypatch.setitem(vars(sys.modules[type(plain).__module__]), name, _as_fla_has_it(original, told))
    model = slipstream.accelerate(plain, backend={"attn": "slipstream"})
    assert slipstream.describe(model)["recurrent"].chosen == "kernels"  # our convolution beside them
    found = _gradients(model, rows, rows["input_ids"])
    ends = [0, 9, 32, 39, 48, 71, 78][: 4 if told_by == "cu_seq_lens_q" else None]
    assert told
    assert all(bounds.tolist() == ends for bounds in told)
    size = max(grad.abs().max().item() for grad in expected.values())
    for key, grad in expected.items():
        assert (found[key] - grad).abs().max() <= 2e-5 * size, key


def test_steps_are_clamped_as_the_config_says() -> None:
    plain = tiny_model("nemotron_h", time_step_min=0.5)
    mixer = next(module for module in plain.modules() if hasattr(module, "time_step_limit"))
    assert mixer.time_step_limit[0] == 0.5  # Transformers': not the config's limit
    model = slipstream.accelerate(copy.deepcopy(plain))
    limits = {module.time_step_limit for module in model.modules() if hasattr(module, "time_step_limit")}
    assert limits == {tuple(model.config.time_step_limit)} == {(0.0, float("inf"))}
    assert not any(map(hf_recurrent.runs_package, hf_recurrent.recurrent_functions(model).values()))


@pytest.mark.parametrize(
    ("model_type", "packed"),
    [
        ("nemotron_h", True),
        pytest.param("lfm2_moe", False, marks=pytest.mark.slow),
        ("jetmoe", True),
        ("minimax", True),
    ],
)
def test_compiled_layers_are_one_graph_each(model_type: str, packed: bool) -> None:
    model = slipstream.accelerate(tiny_model(model_type))
    batch = packed_batch(LENGTHS, seed=5)
    labels = batch["input_ids"].clone()
    if not packed:
        batch = {"input_ids": batch["input_ids"]}
    expected = _gradients(model, batch, labels)
    compile_layers(model, backend="aot_eager")
    counters.clear()
    found = _gradients(model, batch, labels)
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]  # every layer is one graph
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize(
    "model_type", ["jamba", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_next", "jetmoe"))]
)
def test_loops_over_tokens_stay_outside_of_compiled_layers(model_type: str) -> None:
    """Inside, a graph has their steps one by one, for one length."""
    sizes: list[int] = []

    def look(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    backend = {"experts": "transformers"} if model_type == "jetmoe" else None
    model = slipstream.accelerate(tiny_model(model_type).eval(), backend=backend)
    batches = [tiny_batch(1, length) for length in (300, 37, 130)]
    with torch.no_grad():
        expected = [model(input_ids=ids, use_cache=False).logits for ids in batches]
        compile_layers(model, look)
        for number, (ids, logits) in enumerate(zip(batches, expected, strict=True)):
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, logits)
            if number == 1:  # some are made once more for what the first call could not know
                before = len(sizes)
    assert 0 < before == len(sizes)
    assert max(sizes) < 300, sizes
    torch.compiler.reset()
