"""Gradient clipping for a model whose parameters lie on one device mesh or several, at the cost of one read."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from slipstream.kernels import runs_on
from slipstream.kernels.square_sum import square_sum

_EPS = 1e-6  # as torch's
_LARGE = 1 << 22  # elements: torch's kernel for many tensors reads such at 2/3 of the memory's speed


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for dense and expert parameters on meshes of their own.

    torch's function refuses gradients of different meshes.

    Args:
        parameters: those whose gradients are clipped, in place, by one common factor.
        max_norm: the largest total norm allowed.
        norm_type: the p of the p-norm; `inf` takes the largest absolute value.
        error_if_nonfinite: raise where the total is nan or infinite.

    Returns:
        The total norm before clipping, an ordinary scalar tensor, the same on every rank.

    Raises:
        RuntimeError: the total is nan or infinite and `error_if_nonfinite` is set.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    total = total_grad_norm(parameters, norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"the total norm of the gradients is {total.item()}; they cannot be clipped")
    by_kind: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            local = _local(parameter.grad)
            by_kind.setdefault((local.device, local.dtype), []).append(local)
    factor = (max_norm / (total + _EPS)).clamp(max=1.0)
    for (device, _), locals_ in by_kind.items():
        torch._foreach_mul_(locals_, factor.to(device))
    return total


@torch.no_grad()
def total_grad_norm(parameters: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The p-norm of all gradients together, a scalar tensor, the same on every rank; fp32, or fp64 for fp64 gradients.

    Each rank reads its own shards once, in a launch for each dtype and way of sharding; what is reduced over ranks are
    scalars. Nothing waits for the device. Gradients that a rank has and another has not make it wait for ever.

    Example: gradients [3.] and [4.] have the 2-norm 5.
    """
    # Shards of one group add up over the same ranks.
    groups: dict[Any, dict[Any, list[Tensor]]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        over: tuple[Any, ...] = ()
        if isinstance(grad, DTensor):
            if any(placement.is_partial() for placement in grad.placements):
                whole = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
                grad = grad.redistribute(grad.device_mesh, whole)
            dims = tuple(dim for dim, placement in enumerate(grad.placements) if not placement.is_replicate())
            over = (grad.device_mesh, dims) if dims else ()
        local = _local(grad)
        groups.setdefault(over, {}).setdefault((local.device, local.dtype), []).append(local)
    norms: list[Tensor] = []
    for over, by_kind in groups.items():
        norm = _norm_of_all(by_kind, norm_type)
        if over:
            mesh, dims = over
            power = 1.0 if norm_type == torch.inf else norm_type
            norm = norm**power
            for dim in dims:
                how = dist.ReduceOp.MAX if norm_type == torch.inf else dist.ReduceOp.SUM
                dist.all_reduce(norm, how, group=mesh.get_group(dim))
            norm = norm ** (1 / power)
        norms.append(norm)
    if not norms:
        return torch.tensor(0.0)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)


def divisor(total_norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm have to be divided by so that it is at most `max_norm`; at least 1."""
    return ((total_norm + _EPS) / max_norm).clamp(min=1.0)


def _norm_of_all(by_kind: dict[Any, list[Tensor]], norm_type: float) -> Tensor:
    """Of tensors by (device, dtype), on the device of the first."""
    device = next(iter(by_kind))[0]
    norms = []
    for (_, dtype), tensors in by_kind.items():
        wide = dtype if dtype == torch.float64 else torch.float32
        large: list[Tensor] = []
        small: list[Tensor] = []
        for tensor in filter(torch.numel, tensors):
            (large if norm_type == 2 and _is_large(tensor) else small).append(tensor)
        if large:
            norms.append(square_sum(large).sqrt()[None].to(device))
        if small:
            norms.append(torch.stack(torch._foreach_norm(small, norm_type, dtype=wide)).to(device))
    if not norms:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.cat(norms), norm_type)


def _is_large(tensor: Tensor) -> bool:
    return tensor.numel() >= _LARGE and tensor.is_contiguous() and runs_on(tensor)


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad
