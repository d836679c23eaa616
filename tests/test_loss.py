"""Deferred logits against ordinary ones, and the loss on them against Transformers'."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slipstream
from slipstream.coverage.tiny import tiny_model as coverage_tiny_model
from slipstream.deferred_logits import DeferredLogits
from tests.tiny_models import tiny_batch, tiny_model


@pytest.fixture
def pair():
    plain = tiny_model("qwen3_moe")
    return plain, slipstream.accelerate(copy.deepcopy(plain))


def test_logits_are_deferred_with_labels_and_ordinary_without(pair) -> None:
    plain, ours = pair
    ids = tiny_batch()
    out = ours(input_ids=ids, labels=ids)
    assert isinstance(out.logits, DeferredLogits)
    assert out.logits.shape == (*ids.shape, 256)
    assert out.logits.dtype == torch.float32
    assert type(ours(input_ids=ids).logits) is torch.Tensor
    expected = plain(input_ids=ids).logits
    torch.testing.assert_close(out.logits + 0, expected)
    torch.testing.assert_close(torch.stack([out.logits]).squeeze(0), expected)
    assert out.logits.argmax(-1).tolist() == expected.argmax(-1).tolist()
    assert type(out.logits.detach()) is torch.Tensor
    assert out.logits.tolist() == out.logits.detach().tolist()
    assert repr(out.logits).startswith("tensor(")


def test_a_head_that_was_made_anew_defers(pair) -> None:
    plain, ours = pair
    ids = tiny_batch()
    for model in pair:
        model.resize_token_embeddings(300)
    ours.load_state_dict(plain.state_dict())
    out = ours(input_ids=ids, labels=ids)
    assert isinstance(out.logits, DeferredLogits)
    assert out.logits.shape[-1] == 300
    torch.testing.assert_close(out.loss, plain(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "granitemoe", "granitemoehybrid"])
def test_training_makes_no_cache(model_type: str) -> None:
    """However `use_cache` reaches the decoder."""
    model = slipstream.accelerate(tiny_model(model_type))
    ids = tiny_batch()
    assert model(input_ids=ids, labels=ids).past_key_values is None
    assert model(input_ids=ids, labels=ids, use_cache=True).past_key_values is not None
    assert model(input_ids=ids).past_key_values is not None


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
def test_loss_arguments_of_transformers(pair, items, shifted) -> None:
    ids = tiny_batch()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    extra = {"shift_labels": F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()} if shifted else {}
    losses = [model(input_ids=ids, labels=labels, num_items_in_batch=items, **extra).loss for model in pair]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("items", [None, 7], ids=["mean", "items"])
@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
@pytest.mark.parametrize("materialized", [False, True], ids=["deferred", "ordinary"])
def test_z_loss(pair, items, shifted, materialized) -> None:
    plain, ours = pair
    ids = tiny_batch()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    next_labels = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    out = plain(input_ids=ids, labels=labels, num_items_in_batch=items)
    squares = out.logits.logsumexp(-1).square()[next_labels != -100]
    expected = out.loss + 0.01 * (squares.mean() if items is None else squares.sum() / items)
    extra = {"shift_labels": next_labels} if shifted else {}
    if materialized:
        logits = ours(input_ids=ids).logits
        loss = ours.loss_function(logits, labels, 256, num_items_in_batch=items, z_loss=0.01, **extra)
    else:
        loss = ours(input_ids=ids, labels=labels, num_items_in_batch=items, z_loss=0.01, **extra).loss
    torch.testing.assert_close(loss, expected)
    expected.backward()
    loss.backward()
    for got, wanted in zip(ours.parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("items", [None, 7], ids=["mean", "items"])
def test_only_labels_ignored(pair, items) -> None:
    ids = tiny_batch()
    losses, grads = [], []
    for model in pair:
        loss = model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss
        loss.backward()
        losses.append(loss)
        grads.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*losses, equal_nan=True)
    torch.testing.assert_close(*grads)
    assert losses[0].isnan() == (items is None)


@pytest.mark.parametrize("model_type", ["opt", "bart", "cpmant", "whisper", "xlm", "xlnet"])
def test_architectures_that_call_cross_entropy_themselves(model_type: str, monkeypatch) -> None:
    plain = coverage_tiny_model(model_type)
    ours = slipstream.accelerate(copy.deepcopy(plain))
    ids = tiny_batch(2, 24)
    monkeypatch.setattr(DeferredLogits, "materialize", lambda self: pytest.fail("the logits were built"))
    losses = []
    for model in (plain, ours):
        torch.manual_seed(0)
        losses.append(model(input_ids=ids, labels=ids.masked_fill(ids < 30, -100)).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    heads = [model.get_output_embeddings().weight.grad for model in (plain, ours)]
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-6)


def test_a_loss_of_its_own_is_said() -> None:
    report = slipstream.describe(slipstream.accelerate(coverage_tiny_model("prophetnet")))
    assert (report["loss"].chosen, report["loss"].why) == ("transformers", "the model has a loss of its own")


def test_all_at_once() -> None:
    """Soft-capped logits, ignored labels, accumulated steps, a z-loss and a backward that is scaled."""
    plain = tiny_model("gemma2", None, final_logit_softcapping=3.0)
    ours = slipstream.accelerate(copy.deepcopy(plain))
    ids = tiny_batch()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    out = plain(input_ids=ids, labels=labels, num_items_in_batch=50)
    squares = out.logits.logsumexp(-1).square()[:, :-1][labels[:, 1:] != -100]
    expected = out.loss + 0.01 * squares.sum() / 50
    result = ours(input_ids=ids, labels=labels, num_items_in_batch=50, z_loss=0.01)
    assert isinstance(result.logits, DeferredLogits)
    torch.testing.assert_close(result.loss, expected)
    (expected * 0.3).backward()
    (result.loss * 0.3).backward()
    for got, wanted in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-5)


def test_positional_labels_count_as_labels(pair) -> None:
    ids = tiny_batch()
    out = pair[1](ids, None, None, None, None, ids)
    assert isinstance(out.logits, DeferredLogits)


def test_evaluation_defers_too(pair) -> None:
    plain, ours = pair
    ids = tiny_batch()
    with torch.no_grad():
        out, expected = ours.eval()(input_ids=ids, labels=ids), plain.eval()(input_ids=ids, labels=ids)
    assert isinstance(out.logits, DeferredLogits)
    torch.testing.assert_close(out.loss, expected.loss)


def test_autocast() -> None:
    ids = tiny_batch()
    losses, grads = [], []
    plain = tiny_model("llama", None)
    for model in (plain, slipstream.accelerate(copy.deepcopy(plain))):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids, labels=ids)
            assert out.logits.dtype == torch.bfloat16
        out.loss.backward()
        losses.append(out.loss)
        grads.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(*grads, rtol=0.1, atol=2e-3)


def test_deepcopy_owns_its_weights(pair) -> None:
    _, ours = pair
    ids = tiny_batch()
    before = ours(input_ids=ids, labels=ids).loss
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        ours.lm_head.weight.zero_()
    torch.testing.assert_close(twin(input_ids=ids, labels=ids).loss, before)


def test_pickle_keeps_the_loss_and_admits_that_the_speed_is_gone(pair) -> None:
    _, ours = pair
    ids = tiny_batch()
    before = ours(input_ids=ids, labels=ids).loss
    restored = pickle.loads(pickle.dumps(ours))
    torch.testing.assert_close(restored(input_ids=ids, labels=ids).loss, before)
    with pytest.raises(ValueError, match="was not accelerated"):
        slipstream.describe(restored)
    assert slipstream.describe(slipstream.accelerate(restored))["loss"].chosen == "fused"
    assert isinstance(restored(input_ids=ids, labels=ids).logits, DeferredLogits)


def test_a_head_that_is_not_linear_keeps_transformers_loss() -> None:
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = tiny_model("llama")
    head = Scaled(64, 256, bias=False)
    model.set_output_embeddings(head)
    report = slipstream.describe(slipstream.accelerate(model))
    assert report["loss"].chosen == "transformers"
    assert "Scaled" in report["loss"].why
