"""Gradient clipping for a model whose parameters lie on more than one device mesh."""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` for dense and expert parameters on meshes of their own.

    torch's function refuses gradients of different meshes. Here each mesh's norm is made whole first, so that every
    rank sees the same scalars, and the total is taken over them.

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
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    by_mesh: dict[object, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    norms = []
    for members in by_mesh.values():
        norm = torch.nn.utils.get_total_norm([p.grad for p in members if p.grad is not None], norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.tensor(0.0)
    device = norms[0].device
    total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"the total norm of the gradients is {total.item()}; they cannot be clipped")
    for members in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return total
