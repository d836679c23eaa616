"""Matrices whose columns are equal blocks, where each rank holds its part of every block.

PEFT's `lora_B` of experts is one, `[out, r * E]` with the experts inside each of r blocks: the columns of a rank's
experts are no block themselves.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard


def spread_blocks(matrix: Tensor, blocks: int, mesh: DeviceMesh) -> DTensor:
    """`matrix [A, blocks * N]` over the ranks of a `mesh` of one dim, each with its part of N; rank 0's values."""
    parted = distribute_tensor(by_block(matrix.to(mesh.device_type), blocks), mesh, [Shard(2)])
    placements = [_StridedShard(1, split_factor=blocks)]
    return DTensor.from_local(
        parted.to_local().flatten(1), mesh, placements, run_check=False, shape=matrix.shape, stride=matrix.stride()
    )


def by_block(matrix: Tensor, blocks: int) -> Tensor:
    """`matrix [A, blocks * N]` as `[A, blocks, N]`, in the same memory, however it is spread. Differentiable."""
    rows, columns = matrix.shape
    if not isinstance(matrix, DTensor) or not any(isinstance(one, _StridedShard) for one in matrix.placements):
        return matrix.view(rows, blocks, columns // blocks)
    local = matrix.to_local()
    return DTensor.from_local(
        local.view(rows, blocks, local.shape[1] // blocks), matrix.device_mesh, [Shard(2)], run_check=False,
        shape=torch.Size((rows, blocks, columns // blocks)), stride=(columns, columns // blocks, 1),
    )  # fmt: skip


def whole_of(matrix: DTensor, blocks: int) -> Tensor:
    """All of a `matrix [A, blocks * N]`, on every rank; all ranks call it."""
    parted = by_block(matrix, blocks)
    assert isinstance(parted, DTensor)
    return parted.full_tensor().flatten(1)
