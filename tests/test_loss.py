"""The fused loss against the whole logits, and deferred logits against ordinary ones."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slipstream
from slipstream import loss as loss_module
from slipstream.kernels.cross_entropy import Transform
from slipstream.loss import DeferredLogits, linear_cross_entropy, linear_cross_entropy_reference
from tests.tiny_models import tiny_batch, tiny_model

TRANSFORMS = {
    "plain": None,
    "scaled": Transform(48, inner=0.3),
    "soft-capped": Transform(48, inner=0.2, tanh=True, outer=5.0),
    "sliced vocabulary": Transform(40),
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("tokens", [0, 1, 50, 64])
def test_linear_cross_entropy(tokens, transform, bias, monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 16)
    labels = torch.randint(0, 40, (tokens,))
    labels[::3] = -100
    inputs = [torch.randn(tokens, 24), torch.randn(48, 24)] + ([torch.randn(48)] if bias else [])
    results = []
    for function, dtype in ((linear_cross_entropy, torch.float32), (linear_cross_entropy_reference, torch.float64)):
        hidden, weight, *rest = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        total = function(hidden, weight, labels, *(rest or [None]), transform=transform)
        (total * 0.7).backward()
        results.append([total.detach(), *(tensor.grad for tensor in (hidden, weight, *rest))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(8, 24, requires_grad=True), torch.randn(48, 24)
    linear_cross_entropy(hidden, weight, torch.randint(0, 48, (8,))).backward()
    assert hidden.grad is not None


def test_no_gradient_work_without_grad() -> None:
    hidden, weight = torch.randn(8, 24, requires_grad=True), torch.randn(48, 24, requires_grad=True)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, torch.randint(0, 48, (8,))).requires_grad


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
    with pytest.raises(RuntimeError, match=r"read out\.logits before the step"):
        out.logits.sum()


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
