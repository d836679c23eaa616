"""Where documents begin in the rows of a batch, found once per forward pass, with one read of the device at most.

Dims: B rows, S tokens in a row, T = B * S, N documents.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slipstream.attention.causal import visible, whole_rows


class Segments(NamedTuple):
    """Which tokens see each other, in the place of a mask: those of one document, so far back.

    Attributes:
        cu_seqlens: int32 `[N + 1]`, where documents begin in the flattened rows, and T.
        max_length: the longest document or more; a scalar on the CPU, because a compiled layer would be compiled anew
            for every value of an int.
        window: how many tokens a token sees, itself included; None: its whole document.
    """

    cu_seqlens: Tensor
    max_length: Tensor
    window: int | None = None

    @classmethod
    def whole_rows(cls, batch: int, length: int, window: int, device: torch.device) -> "Segments":
        return cls(whole_rows(batch, length, device), torch.tensor(length), window)

    def as_mask(self, batch: int, length: int) -> Tensor:
        """The same as a bool mask `[B, 1, S, S]`."""
        return visible(batch, length, self.cu_seqlens, self.window, self.cu_seqlens.device)


class Rows(NamedTuple):
    """What is known of the batch that a model runs on now."""

    batch: int
    length: int
    segments: Segments | None  # None: every row is one document without padding
    padded: bool = False  # the segments are stretches of real tokens and of padding


def rows_of(inputs: Mapping[str, Any]) -> Rows | None:
    """What the keyword arguments of a Transformers decoder say about its rows; None: leave it to Transformers.

    Documents come from `cu_seq_lens_q` (and `max_length_q`: then nothing is read from the device), or from
    `position_ids` that restart. Padding of a 2D `attention_mask` becomes documents of its own, which real tokens don't
    see. A position that does not follow the one before it begins a document, as in Transformers.

    Raises:
        ValueError: both `cu_seq_lens_q` and `attention_mask` are given.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or inputs.get("past_key_values") is not None:
        return None
    batch, length = tokens.shape[:2]
    mask, cu_seqlens, positions = (inputs.get(name) for name in ("attention_mask", "cu_seq_lens_q", "position_ids"))
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError(
                "cu_seq_lens_q and attention_mask both say where documents end: give one of them "
                "(DataCollatorWithFlattening and TRL's padding-free collator give no attention_mask)"
            )
        return Rows(batch, length, _given(cu_seqlens, inputs.get("max_length_q"), batch, length, tokens.device))
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (batch, length):
            return None
        return _padding(mask.to("cpu", torch.bool), tokens.device)
    if positions is None:
        return Rows(batch, length, None)
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != length:
        return None
    begins = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
    return Rows(batch, length, _segments(begins.cpu().expand(batch, length), tokens.device))


def _given(cu_seqlens: Tensor, max_length: Any, batch: int, length: int, device: torch.device) -> Segments:
    if max_length is None:
        max_length = int(cu_seqlens.diff().max())
    cu_seqlens = cu_seqlens.to(device, torch.int32, non_blocking=True)
    if batch > 1:  # a row's end is a document's end
        cu_seqlens = torch.cat([cu_seqlens, whole_rows(batch, length, device)]).sort().values
    return _dynamic(Segments(cu_seqlens, torch.tensor(int(max_length))))


def _padding(mask_BS: Tensor, device: torch.device) -> Rows | None:
    """Stretches of real tokens and of padding, from a mask on the CPU; None where a row has several of the former."""
    batch, length = mask_BS.shape
    before = torch.nn.functional.pad(mask_BS[:, :-1], (1, 0))
    if bool(((mask_BS & ~before).sum(1) > 1).any()):
        return None
    begins = mask_BS != before
    return Rows(batch, length, _segments(begins, device), padded=True)


def _segments(begins_BS: Tensor, device: torch.device) -> Segments | None:
    """Documents that begin at the marked tokens (on the CPU) and at every row's first; None: nowhere else."""
    begins_BS = begins_BS.clone()
    begins_BS[:, 0] = True
    begins = begins_BS.flatten().nonzero().squeeze(1)
    if len(begins) == len(begins_BS):
        return None
    cu_seqlens = torch.cat([begins, begins.new_tensor([begins_BS.numel()])]).to(torch.int32)
    longest = cu_seqlens.diff().max().long()  # of one dtype always, as a compiled layer wants it
    return _dynamic(Segments(cu_seqlens.to(device, non_blocking=True), longest))


def _dynamic(segments: Segments) -> Segments:
    """Tell torch.compile that the number of documents varies."""
    torch._dynamo.maybe_mark_dynamic(segments.cu_seqlens, 0)
    return segments
