"""The exchange's kernels with all ranks in one process.

Ordinary tensors are the areas, their addresses the table of peers. All ranks send, then all receive, so nobody waits.
"""

import pytest
import torch

from slipstream.kernels.nvlink_combine import combine_rows, combine_rows_reference
from slipstream.kernels.nvlink_dispatch import dispatch_rows, dispatch_rows_reference
from slipstream.kernels.nvlink_window import HEADER, MAX_RANKS, Layout, Window, half_size, layout
from tests.kernels.conditions import DEVICE, compiled_or_interpreted

pytestmark = compiled_or_interpreted
PROGRAMS = 3
HALVES = [{"receive": False}, {"send": False}]  # of an exchange: all ranks go through the first, then the second


class Ranks:
    """Areas of `counts` tokens a rank, `experts` a rank, and the tokens with their routing."""

    def __init__(self, counts: list[int], hidden: int, top_k: int, experts: int, dtype: torch.dtype, routing: str):
        self.counts, self.experts = counts, experts
        ranks = len(counts)
        sizes = (ranks, max(1, *counts), hidden, top_k, dtype.itemsize)
        half = half_size(*sizes)
        self.at: Layout = layout(half, *sizes)
        self.areas = [torch.zeros(HEADER + 2 * half, dtype=torch.uint8, device=DEVICE) for _ in counts]
        peers = torch.tensor([area.data_ptr() for area in self.areas], device=DEVICE)
        cells = [torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in range(2 * ranks)]
        self.windows = [
            Window(
                rank,
                ranks,
                peers,
                torch.zeros(2, PROGRAMS, dtype=torch.int32, device=DEVICE),
                torch.zeros(PROGRAMS, dtype=torch.int64, device=DEVICE),
                cells[2 * rank],
                cells[2 * rank + 1],
                10**9 if DEVICE == "cuda" else 3,
            )
            for rank in range(ranks)
        ]
        self.x = [torch.randn(count, hidden, device=DEVICE).to(dtype) for count in counts]
        self.idx = [self._choice(count, top_k, routing) for count in counts]
        self.weights = [torch.rand(count, top_k, device=DEVICE) for count in counts]

    def _choice(self, count: int, top_k: int, routing: str) -> torch.Tensor:
        scores = torch.rand(count, self.experts * len(self.counts), device=DEVICE)
        if routing == "skewed":
            scores /= torch.arange(1, scores.shape[1] + 1, device=DEVICE) ** 2
        if routing == "last_rank":
            scores[:, -self.experts :] += 1
        if routing == "one_expert":
            return torch.full((count, top_k), 1, device=DEVICE)
        return scores.topk(top_k, dim=1).indices

    def dispatch(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Rows (NaN where none came), local ids and weights of every rank."""
        at, tokens = self.at, self.at.ranks * self.at.most
        rows = [x.new_full((tokens, at.hidden), float("nan")) for x in self.x]
        ids = [torch.full((tokens, at.top_k), -7, dtype=torch.int32, device=DEVICE) for _ in self.x]
        weights = [torch.full((tokens, at.top_k), float("nan"), device=DEVICE) for _ in self.x]
        for half in HALVES:
            for rank, window in enumerate(self.windows):
                dispatch_rows(
                    window,
                    at,
                    self.x[rank],
                    self.idx[rank],
                    rows[rank],
                    self.experts,
                    weights_TK=self.weights[rank],
                    idx_NK=ids[rank],
                    weights_NK=weights[rank],
                    **half,
                )
        return rows, ids, weights

    def unanswered(self) -> list[int]:
        return [window.report.item() for window in self.windows]


CASES = {
    "even": ([5, 5], 16, 2, 4, "random"),
    "ragged": ([3, 7, 1], 48, 3, 2, "random"),
    "no tokens": ([0, 4], 24, 2, 3, "skewed"),
    "none anywhere": ([0, 0], 16, 2, 2, "random"),
    "all to the last": ([4, 5, 3, 2], 16, 3, 4, "last_rank"),
    "one expert": ([6, 2], 16, 2, 1, "one_expert"),
    "wide rows": ([2, 3], 4096 + 40, 2, 2, "random"),
    "9 ranks": ([1, 2, 0, 1, 1, 0, 2, 1, 1], 16, 5, 2, "skewed"),
}
SLOW = ("9 ranks", "all to the last", "wide rows")
EVERY_CASE = [
    pytest.param(case, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, case in CASES.items()
]


@pytest.mark.parametrize("case", EVERY_CASE)
def test_dispatch(case) -> None:
    counts, hidden, top_k, experts, routing = case
    dtype = torch.float32 if top_k == 3 else torch.bfloat16
    ranks = Ranks(counts, hidden, top_k, experts, dtype, routing)
    rows, ids, weights = ranks.dispatch()
    expected = dispatch_rows_reference(ranks.x, ranks.idx, experts, ranks.at.most)
    weights_all = torch.cat(
        [torch.nn.functional.pad(weights, (0, 0, 0, ranks.at.most - len(weights))) for weights in ranks.weights]
    )
    for rank, (rows_NH, idx_NK) in enumerate(expected):
        assert torch.equal(ids[rank], idx_NK.to(torch.int32))
        came = (idx_NK < experts).any(dim=1)
        assert torch.equal(rows[rank][came], rows_NH[came])
        assert rows[rank][~came].isnan().all()
        assert torch.equal(weights[rank], weights_all * (idx_NK < experts))
    assert not any(ranks.unanswered())


def _expert_rows(ids: torch.Tensor, experts: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A random row for each local (token, slot), and where it is; R for the others."""
    here = ids < experts
    total = int(here.sum())
    row = (here.flatten().cumsum(0) - 1).view_as(ids).masked_fill(~here, total)
    return torch.randn(total, hidden, device=DEVICE).to(dtype), row.to(torch.int32)


@pytest.mark.parametrize(("biased", "dtype"), [(False, torch.bfloat16), (True, torch.float32)], ids=["plain", "bias"])
@pytest.mark.parametrize("case", EVERY_CASE)
def test_combine(case, biased, dtype) -> None:
    counts, hidden, top_k, experts, routing = case
    ranks = Ranks(counts, hidden, top_k, experts, dtype, routing)
    at = ranks.at
    _, ids, weights = ranks.dispatch()
    parts = [_expert_rows(idx, experts, hidden, dtype) for idx in ids]
    biases = [torch.randn(experts, hidden, device=DEVICE).to(dtype) for _ in ids]
    out = [torch.full_like(x, float("nan")) for x in ranks.x]
    for half in HALVES:
        for rank, window in enumerate(ranks.windows):
            combine_rows(
                window,
                at,
                ranks.idx[rank],
                experts,
                rows_RH=parts[rank][0],
                row_NS=parts[rank][1],
                out_TH=out[rank],
                weights_NS=weights[rank],
                bias_LH=biases[rank] if biased else None,
                expert_NS=ids[rank],
                scale=0.5,
                **half,
            )
    sums = []
    for (rows, row), weight, idx, bias in zip(parts, weights, ids, biases, strict=True):
        here = idx < experts
        padded = torch.cat([rows, rows.new_zeros(1, hidden)]).float()[row.long()]
        if biased:
            padded = padded + bias.float()[idx.clamp(max=experts - 1).long()] * here[..., None]
        sums.append((padded * weight[..., None]).sum(dim=1).to(dtype))
    expected = combine_rows_reference(sums, counts, at.most)
    for found, wanted in zip(out, expected, strict=True):
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.float(), 0.5 * wanted, rtol=tolerance, atol=tolerance)
    assert not any(ranks.unanswered())


@pytest.mark.parametrize("case", EVERY_CASE)
def test_gradients_travel(case) -> None:
    """Backward: gradients in place in the area, and a number for each slot beside the rows combined."""
    counts, hidden, top_k, experts, routing = case
    dtype = torch.bfloat16
    ranks = Ranks(counts, hidden, top_k, experts, dtype, routing)
    at, tokens = ranks.at, ranks.at.ranks * ranks.at.most
    _, ids, _ = ranks.dispatch()
    grads = [torch.randn_like(x) for x in ranks.x]
    areas = [
        area[at.rows : at.rows + tokens * hidden * dtype.itemsize].view(dtype).view(tokens, hidden)
        for area in ranks.areas
    ]
    out = [torch.full_like(x, float("nan")) for x in ranks.x]
    numbers = [torch.randn(tokens, top_k, device=DEVICE) for _ in counts]
    numbers_back = [torch.full_like(weights, float("nan")) for weights in ranks.weights]
    parts = [_expert_rows(idx, experts, hidden, dtype) for idx in ids]
    for half in HALVES:
        for rank, window in enumerate(ranks.windows):
            dispatch_rows(window, at, grads[rank], ranks.idx[rank], areas[rank], experts, scale=0.25, **half)
    for (rows_NH, idx_NK), area in zip(
        dispatch_rows_reference([0.25 * grad for grad in grads], ranks.idx, experts, at.most), areas, strict=True
    ):
        came = (idx_NK < experts).any(dim=1)
        assert torch.equal(area[came], rows_NH[came])
    for half in HALVES:
        for rank, window in enumerate(ranks.windows):
            combine_rows(
                window,
                at,
                ranks.idx[rank],
                experts,
                rows_RH=parts[rank][0],
                row_NS=parts[rank][1],
                out_TH=out[rank],
                grads_NK=numbers[rank],
                grads_TK=numbers_back[rank],
                **half,
            )
    for rank, (count, idx) in enumerate(zip(counts, ranks.idx, strict=True)):
        place = rank * at.most + torch.arange(count, device=DEVICE)[:, None]
        slot = torch.arange(top_k, device=DEVICE)
        expected = torch.stack(numbers)[idx // experts, place, slot] if count else numbers_back[rank]
        assert torch.equal(numbers_back[rank], expected)
        assert not out[rank].isnan().any()


def test_72_ranks(monkeypatch) -> None:
    """Beyond the 64 bits of one word. Four ranks run; the flags of the others say that they had nothing to send."""
    monkeypatch.setitem(globals(), "PROGRAMS", 1)
    running = (1, 40, 64, 71)
    ranks = Ranks([int(rank in running) for rank in range(72)], 8, 3, 1, torch.float32, "random")
    at = ranks.at
    for rank in running:
        flags = ranks.areas[rank][: 8 * MAX_RANKS].view(torch.int32).view(2, MAX_RANKS)
        flags[:, [peer for peer in range(72) if peer not in running]] = 1
        ranks.idx[rank] = torch.tensor([[71, 1, 64]], device=DEVICE)
    ids, weights = (torch.zeros(72, 3, dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.float32))
    expected = dispatch_rows_reference(ranks.x, ranks.idx, 1, 1)
    rows = {rank: torch.zeros(72, 8, device=DEVICE) for rank in running}
    out = {rank: torch.zeros(1, 8, device=DEVICE) for rank in running}
    for half in HALVES:
        for rank in running:
            dispatch_rows(
                ranks.windows[rank],
                at,
                ranks.x[rank],
                ranks.idx[rank],
                rows[rank],
                1,
                weights_TK=ranks.weights[rank],
                idx_NK=ids,
                weights_NK=weights,
                **half,
            )
            if half == HALVES[1]:
                assert torch.equal(ids, expected[rank][1].to(torch.int32))
                assert torch.equal(rows[rank], expected[rank][0])
    for half in HALVES:
        for rank in running:
            own = torch.arange(72, device=DEVICE).where((expected[rank][1] < 1).any(dim=1), 72).to(torch.int32)[:, None]
            combine_rows(
                ranks.windows[rank],
                at,
                ranks.idx[rank],
                1,
                rows_RH=expected[rank][0] * (rank + 1),
                row_NS=own,
                out_TH=out[rank],
                **half,
            )
    for rank in running:
        # Each of the token's experts, on ranks of their own, gave it back times its number plus 1.
        torch.testing.assert_close(out[rank], ranks.x[rank] * (72 + 2 + 65))
    assert not any(ranks.unanswered())


def test_exchanges_in_a_row() -> None:
    """Flags grow without end, and what an earlier exchange left is not taken for this one's."""
    ranks = Ranks([3, 5], 16, 2, 2, torch.float32, "random")
    for window in ranks.windows:  # as after 2**31 signals, where int32 wraps around
        window.turns.fill_((2**31 - 6) // PROGRAMS)
    for area in ranks.areas:
        area[: HEADER // 4].view(torch.int32).fill_((2**31 - 6) // PROGRAMS * PROGRAMS)
    for _ in range(4):
        ranks.x = [torch.randn_like(x) for x in ranks.x]
        ranks.idx = [ranks._choice(len(x), 2, "random") for x in ranks.x]
        rows, ids, _ = ranks.dispatch()
        expected = dispatch_rows_reference(ranks.x, ranks.idx, 2, ranks.at.most)
        for rank, (rows_NH, idx_NK) in enumerate(expected):
            assert torch.equal(ids[rank], idx_NK.to(torch.int32))
            came = (idx_NK < 2).any(dim=1)
            assert torch.equal(rows[rank][came], rows_NH[came])
        for half in HALVES:
            for rank, window in enumerate(ranks.windows):
                combine_rows(window, ranks.at, ranks.idx[rank], 2, rows_RH=None, row_NS=ids[rank], out_TH=None, **half)
    assert not any(ranks.unanswered())


def test_a_rank_that_does_not_answer() -> None:
    """The wait ends, says who it was, and the next one does not wait again."""
    ranks = Ranks([3, 3, 3], 16, 2, 2, torch.float32, "random")
    window, at = ranks.windows[0], ranks.at
    rows = torch.zeros(9, 16, device=DEVICE)
    ids, weights = (torch.zeros(9, 2, dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.float32))
    for rank in (0, 1):
        dispatch_rows(
            ranks.windows[rank],
            at,
            ranks.x[rank],
            ranks.idx[rank],
            rows,
            2,
            weights_TK=ranks.weights[rank],
            idx_NK=ids,
            weights_NK=weights,
            receive=False,
        )
    for _ in range(2):
        dispatch_rows(
            window,
            at,
            ranks.x[0],
            ranks.idx[0],
            rows,
            2,
            weights_TK=ranks.weights[0],
            idx_NK=ids,
            weights_NK=weights,
            send=False,
        )
        assert window.report.item() == window.failed.item() == 3
