"""Packing: no token is lost or seen by another document, and training on packed rows is training on the rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig

import slipstream
from slipstream.bench.presets import build_config
from slipstream.train.data import FEATURES
from slipstream.train.formats import IGNORE
from slipstream.train.packing import LENGTHS, TOKENS, Collator, check_packing, count_tokens, pack
from slipstream.train.recipe_file import load_recipe
from slipstream.train.run import prepare, run
from tests.tiny_models import tiny_config, tiny_model
from tests.train.tiny_chat import write_jsonl, write_recipe

S = 24


def documents(first: int = 0) -> Dataset:
    """Documents of 5, 7, 9, … tokens; `first` changes the first one's tokens only."""
    ids = [[(3 * i + 7 * j + (first if i == 0 else 0)) % 90 + 5 for j in range(5 + 2 * i)] for i in range(6)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids}, features=FEATURES)


def test_every_document_is_whole_in_one_row() -> None:
    packed = pack(documents(), S)
    assert isinstance(packed, Dataset)
    found = []
    for row in packed:
        assert len(row["input_ids"]) == sum(row[LENGTHS]) <= S
        start = 0
        for length in row[LENGTHS]:
            found.append(row["input_ids"][start : start + length])
            start += length
    assert sorted(found) == sorted(documents()["input_ids"])
    assert len(packed) == 3  # 60 tokens; best fit needs no fourth row


def test_batches_of_packed_rows_have_one_shape() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3], LENGTHS: [2, 1]},
            {"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7], LENGTHS: [4]}]  # fmt: skip
    batch = Collator(pad_token_id=0, max_length=4)(rows)
    # The space left over comes last, as a document without labels that repeats the first tokens.
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 2, IGNORE, IGNORE, 5, 6, 7, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2, 3, 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 3, 7, 8]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == 4
    assert count_tokens(batch) == 7
    assert TOKENS not in batch
    full = Collator(pad_token_id=0, max_length=4)(rows[1:])
    assert full["cu_seq_lens_q"].tolist() == [0, 4]
    long = Collator(pad_token_id=0, max_length=10)([{"input_ids": [4, 5, 6], "labels": [4, 5, 6], LENGTHS: [3]}])
    assert long["input_ids"].tolist() == [[4, 5, 6, 4, 5, 6, 4, 5, 6, 4]]
    padded = Collator(pad_token_id=0)([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert count_tokens(padded) == 7


@pytest.mark.parametrize("packed", [False, True])
def test_copies_without_labels_are_not_counted(packed: bool) -> None:
    row = {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3], LENGTHS: [3]}
    rows = [row, {**row, "labels": [IGNORE] * 3}]
    if not packed:
        rows = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    assert count_tokens(Collator(pad_token_id=0, max_length=4)(rows)) == 3


def test_space_left_over_sends_no_gradient_astray() -> None:
    """The gradients of a balanced deep model whose padding is embedded as zeros stay finite."""
    torch.manual_seed(0)
    config = tiny_config("qwen3_moe", num_hidden_layers=16, initializer_range=0.16, pad_token_id=0)
    model = slipstream.AutoModelForCausalLM.from_config(config).train()
    assert not model.get_input_embeddings().weight[0].any()
    row = {"input_ids": [*range(1, 25)], "labels": [*range(1, 25)], LENGTHS: [24]}
    batch = Collator(pad_token_id=0, max_length=32)([row])
    count_tokens(batch)
    by_padding = {**batch, "input_ids": batch["input_ids"].clone()}
    by_padding["input_ids"][0, 24:] = 0
    norms = []
    for inputs in (batch, by_padding):
        model.zero_grad()
        model(**inputs, output_router_logits=True, use_cache=False).loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    assert norms[0] < 1e3
    assert not norms[1] < 1e6


@pytest.mark.parametrize("attn", ["auto", "slipstream"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe"])
def test_a_neighbour_changes_nothing(architecture: str, attn: str) -> None:
    """The loss and the gradients of all documents but the first, when the first one's tokens are others."""
    model = slipstream.accelerate(tiny_model(architecture).float(), backend={"attn": attn})
    results = []
    for first in (0, 11):
        packed = pack(documents(first), S)
        (index,) = [i for i, lengths in enumerate(packed[LENGTHS]) if 5 in lengths]
        row = packed[index]
        assert len(row[LENGTHS]) > 1
        # No label in the first document: the gradients then are the others' alone.
        start = sum(row[LENGTHS][: row[LENGTHS].index(5)])
        row["labels"][start : start + 5] = [IGNORE] * 5
        batch = Collator(pad_token_id=0, max_length=S)([row])
        del batch[TOKENS]
        assert (batch["labels"] != IGNORE).any()
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), gradients))
    (loss, before), (other, after) = results
    assert other == pytest.approx(loss, rel=1e-6)
    for name, gradient in before.items():
        # Other rows go to other experts beside them, so sums have another order.
        error = (after[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-5, (name, error)


def test_the_first_document_would_be_seen_without_its_boundaries() -> None:
    """The test above can fail: as one document, the same tokens give another loss."""
    model = slipstream.accelerate(tiny_model("qwen3_moe").float())
    losses = []
    for first in (0, 11):
        ids = torch.tensor([documents(first)["input_ids"][0] + documents(first)["input_ids"][1]])
        labels = ids.clone()
        labels[:, :5] = IGNORE
        losses.append(model(input_ids=ids, labels=labels, use_cache=False).loss.item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_packed_training_equals_padded(tmp_path: Path, checkpoint: Path) -> None:
    """All rows in one step: the same loss and the same gradient norm, with padding or without."""
    curves = []
    for packing in (False, True):
        folder = tmp_path / str(packing)
        folder.mkdir()
        train = {"per_device_train_batch_size": 16, "max_steps": 2, "lr_scheduler_type": "constant"}
        path = write_recipe(folder, checkpoint, data={"packing": packing}, train=train)
        rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}, I say." * (1 + i % 3)} for i in range(20)]
        write_jsonl(folder / "rows.jsonl", rows)
        recipe, _ = load_recipe(path)
        data = prepare(recipe, overwrite=False).data
        if packing:
            assert data.counts.packed_rows == len(data.train) < 16
        assert run(recipe, file=(folder / "screen").open("w")) is not None
        lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        curves.append([(line["loss"], line["grad_norm"], line["tokens"]) for line in lines if "loss" in line])
    for packed, padded in zip(curves[1], curves[0], strict=True):
        assert packed == pytest.approx(padded, rel=1e-5)


@pytest.mark.parametrize("preset", ["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3", "mixtral-8x7b", "llama-3.2-1b"])
def test_attention_keeps_documents_apart(preset: str) -> None:
    check_packing(build_config(preset))


@pytest.mark.parametrize(
    "name", ["nemotron_h", "qwen3_next", "granitemoehybrid", "kimi_linear", "lfm2_moe", "lfm3", "minimax"]
)
def test_states_that_begin_anew_keep_documents_apart(name: str) -> None:
    check_packing(tiny_config(name))  # tests/recurrent/test_models.py shows that they do


@pytest.mark.parametrize("name", ["jamba", "inkling_text", "rwkv", "opt", "bart"])
def test_layers_with_a_state_are_refused(name: str) -> None:
    config: Any = AutoConfig.for_model(name)
    with pytest.raises(ValueError, match=r"data\.packing: .*; set data\.packing: false"):
        check_packing(config)
