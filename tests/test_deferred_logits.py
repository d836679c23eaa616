"""Logits that wait: what is remembered of them, what computes them, and that both are the ordinary tensor."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slipstream
from slipstream.deferred_logits import DeferredLogits, deferring
from tests.tiny_models import tiny_batch, tiny_model


@pytest.fixture
def pair():
    plain = tiny_model("qwen3_moe")
    return plain, slipstream.accelerate(copy.deepcopy(plain))


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
    copy, columns, rows = logits * 1.0, logits[..., :50], logits.view(-1, 256)
    logits.register_hook(seen.append)
    with torch.no_grad():
        columns[..., :10] = 7.0
        logits[..., 10:20] = 7.0
    assert (columns[..., :20] == 7).all()
    assert (logits[..., :20] == 7).all()
    assert (rows[:, :20] == 7).all()
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
        lambda z: z[:, :-1],
        lambda z: z[..., 1:, :],
        lambda z: z.contiguous(),
        lambda z: z.reshape(z.shape[0], -1, 100),
        lambda z: z.view(-1, 100),
        lambda z: z[:-1][2:].flatten(0, 0),
    ]
    for step in steps:
        plain, ours = step(plain), step(ours)
        assert isinstance(ours, DeferredLogits)
        assert (ours.shape, ours.stride(), ours.dtype) == (plain.shape, plain.stride(), plain.dtype)
        assert ours.contiguous() is ours or not ours.is_contiguous()
    again = torch.tanh(ours)
    assert type(again) is torch.Tensor
    torch.testing.assert_close(again, torch.tanh(plain))


def test_other_parts_and_shapes_are_computed(pair) -> None:
    ids = tiny_batch()
    plain, ours = (model(input_ids=ids, labels=ids).logits for model in pair)
    for part in (
        lambda z: z[..., 1:],
        lambda z: z[..., ::2],
        lambda z: z[..., :-1],
        lambda z: z[:, ids[0] > 5],
        lambda z: z[None],
        lambda z: z.view(-1, 128),
        lambda z: z.view(torch.int32).view(torch.float32),
        lambda z: z[:, -1].argmax(-1),
    ):
        torch.testing.assert_close(part(ours) + 0, part(plain) + 0)
    for wrong in (lambda z: z[0, 0, 0, 0], lambda z: z[:, :-1].view(-1, 256), lambda z: z[ids.shape[0]]):
        for logits in (plain, ours):
            with pytest.raises((IndexError, RuntimeError)):
                wrong(logits)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        ({}, True),
        ({"reduction": "sum", "ignore_index": 7}, True),
        ({"reduction": "none"}, False),
        ({"label_smoothing": 0.1}, False),
        ({"weight": torch.arange(40.0)}, False),
    ],
    ids=str,
)
def test_cross_entropy_of_deferred_logits(arguments, fused, dtype, autocast) -> None:
    """In a forward; outside, somebody may ask for the gradient of the logits."""
    torch.manual_seed(0)
    head = nn.Linear(16, 40).to(dtype)
    hidden_TH = torch.randn(30, 16, dtype=dtype, requires_grad=True)
    labels_T = torch.randint(40, (30,)).masked_fill(torch.rand(30) < 0.2, arguments.get("ignore_index", -100))
    arguments = {name: x.to(dtype) if name == "weight" else x for name, x in arguments.items()}
    found = []
    for inside in (None, False, True):
        hidden_TH.grad = head.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = head(hidden_TH) if inside is None else DeferredLogits(hidden_TH, head)
            with deferring() if inside else nullcontext():
                loss = F.cross_entropy(logits, labels_T, **arguments)
        assert inside is None or (logits._tensor is None) == (inside and fused)
        loss.sum().backward()
        found.append((loss.detach(), hidden_TH.grad, head.weight.grad))
        assert loss.dtype == found[0][0].dtype
    tolerance = {} if dtype == torch.float32 and not autocast else {"rtol": 2e-2, "atol": 1e-2}
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], **tolerance)


def test_cross_entropy_of_logits_that_a_hook_waits_for_computes_them() -> None:
    head, seen = nn.Linear(16, 40), []
    with deferring():
        logits = head_logits = DeferredLogits(torch.randn(2, 5, 16), head)
        head_logits.register_hook(seen.append)
        F.cross_entropy(logits.view(-1, 40), torch.randint(40, (10,))).backward()
    assert [grad.shape for grad in seen] == [(2, 5, 40)]
