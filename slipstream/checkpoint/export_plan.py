"""Who writes what of a distributed model, and into which file: a pure function of what each rank holds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, prod
from typing import Protocol

import torch
from torch.distributed.tensor import DTensor

Span = tuple[int, int]
Spans = tuple[tuple[Span, ...], ...]  # of each dim, ascending

PART_BYTES = 2**28  # rows of an experts tensor are gathered and converted in parts of at most this, or one by one


class Reversal(Protocol):
    """How tensors of the model become tensors of the checkpoint."""

    def units(self, names: set[str]) -> list[tuple[str, ...]]: ...

    def convert(self, unit: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class Holding:
    """What a rank has of a tensor: the indices in `spans[d]` of every dim d."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: Spans

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Holding":
        """What this rank has of `tensor`; everything, if it is no DTensor.

        Raises: ValueError for a DTensor that is not merely split or repeated over the ranks.
        """
        shape = tuple(tensor.shape)
        cuts: list[list[tuple[int, int, int]]] = [[] for _ in shape]
        if isinstance(tensor, DTensor):
            coordinates = tensor.device_mesh.get_coordinate()
            if coordinates is None:
                return cls(shape, tensor.dtype, tuple(() for _ in shape))
            for dim, placement in enumerate(tensor.placements):
                if placement.is_replicate():
                    continue
                if not hasattr(placement, "dim"):
                    raise ValueError(f"a tensor of shape {shape} is placed as {placement}; reduce it before saving")
                factor = getattr(placement, "split_factor", 0)
                cuts[placement.dim].append((factor, tensor.device_mesh.size(dim), coordinates[dim]))
        held = cls(shape, tensor.dtype, tuple(spans_of(size, at) for size, at in zip(shape, cuts, strict=True)))
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        assert held.numel() == local.numel(), f"{tuple(local.shape)} of {shape} is not {held.spans}"
        return held

    def within(self, rows: Span | None) -> Spans:
        """`spans`, of dim 0 only what lies in `rows` and counted from their start."""
        if rows is None:
            return self.spans
        start, stop = rows
        inside = tuple(
            (max(a, start) - start, min(b, stop) - start) for a, b in self.spans[0] if a < stop and start < b
        )
        return (inside, *self.spans[1:])

    def numel(self, rows: Span | None = None) -> int:
        return prod(extents(self.within(rows)))


def spans_of(size: int, cuts: Iterable[tuple[int, int, int]]) -> tuple[Span, ...]:
    """The part of `range(size)` left to one rank after cuts `(split_factor, ranks, rank)`, outermost first.

    A split factor of 0 is a plain split. Otherwise the range falls into so many groups and each is split:
    `spans_of(8, [(2, 2, 1)])` is `((2, 4), (6, 8))`.
    """
    spans: list[Span] = [(0, size)]
    for factor, ranks, rank in cuts:
        if factor:
            spans = [_chunk(_chunk(span, factor, group), ranks, rank) for span in spans for group in range(factor)]
        else:
            ends = list(accumulate(stop - start for start, stop in spans))
            first, last = _chunk((0, ends[-1] if ends else 0), ranks, rank)
            # A span covers [end - length, end) of the range's elements in order.
            spans = [
                (max(stop - end + first, start), min(stop - end + last, stop))
                for (start, stop), end in zip(spans, ends, strict=True)
            ]
        spans = [span for span in spans if span[0] < span[1]]
    return tuple(spans)


def _chunk(span: Span, count: int, index: int) -> Span:
    """The bounds of `torch.chunk(...)[index]`."""
    start, stop = span
    width = ceil((stop - start) / count)
    return min(stop, start + index * width), min(stop, start + (index + 1) * width)


def extents(spans: Spans) -> list[int]:
    """The shape of what lies in `spans`."""
    return [sum(stop - start for start, stop in dim) for dim in spans]


@dataclass
class Part:
    """What one rank gathers, converts and writes at once.

    Attributes:
        names: the model's tensors; none for one that is copied from another checkpoint.
        rows: of dim 0; None for all.
        outputs: bytes of each of the checkpoint's tensors that come out.
        renamed: from the names that the conversion of these rows alone gives to those of `outputs`, where different.
        sources: of each name, the ranks that together hold it once.
        writer: the rank that writes it.
    """

    names: tuple[str, ...]
    rows: Span | None
    outputs: dict[str, int]
    renamed: dict[str, str]
    sources: dict[str, tuple[int, ...]]
    writer: int = -1

    @property
    def nbytes(self) -> int:
        return sum(self.outputs.values())

    @property
    def is_local(self) -> bool:
        return all(ranks == (self.writer,) for ranks in self.sources.values())


@dataclass
class Plan:
    """Attributes:
    parts: by the rank that writes them, in its order: first those that need other ranks.
    shards: the rank that writes a file and the tensors in it, over all ranks.
    """

    parts: list[list[Part]]
    shards: list[tuple[int, list[str]]]


def make_plan(
    holdings: list[dict[str, Holding]],
    reversal: Reversal,
    saved_dtype: Callable[[str, torch.dtype], torch.dtype],
    max_shard_bytes: int,
    one_file_bytes: int,
    kept: dict[str, int] | None = None,
) -> Plan:
    """Distribute the work.

    Args:
        holdings: of every rank, what it has of the tensors to save.
        saved_dtype: of a tensor's name and dtype.
        max_shard_bytes: of a file; a tensor that is larger gets its own.
        kept: bytes of tensors that no rank has, because they are copied from another checkpoint.
        one_file_bytes: a checkpoint up to this size is written by rank 0 alone, into one file.

    Raises: ValueError for a tensor that the ranks do not hold completely.
    """
    known = {name: held for rank in holdings for name, held in rank.items()}
    loads, parts = [0] * len(holdings), []
    for unit in reversal.units(set(known)):
        metas = {
            name: torch.empty(known[name].shape, dtype=saved_dtype(name, known[name].dtype), device="meta")
            for name in unit
        }
        outputs = {name: tensor.nbytes for name, tensor in reversal.convert(metas).items()}
        by_row = _outputs_by_row(unit, metas, outputs, reversal)
        if by_row is None:
            parts.append(_part(holdings, unit, None, outputs, {}))
            continue
        most = max(1, min(PART_BYTES, max_shard_bytes) * len(by_row) // max(1, sum(outputs.values())))
        for start, stop in _row_blocks([rank[unit[0]] for rank in holdings if unit[0] in rank], len(by_row), most):
            alone = [name for row in by_row[: stop - start] for name in row]
            renamed = dict(zip(alone, (name for row in by_row[start:stop] for name in row), strict=True))
            own = set(renamed.values())
            sizes = {name: size for name, size in outputs.items() if name in own}
            parts.append(_part(holdings, unit, (start, stop), sizes, renamed))
    parts += [Part((), None, {name: size}, {}, {}) for name, size in (kept or {}).items()]
    small = sum(part.nbytes for part in parts) <= min(max_shard_bytes, one_file_bytes)
    # Those with the least choice first; whatever fits anywhere evens out the rest.
    candidates = {id(part): [0] if small else _writers(holdings, part) for part in parts}
    for part in sorted(parts, key=lambda part: (len(candidates[id(part)]), -part.nbytes)):
        part.writer = min(candidates[id(part)], key=lambda rank: (loads[rank], rank))
        loads[part.writer] += part.nbytes
        part.sources = {name: _sources(holdings, name, part.rows, part.writer) for name in part.names}
    plan = Plan([[] for _ in holdings], [])
    for part in sorted(parts, key=lambda part: part.is_local):
        plan.parts[part.writer].append(part)
    for rank, own_parts in enumerate(plan.parts):
        plan.shards += [(rank, names) for names in _pack(own_parts, max_shard_bytes)]
    return plan


def avoid_names_in_use(plan: Plan, totals_in_use: set[int]) -> None:
    """Split a shard if a checkpoint of as many files is there: two under the same names would mix for a moment."""
    splittable = [shard for shard in plan.shards if len(shard[1]) > 1]
    while len(plan.shards) > 1 and len(plan.shards) in totals_in_use and splittable:
        rank, names = shard = max(splittable, key=lambda shard: len(shard[1]))
        at, half = plan.shards.index(shard), len(names) // 2
        plan.shards[at : at + 1] = [(rank, names[:half]), (rank, names[half:])]
        splittable = [shard for shard in plan.shards if len(shard[1]) > 1]


def file_names(plan: Plan) -> list[str]:
    """The name of each shard, Hugging Face's convention."""
    total = len(plan.shards)
    if total == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]


def _part(
    holdings: list[dict[str, Holding]],
    names: tuple[str, ...],
    rows: Span | None,
    outputs: dict[str, int],
    renamed: dict[str, str],
) -> Part:
    part = Part(names, rows, outputs, renamed, {name: _sources(holdings, name, rows) for name in names})
    for name, ranks in part.sources.items():
        held = holdings[ranks[0]][name] if ranks else next(rank[name] for rank in holdings if name in rank)
        shape = held.shape if rows is None else (rows[1] - rows[0], *held.shape[1:])
        if sum(holdings[rank][name].numel(rows) for rank in ranks) != prod(shape):
            raise ValueError(f"the ranks do not hold the whole of {name}, of shape {held.shape}")
    return part


def _sources(holdings: list[dict[str, Holding]], name: str, rows: Span | None, preferred: int = 0) -> tuple[int, ...]:
    """Ranks that hold each piece of a tensor once, `preferred` in place of others that hold the same."""
    owners: dict[Spans, int] = {}
    for rank in sorted(range(len(holdings)), key=lambda rank: rank != preferred):
        if name in holdings[rank] and holdings[rank][name].numel(rows):
            owners.setdefault(holdings[rank][name].within(rows), rank)
    return tuple(sorted(owners.values()))


def _writers(holdings: list[dict[str, Holding]], part: Part) -> list[int]:
    """The ranks that hold the part completely; where there is none, those that hold a piece of it."""
    held = {
        rank: [name in holdings[rank] and holdings[rank][name].numel(part.rows) for name in part.names]
        for rank in range(len(holdings))
    }
    whole = [sum(holdings[rank][name].numel(part.rows) for rank in part.sources[name]) for name in part.names]
    return (
        [rank for rank, pieces in held.items() if pieces == whole]
        or [rank for rank, pieces in held.items() if any(pieces)]
        or [0]
    )


def _outputs_by_row(
    unit: tuple[str, ...], metas: dict[str, torch.Tensor], outputs: dict[str, int], reversal: Reversal
) -> list[list[str]] | None:
    """The checkpoint's names that come from each row of dim 0 (an expert) alone, or None if it does not fall apart."""
    shape = metas[unit[0]].shape
    if len(unit) > 1 or len(shape) < 2 or shape[0] < 2 or len(outputs) % shape[0]:
        return None
    # Every element says the row it is from, so the result says what became of the rows.
    rows = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(-1, *[4] * (len(shape) - 1))
    try:
        converted = reversal.convert({unit[0]: rows})
    except (RuntimeError, ValueError):  # an operation that only takes the true shape
        return None
    by_row: list[list[str]] = [[] for _ in range(shape[0])]
    for name, values in converted.items():
        if values.unique().numel() != 1:
            return None
        by_row[int(values.flatten()[0])].append(name)
    complete = set(converted) == set(outputs) and len({len(names) for names in by_row}) == 1
    return by_row if complete else None


def _row_blocks(held: list[Holding], rows: int, most: int) -> list[Span]:
    """The rows cut where the ranks' shares begin and end, and into blocks of at most `most`."""
    edges = sorted({0, rows, *(edge for holding in held for span in holding.spans[0] for edge in span)})
    return [(start, min(start + most, stop)) for begin, stop in pairwise(edges) for start in range(begin, stop, most)]


def _pack(parts: list[Part], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    filled = 0
    for part in parts:
        for name, nbytes in part.outputs.items():
            if not shards or filled + nbytes > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += nbytes
    return shards
