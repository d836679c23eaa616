"""The units of FSDP2: what it gathers at once, for how long, and their classes."""

from collections.abc import Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule

# The host spends 1-2 ms of a step on a unit's hooks, gathers and reduction, whatever its size (H200, torch 2.11).
# Layers whose experts lie elsewhere are small and share a unit of up to so many parameters, 128 MB in bf16.
UNIT_PARAMETERS = 64_000_000
# Gathered weights of all layers below this stay until backward, which saves the second gather.
KEPT_BYTES = 2 * 2**30


def joined(sizes: Sequence[int], most: int = UNIT_PARAMETERS) -> list[list[int]]:
    """Positions of `sizes` in units: neighbours that have at most `most` parameters together; a larger one is alone."""
    units: list[list[int]] = []
    filled = most
    for position, size in enumerate(sizes):
        if units and filled + size <= most:
            units[-1].append(position)
            filled += size
        else:
            units.append([position])
            filled = size
    return units


def frees_after_forward(asked: bool | None, layer_bytes: float) -> bool:
    """Whether gathered weights of layers, `layer_bytes` together, are freed between forward and backward."""
    return layer_bytes > KEPT_BYTES if asked is None else asked


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that `module` was made with: FSDP2 gives its units classes of their own, in its own file, whose second
    base that class is."""
    made = type(module)
    return made.__mro__[2] if issubclass(made, FSDPModule) else made
