"""Linear cross-entropy against the whole logits: values, gradients, and who owns them."""

import copy
import math

import pytest
import torch
from torch import nn

from slipstream import linear_cross_entropy as module
from slipstream.kernels.cross_entropy import Transform
from slipstream.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

# 50 words: not a multiple of what rows are padded to.
TRANSFORMS = {
    "plain": None,
    "scaled": Transform(50, inner=0.3),
    "negative": Transform(50, inner=-0.3),
    "soft-capped": Transform(50, inner=0.2, tanh=True, outer=5.0),
    "sliced vocabulary": Transform(40),
}


def compare_with_reference(tokens, transform, bias, z_loss, scaled, device="cpu") -> None:
    """Value and gradients in fp32 against the reference in fp64, on chunks of 16 of 24-wide tokens."""
    labels = torch.randint(0, 40, (tokens,), device=device)
    labels[::3] = -100
    inputs = [torch.randn(size, device=device) for size in ((tokens, 24), (50, 24), (50,))[: 2 + bias]]
    scale = torch.tensor(0.013, device=device) if scaled else None
    results = []
    for function, dtype in ((linear_cross_entropy, torch.float32), (linear_cross_entropy_reference, torch.float64)):
        hidden, weight, *rest = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        total = function(hidden, weight, labels, *(rest or [None]), transform, scale=scale, z_loss=z_loss)
        (total * 0.7).backward()
        results.append([total.detach(), *(tensor.grad for tensor in (hidden, weight, *rest))])
    assert results[0][0].dtype == torch.float32
    tolerance = 1e-5 if device == "cpu" else 5e-5  # a GPU's exponentials are approximate
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("scaled", [False, True], ids=["sum", "scaled"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1], ids=["no z-loss", "z-loss"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("tokens", [0, 1, 50, 64])
def test_linear_cross_entropy(tokens, transform, bias, z_loss, scaled) -> None:
    compare_with_reference(tokens, transform, bias, z_loss, scaled)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_an_odd_vocabulary_as_on_a_gpu(tokens, bias, monkeypatch) -> None:
    spans = module._spans(50, torch.device("cuda"))
    assert spans == [slice(48, 50), slice(0, 48)]
    assert module._spans(50, torch.device("cpu")) == [slice(0, 50)]
    assert module._spans(5, torch.device("cuda")) == [slice(0, 5)]
    assert module._spans(400, torch.device("cuda")) == [slice(0, 400)]
    monkeypatch.setattr(module, "_spans", lambda *_: spans)
    compare_with_reference(tokens, TRANSFORMS["sliced vocabulary"], bias, 0.1, True)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 16), (2048, 2048), (2049, 1040), (4096, 2048), (4100, 1376)],  # about equal: not 2048 and 1
)
def test_chunks(tokens, expected) -> None:
    assert module._chunk_size(tokens) == expected


def test_several_chunks_in_bf16_lose_no_more_than_one(monkeypatch) -> None:
    hidden, weight, labels = torch.randn(96, 8), torch.randn(50, 8), torch.randint(0, 50, (96,))
    grads = []
    for dtype, limit in ((torch.float64, 96), (torch.bfloat16, 96), (torch.bfloat16, 16)):
        monkeypatch.setattr(module, "CHUNK_TOKENS", limit)
        x, w = (tensor.bfloat16().to(dtype).requires_grad_() for tensor in (hidden, weight))
        function = linear_cross_entropy_reference if dtype == torch.float64 else linear_cross_entropy
        function(x, w, labels).backward()
        assert w.grad.dtype == dtype
        grads.append(w.grad.double())
    assert (grads[2] - grads[0]).norm() <= 1.1 * (grads[1] - grads[0]).norm()


def test_fp16_gradients_survive_a_small_scale() -> None:
    """1e-6 of a softmax over 50 words is nothing in fp16; the loss scale of 2^20 comes back in backward."""
    inputs, labels = [torch.randn(32, 24).half(), torch.randn(50, 24).half()], torch.randint(0, 50, (32,))
    grads = []
    for function, dtype in ((linear_cross_entropy, torch.float16), (linear_cross_entropy_reference, torch.float64)):
        hidden, weight = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in inputs)
        function(hidden, weight, labels, scale=torch.tensor(1e-6)).backward(torch.tensor(2.0**20))
        grads.append((hidden.grad.double(), weight.grad.double()))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_only_labels_ignored() -> None:
    hidden, weight = torch.randn(8, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    labels = torch.full((8,), -100)
    loss = linear_cross_entropy(hidden, weight, labels, scale=torch.tensor(math.inf), z_loss=0.1)
    assert loss.isnan()  # 0 / 0, as in Transformers
    loss.backward()
    assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(8, 24, requires_grad=True), torch.randn(48, 24)
    linear_cross_entropy(hidden, weight, torch.randint(0, 48, (8,))).backward()
    assert hidden.grad is not None


def test_no_gradient_work_without_grad(monkeypatch) -> None:
    asked = []
    softmax = module.cross_entropy_
    monkeypatch.setattr(module, "cross_entropy_", lambda *args: asked.append(args[-1]) or softmax(*args))
    hidden, weight = torch.randn(8, 24, requires_grad=True), torch.randn(48, 24, requires_grad=True)
    labels = torch.randint(0, 48, (8,))
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
        assert not loss.requires_grad
    assert linear_cross_entropy(hidden, weight, labels).item() == loss.item()
    assert asked == [False, True]


def test_refused() -> None:
    hidden, weight = torch.randn(8, 24), torch.randn(48, 24)
    with pytest.raises(ValueError, match="one label a token"):
        linear_cross_entropy(hidden, weight, torch.zeros(9, dtype=torch.long))
    with pytest.raises(ValueError, match="z_loss=-1"):
        linear_cross_entropy(hidden, weight, torch.zeros(8, dtype=torch.long), z_loss=-1)
    with pytest.raises(IndexError):
        linear_cross_entropy(hidden, weight, torch.full((8,), 48))


class TestRepeatedBackward:
    """Gradients are made once, in forward; a backward must neither see what an earlier one did nor hand out what a
    later one changes."""

    @pytest.fixture
    def problem(self):
        head = nn.Linear(24, 50)
        return head, copy.deepcopy(head).double(), torch.randn(16, 24), torch.randint(0, 50, (16,))

    @staticmethod
    def loss(function, head, hidden, labels) -> torch.Tensor:
        scale = torch.tensor(0.1)
        return function(hidden.to(head.weight.dtype), head.weight, labels, head.bias, scale=scale)

    def test_each_has_its_own_factor(self, problem) -> None:
        head, exact, hidden, labels = problem
        loss = self.loss(linear_cross_entropy, head, hidden, labels)
        (expected,) = torch.autograd.grad(
            self.loss(linear_cross_entropy_reference, exact, hidden, labels), exact.weight
        )
        got = []
        for factor in (1.0, 3.0, 0.5):
            (grad,) = torch.autograd.grad(loss, head.weight, torch.tensor(factor), retain_graph=True)
            got.append((factor, grad))
        got.append((2.0, *torch.autograd.grad(loss, head.weight, torch.tensor(2.0))))
        for factor, grad in got:  # only now: none may have changed since
            torch.testing.assert_close(grad.double(), expected * factor, rtol=1e-5, atol=1e-6)

    def test_a_returned_gradient_belongs_to_the_caller(self, problem) -> None:
        head, _, hidden, labels = problem
        loss = self.loss(linear_cross_entropy, head, hidden, labels)
        (first,) = torch.autograd.grad(loss, head.weight, retain_graph=True)
        kept = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(loss, head.weight)
        assert torch.equal(second, kept)

    def test_accumulation(self, problem) -> None:
        head, exact, hidden, labels = problem
        for function, linear in ((linear_cross_entropy, head), (linear_cross_entropy_reference, exact)):
            for part in range(4):
                rows = slice(4 * part, 4 * part + 4)
                (self.loss(function, linear, hidden[rows], labels[rows]) / 4).backward()
            again = self.loss(function, linear, hidden, labels)
            again.backward(retain_graph=True)
            (again * 3).backward()
        for got, expected in zip(head.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)

    def test_the_gradient_is_not_copied_where_the_graph_goes(self, problem) -> None:
        head, _, hidden, labels = problem
        loss = self.loss(linear_cross_entropy, head, hidden, labels)
        made = loss.grad_fn.saved_tensors[1].data_ptr()
        loss.backward()
        assert head.weight.grad.data_ptr() == made
