"""Deferred logits against ordinary ones, and the loss on them against Transformers'."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slipstream
from slipstream.loss import DeferredLogits
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


def test_touched_logits_carry_gradients(pair) -> None:
    plain, ours = pair
    ids = tiny_batch()
    ours(input_ids=ids, labels=ids).logits.square().mean().backward()
    plain(input_ids=ids).logits.square().mean().backward()
    torch.testing.assert_close(ours.lm_head.weight.grad, plain.lm_head.weight.grad)
    torch.testing.assert_close(ours.model.embed_tokens.weight.grad, plain.model.embed_tokens.weight.grad)


def test_logits_read_after_the_head_changed_are_refused(pair) -> None:
    _, ours = pair
    ids = tiny_batch()
    out = ours(input_ids=ids, labels=ids)
    out.loss.backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"read out\.logits before backward"):
        out.logits.sum()


def test_logits_have_a_graph_where_the_forward_had_one(pair) -> None:
    """Wherever they are read."""
    _, ours = pair
    ids = tiny_batch()
    with torch.no_grad():
        out = ours(input_ids=ids, labels=ids)
    assert not out.logits.requires_grad
    assert out.logits.numpy().shape == (*ids.shape, 256)
    assert not (out.logits * 2).requires_grad
    with torch.inference_mode():
        out = ours(input_ids=ids, labels=ids)
    out.logits.argmax(-1)
    out = ours(input_ids=ids, labels=ids)
    with torch.no_grad():
        assert not out.logits.float().mul(2).requires_grad
        out.logits.argmax(-1)
    out.logits.sum().backward()
    assert ours.lm_head.weight.grad is not None


def test_hooks_wait_for_the_tensor(pair) -> None:
    plain, ours = pair
    ids = tiny_batch()
    seen: list[str] = []
    grads = []
    for model in (plain, ours):
        logits = model(input_ids=ids, labels=ids).logits
        assert logits.requires_grad
        assert logits._base is None or model is plain
        logits.register_hook(lambda grad: seen.append("looked"))
        logits.register_hook(lambda grad: grad * 3)
        logits.register_hook(lambda grad: seen.append("removed")).remove()
        assert model is plain or logits._tensor is None
        logits.square().mean().backward()
        grads.append(model.lm_head.weight.grad)
    assert seen == ["looked"] * 2
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        logits = ours(input_ids=ids, labels=ids).logits
    with pytest.raises(RuntimeError, match="doesn't require gradient"):
        logits.register_hook(print)


@pytest.mark.parametrize("later", [lambda z: z.float(), lambda z: z * 2.0, lambda z: z[..., :50], lambda z: z.tanh()])
def test_hooks_hear_of_what_is_made_of_logits_and_keep_nothing_alive(pair, later) -> None:
    _, ours = pair
    ids, seen = tiny_batch(), []
    logits = ours(input_ids=ids, labels=ids).logits
    logits.register_hook(seen.append)
    later(logits).square().mean().backward()
    assert len(seen) == 1
    gone = weakref.ref(logits.materialize())
    del logits
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("later", [lambda z: z.float(), lambda z: z * 1.0, lambda z: z / 1.0, lambda z: z[..., :150]])
def test_changes_in_place_stay(pair, later) -> None:
    _, ours = pair
    ids = tiny_batch()
    with torch.no_grad():
        logits = ours(input_ids=ids, labels=ids).logits
        logits[..., :100] = -torch.inf
        assert later(logits).softmax(-1)[..., :100].sum() == 0
        logits.div_(2)
        assert torch.equal(later(logits), later(logits + 0))


def test_what_was_made_of_logits_before_is_a_copy_or_a_slice_of_them(pair) -> None:
    """As of any tensor."""
    _, ours = pair
    ids, seen = tiny_batch(), []
    logits = ours(input_ids=ids, labels=ids).logits
    copy, columns = logits.float(), logits[..., :50]
    logits.register_hook(seen.append)
    with torch.no_grad():
        columns[..., :10] = 7.0
        logits[..., 10:20] = 7.0
    assert (columns[..., :20] == 7).all()
    assert (logits[..., :20] == 7).all()
    assert not (copy == 7).any()
    columns.square().sum().backward()
    assert len(seen) == 1


def test_all_columns_and_weights_that_were_exchanged(pair) -> None:
    _, ours = pair
    ids = tiny_batch()
    out = ours(input_ids=ids, labels=ids)
    assert out.logits[..., :].shape == out.logits.shape
    out = ours(input_ids=ids, labels=ids)
    ours.lm_head.weight.data = torch.zeros_like(ours.lm_head.weight)  # as an average of weights is put in their place
    with pytest.raises(RuntimeError, match="the output head has changed"):
        out.logits.sum()


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


def test_what_models_do_to_their_logits_stays_deferred(pair) -> None:
    ids = tiny_batch()
    plain, ours = (model(input_ids=ids, labels=ids).logits for model in pair)
    steps = [
        lambda z: z.float(),
        lambda z: z * 0.5,
        lambda z: 3 * z,
        lambda z: z / 7.0,
        lambda z: 20.0 * torch.tanh(z / 20.0) / 2,
        lambda z: z[..., :100],
    ]
    for step in steps:
        plain, ours = step(plain), step(ours)
        assert isinstance(ours, DeferredLogits)
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
    again = torch.tanh(ours)
    assert type(again) is torch.Tensor
    torch.testing.assert_close(again, torch.tanh(plain))


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
