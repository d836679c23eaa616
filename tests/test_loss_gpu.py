"""What only a GPU shows of the loss: its memory, its accuracy in bf16, and that the host never waits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slipstream import hf
from slipstream import linear_cross_entropy as module
from slipstream.deferred_logits import DeferredLogits
from slipstream.kernels.cross_entropy import Transform, cross_entropy_
from slipstream.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from slipstream.loss import deferred_causal_lm_loss
from tests.test_linear_cross_entropy import TRANSFORMS, compare_with_reference

pytestmark = pytest.mark.gpu

SLACK = 96 << 20  # bytes: losses, labels, what cuBLAS wants to work in


def draw(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """Hidden states, a head's weights that give logits of about 3, and labels, a tenth of them ignored."""
    hidden_TH = torch.randn(tokens, hidden, device="cuda").to(dtype).requires_grad_()
    weight_VH = (torch.randn(vocabulary, hidden, device="cuda") * 3 / hidden**0.5).to(dtype).requires_grad_()
    labels_T = torch.randint(0, vocabulary, (tokens,), device="cuda")
    return hidden_TH, weight_VH, labels_T.masked_fill(torch.rand(tokens, device="cuda") < 0.1, -100)


@pytest.mark.parametrize("scaled", [False, True], ids=["sum", "scaled"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1], ids=["no z-loss", "z-loss"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_against_the_reference(tokens, transform, bias, z_loss, scaled, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 16)
    compare_with_reference(tokens, transform, bias, z_loss, scaled, device="cuda")


@pytest.mark.parametrize(
    ("tokens", "hidden"), [(2000, 1024), (4100, 512)], ids=["one chunk", "several chunks, summed in fp32"]
)
@pytest.mark.parametrize("vocabulary", [32000, 49155], ids=["even", "odd"])
def test_bf16_is_no_further_from_the_truth_than_transformers(tokens, hidden, vocabulary) -> None:
    hidden_TH, weight_VH, labels_T = draw(tokens, hidden, vocabulary)

    def theirs(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return hf.causal_lm_loss(F.linear(x, w)[None], None, vocabulary, shift_labels=labels_T[None])

    def ours(x: torch.Tensor, w: nn.Parameter) -> torch.Tensor:
        head = nn.Linear(hidden, vocabulary, bias=False, device="meta")
        head.weight = w
        return deferred_causal_lm_loss(DeferredLogits(x[None], head), None, vocabulary, shift_labels=labels_T[None])

    results = []
    for function, dtype in ((theirs, torch.float32), (theirs, torch.bfloat16), (ours, torch.bfloat16)):
        x = hidden_TH.detach().to(dtype, copy=True).requires_grad_()
        w = nn.Parameter(weight_VH.detach().to(dtype, copy=True))
        loss = function(x, w)
        loss.backward()
        results.append((loss.detach().double(), x.grad.double(), w.grad.double()))
    truth, *errors = results
    errors = [[(got - exact).norm() for got, exact in zip(result, truth, strict=True)] for result in errors]
    for name, allowed, error in zip(("loss", "hidden", "weight"), *errors, strict=True):
        floor = 1e-5 * truth[0] if name == "loss" else 0.0
        assert error <= 1.2 * allowed + floor, name


def peak_of(step) -> int:
    """Bytes that `step` holds at most beyond what there is before; what cuBLAS keeps for itself is there already."""
    warm = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    torch.mm(warm, warm)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_the_logits_of_a_long_row_never_exist(frozen) -> None:
    tokens, hidden, vocabulary = 16384, 1024, 65536
    hidden_TH, weight_VH, labels_T = draw(tokens, hidden, vocabulary)
    weight_VH.requires_grad_(not frozen)
    scale = torch.tensor(1 / tokens, device="cuda")
    peak = peak_of(lambda: linear_cross_entropy(hidden_TH, weight_VH, labels_T, scale=scale).backward())
    logits = 2 * module.CHUNK_TOKENS * vocabulary
    gradients = 2 * tokens * hidden + (0 if frozen else (4 * hidden + 2 * hidden) * vocabulary)
    assert peak <= logits + gradients + SLACK
    assert peak < 2 * tokens * vocabulary / 2  # half the logits in bf16; Transformers holds several times all of them


def test_evaluation_holds_a_chunk_of_logits_and_no_gradient() -> None:
    tokens, hidden, vocabulary = 8192, 1024, 65536
    hidden_TH, weight_VH, labels_T = draw(tokens, hidden, vocabulary)
    with torch.no_grad():
        peak = peak_of(lambda: linear_cross_entropy(hidden_TH, weight_VH, labels_T))
    assert peak <= 2 * module.CHUNK_TOKENS * vocabulary + SLACK


@pytest.mark.parametrize("items", [None, 700, "tensor"])
def test_the_host_does_not_wait(items) -> None:
    hidden_TH, weight_VH, labels_T = draw(4100, 256, 4096)
    items = torch.tensor(700, device="cuda") if items == "tensor" else items
    head = nn.Linear(256, 4096, device="cuda", dtype=torch.bfloat16)
    head.weight = nn.Parameter(weight_VH.detach())

    def step() -> None:
        logits = DeferredLogits(hidden_TH[None], head)
        loss = deferred_causal_lm_loss(logits, labels_T[None], 4096, num_items_in_batch=items, z_loss=1e-4)
        (loss / 4).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_softmax_reaches_past_32_bit_offsets() -> None:
    rows, columns = 16400, 131072  # 2^31 logits lie before the last rows
    logits_CV = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16)
    labels_C = torch.full((rows,), 5, device="cuda")
    losses_C = cross_entropy_(logits_CV, labels_C, Transform(columns), -100)
    torch.testing.assert_close(losses_C, torch.full_like(losses_C, torch.tensor(columns).log().item()))
    expected = torch.full((columns,), 1 / columns, device="cuda", dtype=torch.bfloat16)
    expected[5] = 1 / columns - 1
    assert torch.equal(logits_CV[-1], expected)


def test_a_gradient_scale_is_applied_once_and_in_place() -> None:
    hidden_TH, weight_VH, labels_T = draw(300, 256, 4096, torch.float32)
    (expected,) = torch.autograd.grad(linear_cross_entropy_reference(hidden_TH, weight_VH, labels_T), weight_VH)
    loss = linear_cross_entropy(hidden_TH, weight_VH, labels_T)
    made = loss.grad_fn.saved_tensors[1].data_ptr()
    (loss * 3).backward(retain_graph=True)
    torch.testing.assert_close(weight_VH.grad, expected * 3, rtol=1e-4, atol=1e-5)
    weight_VH.grad = None
    (loss / 4).backward()
    torch.testing.assert_close(weight_VH.grad, expected / 4, rtol=1e-4, atol=1e-5)
    assert weight_VH.grad.data_ptr() == made
