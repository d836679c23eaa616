"""Which random bits an element draws: the same on every replica, others on every shard, whatever rank asks."""

import functools
import math

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement

from slipstream.kernels.rounding import Random

_WORD = (1 << 64) - 1


def place_of(param: torch.Tensor) -> tuple[int, int]:
    """What `place` says of this rank's part of `param`."""
    if not isinstance(param, DTensor):
        return 0, 0
    return place(param.shape, param.device_mesh, param.placements, param.to_local().is_contiguous())


def random_at(part: tuple[int, int], seed: int, number: int, step: int) -> Random:
    """The random bits, at a step, of the part that `place_of` gave of the optimizer's parameter `number`."""
    start, shard = part
    return Random(mix(_key(seed, step, shard) ^ number), start)


@functools.lru_cache(maxsize=256)
def _key(seed: int, step: int, shard: int) -> int:
    key = 0
    for value in (seed, step, shard):
        key = mix(key ^ value)
    return key


def mix(word: int) -> int:
    """64 bits that depend on each of `word`'s (SplitMix64: Steele et al. 2014, "Fast splittable pseudorandom ...").

    Example: mix(0) = 0xE220A8397B1DCDAF.
    """
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


@functools.lru_cache(maxsize=256)
def place(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...], contiguous: bool) -> tuple[int, int]:
    """Where this rank's part of a tensor of `shape` begins, in elements, and which shard it is.

    A part that is one run of the whole tensor's memory is shard 0 and draws the bits that these elements would draw in
    one process. Any other begins at 0 and is told apart by its number, which counts from 1.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return 0, 0  # this rank has no part
    if contiguous and all(type(placement) in (Shard, Replicate) for placement in placements):
        local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
        longer = next((dim for dim, size in enumerate(local) if size > 1), len(local))
        if tuple(local[longer + 1 :]) == tuple(shape[longer + 1 :]):
            return sum(first * math.prod(shape[dim + 1 :]) for dim, first in enumerate(offset)), 0
    number = 0
    for ranks, rank, placement in zip(mesh.shape, coordinate, placements, strict=True):
        if not isinstance(placement, Replicate):
            number = number * ranks + rank
    return 0, 1 + number
