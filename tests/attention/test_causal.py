"""The op against a softmax written out, in fp64: output and every gradient, by finite differences too."""

import pytest
import torch

from slipstream.attention.causal import causal_attention, documents, documents_alike, visible, whole_rows

B, S, D = 2, 9, 8
# Rows of 9 as documents of 3, 6 and 1, 1, 7 tokens, and an empty one.
PACKED = torch.tensor([0, 3, 9, 9, 10, 11, 18], dtype=torch.int32)
ROWS = whole_rows(B, S, torch.device("cpu"))
CASES = {
    "whole rows": (None, None),
    "packed": (PACKED, None),
    "window": (ROWS, 4),
    "window of one": (ROWS, 1),
    "packed, window": (PACKED, 3),
}


def inputs(heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(B, S, heads, D), (B, S, groups, D), (B, S, groups, D), (heads,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def written_out(query, key, value, sinks, cu_seqlens, window):
    """A loop over rows, heads and tokens."""
    scale, out = 0.3, torch.zeros_like(query)
    ends = set() if cu_seqlens is None else set(cu_seqlens.tolist())
    for row in range(B):
        for head in range(query.shape[2]):
            group = head * key.shape[2] // query.shape[2]
            begin = 0
            for token in range(S):
                begin = token if row * S + token in ends else begin
                first = begin if window is None else max(begin, token - window + 1)
                scores = key[row, first : token + 1, group] @ query[row, token, head] * scale
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1]])
                weights = scores.softmax(0)[: token + 1 - first]
                out[row, token, head] = weights @ value[row, first : token + 1, group]
    return out


@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("heads", "groups"), [pytest.param(4, 4, marks=pytest.mark.slow), (4, 2), (3, 1)])
def test_output_and_gradients(heads, groups, case, with_sinks) -> None:
    cu_seqlens, window = CASES[case]
    max_length = None if cu_seqlens is None else torch.tensor(S)
    *qkv, sinks = inputs(heads, groups)
    arguments = [*qkv, sinks] if with_sinks else qkv

    def ours(query, key, value, sinks=None):
        return causal_attention(query, key, value, 0.3, sinks, cu_seqlens, max_length, window)

    with torch.no_grad():
        expected = written_out(*qkv, sinks if with_sinks else None, cu_seqlens, window)
    torch.testing.assert_close(ours(*arguments), expected)
    assert torch.autograd.gradcheck(ours, arguments, fast_mode=True)


def test_bf16_rounds_once() -> None:
    *qkv, sinks = inputs(4, 2)
    exact = causal_attention(*qkv, 0.3, sinks, PACKED, torch.tensor(S))
    rounded = causal_attention(*(x.bfloat16() for x in qkv), 0.3, sinks.bfloat16(), PACKED, torch.tensor(S))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=0.02, atol=0.02)


def test_registration() -> None:
    """Fake tensors have the shapes and strides of real ones, and autograd is registered as it has to be."""
    *qkv, sinks = inputs(4, 2, torch.float32)
    qkv = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv]
    for arguments in ((sinks, PACKED, torch.tensor(S), 0.3, 4), (None, None, None, 0.3, None)):
        torch.library.opcheck(torch.ops.slipstream.causal_attention.default, (*qkv, *arguments))


def test_window_needs_the_rows() -> None:
    *qkv, _ = inputs(2, 2)
    with pytest.raises(ValueError, match="cu_seqlens"):
        causal_attention(*qkv, 0.3, window=3)


def test_documents_and_who_sees_whom() -> None:
    cu_seqlens = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    assert documents(2, 3, cu_seqlens).tolist() == [[0, 0, 1], [1, 1, 2]]
    seen = visible(2, 3, cu_seqlens, 1, torch.device("cpu"))
    assert seen.shape == (2, 1, 3, 3)
    assert torch.equal(seen[0, 0], torch.eye(3, dtype=torch.bool))
    assert visible(1, 3, torch.tensor([0, 1, 3]), None, torch.device("cpu"))[0, 0].int().tolist() == [
        [1, 0, 0], [0, 1, 0], [0, 1, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ends", "longest", "expected"),
    [
        ([0, 9, 18], 9, (2, 9)),
        ([0, 3, 6, 9, 12, 15, 18], 3, (6, 3)),
        ([0, 18], 18, (1, 18)),
        ([0, 9, 18], 12, None),  # only known to be no longer than that
        ([0, 4, 9, 18], 9, None),
        ([0, 9, 9, 18], 9, None),  # an empty one
    ],
)
def test_documents_of_one_length(ends, longest, expected) -> None:
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    assert documents_alike(B, S, cu_seqlens, torch.tensor(longest), None) == expected
    assert documents_alike(B, S, cu_seqlens, torch.tensor(longest), 4) is None
    assert documents_alike(B, S, cu_seqlens, None, None) is None
    assert documents_alike(B, S, None, None, None) == (B, S)
