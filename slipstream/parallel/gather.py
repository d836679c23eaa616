"""Tensors whose rows are divided over ranks, put together in one exchange, as an operator opaque to torch.compile.

One for all tensors of a layer: fewer launches, and ranks that compile for themselves cannot order several differently.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_LAYOUT = "str[] groups, int[] ranks, int[] at, str replicas, float share, ScalarType dtype"
torch.library.define("slipstream::gather_parts", f"(Tensor[] parts, int[] rows, {_LAYOUT}) -> Tensor[]")
torch.library.define("slipstream::scatter_sums", f"(Tensor[] wholes, int[] rows, {_LAYOUT}) -> Tensor[]")
_ops = torch.ops._c10d_functional


class Spread(NamedTuple):
    """What divides rows over ranks: `groups` of `ranks`, of which this is rank `at`, each dividing the part that the
    one before has left; and `replicas`, the group whose ranks hold the same, or ""."""

    groups: list[str]
    ranks: list[int]
    at: list[int]
    replicas: str


def spread_over(mesh: DeviceMesh, replicated: Sequence[bool]) -> Spread:
    """As `Shard(0)` divides over the dims of `mesh`, but for one that may be `replicated`."""
    names = [mesh.get_group(dim).group_name for dim in range(mesh.ndim)]
    dims = [dim for dim in range(mesh.ndim) if not replicated[dim]]
    return Spread(
        [names[dim] for dim in dims],
        [mesh.size(dim) for dim in dims],
        [mesh.get_local_rank(dim) for dim in dims],
        "".join(name for name, same in zip(names, replicated, strict=True) if same),
    )


def gather_parts(parts: list[Tensor], rows: list[int], over: Spread, share: float, dtype: torch.dtype) -> list[Tensor]:
    """`[rows[i], C]` of each matrix in `dtype`, from this rank's rows `parts[i]`. Differentiable: the gradient of a
    part is `share` of the sum of all ranks', added up in the dtype of the parts, which is the same for all."""
    found: list[Tensor] = torch.ops.slipstream.gather_parts(parts, rows, *over, share, dtype)
    return found


def _gather(parts: list[Tensor], rows: list[int], *layout: Any) -> list[Tensor]:
    groups, ranks, at, _, _, dtype = layout
    found, sizes = [part.to(dtype) for part in parts], [_sizes(whole, ranks, at) for whole in rows]
    for level in reversed(range(len(groups))):
        blocks = [_sized(part, size[level].block) for part, size in zip(found, sizes, strict=True)]
        flat = _joined(blocks, 0)
        flat = _ops.wait_tensor(_ops.all_gather_into_tensor(flat, ranks[level], groups[level]))
        together = flat.view(ranks[level], -1).split([block.numel() for block in blocks], dim=1)
        found = [
            wide.reshape(-1, block.shape[1])[: size[level].rows]
            for wide, block, size in zip(together, blocks, sizes, strict=True)
        ]
    return [whole.clone(memory_format=torch.contiguous_format) for whole in found]


def _scatter(wholes: list[Tensor], rows: list[int], *layout: Any) -> list[Tensor]:
    """Of the sums over the ranks of `wholes`, of `rows` each, `share` of this rank's part."""
    groups, ranks, at, replicas, share, dtype = layout
    found, sizes = [whole.to(dtype) * share for whole in wholes], [_sizes(whole, ranks, at) for whole in rows]
    for level, group in enumerate(groups):
        blocks = [
            _sized(part, ranks[level] * size[level].block).view(ranks[level], -1)
            for part, size in zip(found, sizes, strict=True)
        ]
        flat = _ops.wait_tensor(_ops.reduce_scatter_tensor(_joined(blocks, 1), "sum", ranks[level], group))
        together = flat.split([block.shape[1] for block in blocks])
        found = [
            part.view(-1, whole.shape[1])[: size[level + 1].rows]
            for part, whole, size in zip(together, wholes, sizes, strict=True)
        ]
    if replicas:
        flat = _ops.wait_tensor(_ops.all_reduce(_joined(found, 0), "sum", replicas))
        together = flat.split([part.numel() for part in found])
        found = [part.view_as(whole) for part, whole in zip(together, found, strict=True)]
    return [part.clone(memory_format=torch.contiguous_format) for part in found]


class _Size(NamedTuple):
    rows: int  # of all ranks of a group
    block: int  # the most of one of them


def _sizes(rows: int, ranks: list[int], at: list[int]) -> list[_Size]:
    """For each group of this rank, and for itself. 9 rows over 2 and 2 ranks: (9, 5), (5, 3), (3, 0) on the first,
    (9, 5), (4, 2), (2, 0) on the last."""
    sizes = []
    for count, own in zip(ranks, at, strict=True):
        block = -(-rows // count)
        sizes.append(_Size(rows, block))
        rows = max(0, min(block, rows - own * block))
    return [*sizes, _Size(rows, 0)]


def _sized(part: Tensor, rows: int) -> Tensor:
    """`part` with rows of 0 behind it up to `rows`."""
    return F.pad(part, (0, 0, 0, rows - part.shape[0]))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat([part.flatten(dim) for part in parts], dim=dim).flatten()


@torch.library.register_fake("slipstream::gather_parts")
def _(parts: list[Tensor], rows: list[int], *layout: Any) -> list[Tensor]:
    dtype = layout[-1]
    return [part.new_empty(whole, part.shape[1], dtype=dtype) for part, whole in zip(parts, rows, strict=True)]


@torch.library.register_fake("slipstream::scatter_sums")
def _(wholes: list[Tensor], rows: list[int], *layout: Any) -> list[Tensor]:
    _, ranks, at, *_, dtype = layout
    own = [_sizes(whole, ranks, at)[-1].rows for whole in rows]
    return [whole.new_empty(mine, whole.shape[1], dtype=dtype) for whole, mine in zip(wholes, own, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    parts, *ctx.layout, _ = inputs
    ctx.dtype = parts[0].dtype


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    parts = torch.ops.slipstream.scatter_sums(grads, *ctx.layout, ctx.dtype)
    return parts, *[None] * (len(ctx.layout) + 1)


torch.library.impl("slipstream::gather_parts", "default", _gather)
torch.library.impl("slipstream::scatter_sums", "default", _scatter)
torch.library.register_autograd("slipstream::gather_parts", _backward, setup_context=_save)
