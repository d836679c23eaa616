"""`GraphedStep`: when it captures and what it replays, with a stand-in for the graph; and the real thing on a GPU."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slipstream
from slipstream.cuda_graphs import GraphedStep, _Captured, watch
from slipstream.moe.dispatch.nvlink_experts import WORST_CASE_BYTES, _num_rows, room_for_worst_cases
from slipstream.moe.routing import Routing
from slipstream.train.packing import LENGTHS, Collator, count_tokens
from tests.distributed.harness import run_ranks
from tests.tiny_models import tiny_batch, tiny_model


class StandIn:
    """What a captured graph does, with kernels run by Python: gradients and loss at the addresses of the capture."""

    def __init__(self, run: Callable[[], Tensor], model: nn.Module) -> None:
        self._run, self._model = run, model
        self.replays = 0
        self._adds = any(p.grad is not None for p in model.parameters())
        before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        self.loss = run().detach().clone()
        # A capture computes nothing.
        for p in model.parameters():
            if p.grad is not None:
                p.grad.copy_(before[p] if self._adds else torch.full_like(p.grad, torch.nan))
        self._grads = {p: p.grad for p in model.parameters() if p.grad is not None}

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        self.replays += 1
        attached = {p: p.grad for p in self._grads}
        for p in self._grads:
            p.grad = None
        self.loss.copy_(self._run().detach())
        for p, static in self._grads.items():
            static.copy_(static + p.grad if self._adds else p.grad)
            p.grad = attached[p]


class Graphed(GraphedStep):
    """On any machine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reason = None

    def _recorded(self, batch: dict[str, Any], pool: Any) -> _Captured:
        graph = StandIn(lambda: self._run(dict(batch)), self._model)
        return _Captured(graph, graph.loss)

    def replays(self) -> int:
        return sum(captured.graph.replays for captured in self._captured.values())


pytestmark = pytest.mark.filterwarnings("ignore:.*without CUDA graphs")


def two() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return model, copy.deepcopy(model)


def forward_backward(model: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    def run(batch: dict[str, Any]) -> Tensor:
        loss = model(batch["x"]).square().mean() / batch.get("parts", 1)
        loss.backward()
        return loss

    return run


def same_gradients(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def test_replays_train_as_eager_steps_do() -> None:
    model, plain = two()
    step, eager = Graphed(model, forward_backward(model)), forward_backward(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for number in range(8):
        batch = {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(number))}
        assert step(batch).item() == eager(batch).item()
        same_gradients(model, plain)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert step.replays() == 5  # the other three warmed up


def test_gradients_add_up_over_micro_batches() -> None:
    model, plain = two()
    step, eager = Graphed(model, forward_backward(model)), forward_backward(plain)
    for number in range(6):
        for micro in range(3):
            batch = {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(3 * number + micro)), "parts": 3}
            assert step(batch).item() == eager(batch).item()
        same_gradients(model, plain)
        model.zero_grad()
        plain.zero_grad()
    assert {kind: captured.graph.replays for kind, captured in step._captured.items()} == {1: 5, 2: 10}


def test_losses_stay_as_they_were_returned() -> None:
    model, _ = two()
    step = Graphed(model, forward_backward(model))
    losses = []
    for number in range(6):
        losses.append(step({"x": torch.full((5, 4), float(number))}))
        model.zero_grad()
    assert len({loss.item() for loss in losses}) == 6


def test_other_shapes_and_constants_run_eagerly_between_replays() -> None:
    model, plain = two()
    step, eager = Graphed(model, forward_backward(model), warmup=2), forward_backward(plain)
    sizes = [5, 5, 5, 7, 5, 7, 7, 7, 5]
    for number, size in enumerate(sizes):
        batch = {"x": torch.randn(size, 4, generator=torch.Generator().manual_seed(number))}
        assert step(batch).item() == eager(batch).item()
        # Also where eager micro-batches add to the gradients of a graph, and a graph's to theirs.
        same_gradients(model, plain, 1e-6)
        if number % 2:
            model.zero_grad()
            plain.zero_grad()
    assert 0 < step.replays() <= 3
    model.zero_grad()
    step({"x": torch.ones(3, 4)})
    assert model.weight.grad is dict(step._grads)[model.weight]  # no second set of gradients
    before = step.replays()
    model.zero_grad()
    step({"x": torch.ones(5, 4)}, constants=(2,))
    step({"x": torch.ones(5, 4), "parts": 2})
    assert step.replays() == before
    model.zero_grad()
    step({"x": torch.ones(5, 4)})
    assert step.replays() == before + 1


def test_values_that_cannot_be_compared_run_eagerly() -> None:
    model, _ = two()
    step = Graphed(model, forward_backward(model))
    for _ in range(6):
        step({"x": torch.ones(5, 4), "names": ["a", "b"]})
        model.zero_grad()
    assert not step.captured


def test_what_cannot_be_captured_is_told() -> None:
    model, plain = two()
    with pytest.raises(ValueError, match="warmup=1"):
        GraphedStep(model, warmup=1)
    step = Graphed(model, forward_backward(model), warmup=2)
    for _ in range(11):
        step({"x": torch.ones(5, 4)})
    with pytest.warns(UserWarning, match="set them to None"):
        step({"x": torch.ones(5, 4)})
    assert step.reason is not None
    assert not step.captured
    if not torch.cuda.is_available():
        with pytest.warns(UserWarning, match="without CUDA graphs: there is no GPU"):
            step = GraphedStep(plain, forward_backward(plain))
        loss = step({"x": torch.ones(5, 4)})
        assert not loss.requires_grad
        assert plain.weight.grad is not None
        assert watch(lambda: 3) == (3, {})


def test_a_step_that_reads_the_random_state_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": torch.zeros(16))
    model, _ = two()
    run = forward_backward(model)

    def checkpointed(batch: dict[str, Any]) -> Tensor:
        torch.cuda.get_rng_state()
        return run(batch)

    step = Graphed(model, checkpointed)
    for number in range(1, 6):
        if number == step.warmup:
            with pytest.warns(UserWarning, match="activation checkpointing"):
                step({"x": torch.ones(5, 4)})
        else:
            step({"x": torch.ones(5, 4)})
        model.zero_grad()
    assert not step.captured


def some_ranks_have_other_shapes() -> tuple[int, list[float]]:
    import torch.distributed as dist

    model, _ = two()
    step = Graphed(model, forward_backward(model))
    losses = []
    for number in range(9):
        rows = 5 + (dist.get_rank() if number == 6 else 0)
        losses.append(step({"x": torch.full((rows, 4), float(number))}).item())
        model.zero_grad()
    return step.replays(), losses


def test_ranks_replay_together() -> None:
    (first, losses), (second, others) = run_ranks(some_ranks_have_other_shapes, 2)
    assert first == second == 5
    assert losses == pytest.approx(others)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_next", "jamba"])
def test_empty_documents_behind_the_last_change_nothing(architecture: str) -> None:
    """Packed batches of one shape, as the graph of a packed recipe needs them."""
    model = slipstream.accelerate(tiny_model(architecture).float()).train()
    rows = [{"input_ids": [*range(3, 15)], "labels": [*range(3, 15)], LENGTHS: [5, 7]},
            {"input_ids": [*range(20, 35)], "labels": [*range(20, 35)], LENGTHS: [15]}]  # fmt: skip
    found = []
    for documents in (0, 4):
        batch = Collator(pad_token_id=0, max_length=16, documents_per_row=documents)(rows)
        count_tokens(batch)
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        shape = batch["cu_seq_lens_q"].tolist(), batch["max_length_q"]
        found.append((loss, [p.grad for p in model.parameters()], *shape))
    (loss, grads, *_), (other, others, *shape) = found
    assert shape == [[0, 5, 12, 27, 32, 32, 32, 32, 32, 32], 16]
    torch.testing.assert_close(other, loss)
    for mine, theirs in zip(others, grads, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_more_documents_than_there_is_room_for_are_not_cut() -> None:
    row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], LENGTHS: [1, 1, 1, 1]}
    batch = Collator(pad_token_id=0, max_length=4, documents_per_row=2)([row])
    assert batch["cu_seq_lens_q"].tolist() == [0, 1, 2, 3, 4]


def test_the_host_waits_for_no_rows_that_there_is_room_for() -> None:
    rows, ends = torch.zeros(1000, dtype=torch.int32), torch.tensor([3, 7], dtype=torch.int32)
    routing, up = Routing(rows, rows, ends, rows), torch.empty(2, 8, 300_000, dtype=torch.bfloat16, device="meta")
    assert WORST_CASE_BYTES < 1000 * 300_000 * 2
    assert _num_rows(routing, up) == 7
    with room_for_worst_cases(1e9):
        assert _num_rows(routing, up) == 1000
        with room_for_worst_cases(5e8):
            assert _num_rows(routing, up) == 7
    assert _num_rows(routing, up) == 7


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "nemotron_h", "llama"])
def test_on_a_gpu_replays_train_as_eager_steps_do(architecture: str) -> None:
    """With accumulation over two micro-batches, and an evaluation between."""
    plain = slipstream.accelerate(tiny_model(architecture, None).bfloat16().cuda()).train()
    model = copy.deepcopy(plain)
    step = GraphedStep(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in (model, plain)]
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        ids = torch.randint(3, 60, (2, 32), generator=generator).cuda()
        batch = {"input_ids": ids, "labels": ids}
        eager = plain(**batch).loss
        eager.backward()
        assert step(batch).item() == pytest.approx(eager.item(), rel=5e-3)
        if number % 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if number == 7:
            with torch.no_grad():
                assert model(**batch).loss.item() == pytest.approx(plain(**batch).loss.item(), rel=5e-3)
    assert set(step._captured) == {1, 2}, step.reason


@pytest.mark.gpu
def test_on_a_gpu_a_step_that_waits_is_not_captured() -> None:
    model = slipstream.accelerate(tiny_model("qwen3_moe", None).bfloat16().cuda()).train()

    def run(batch: dict[str, Any]) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        float(loss)
        return loss

    step = GraphedStep(model, run)
    ids = tiny_batch().cuda()
    for number in range(1, 6):
        if number == step.warmup:
            with pytest.warns(UserWarning, match=r"waits for the device at .*test_cuda_graphs\.py"):
                step({"input_ids": ids, "labels": ids})
        else:
            step({"input_ids": ids, "labels": ids})
        model.zero_grad()
    assert not step.captured
