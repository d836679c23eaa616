"""Rotary embeddings (Su et al., arXiv:2104.09864) as torch.compile fuses them best.

Transformers swaps the halves of each head by `torch.cat`: in a graph that is a tensor of its own, or a kernel that
loads both halves masked, and it is laid out by heads, across the projections around it. Here the halves swap places by
their index alone, token by token, so that a norm and the rotation are one pass over queries and one over keys. The
same numbers come out.

Dims: B batch, N heads, S tokens, D a head's width, R the part of it that is rotated.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slipstream import hf_models


def install(model: Any) -> None:
    """Let the modelling file of `model` rotate by the functions below where they return just what its own do."""
    for name, (candidates, arguments) in _FUNCTIONS.items():
        with torch.device("cpu"):  # models are made on others, meta too
            examples = arguments()
        for candidate in candidates:
            if hf_models.replace_equal(model, name, candidate, examples):
                break


def rotate_halves(x: Tensor) -> Tensor:
    """`(-x2, x1)` for the halves `x1, x2` of the last dimension."""
    return (x.unflatten(-1, (2, -1)).flip(-2) * _signs(x)[:, None]).flatten(-2)


def rotate_pairs(x: Tensor) -> Tensor:
    """`(-x1, x0, -x3, x2, …)` of the last dimension."""
    return (x.unflatten(-1, (-1, 2)).flip(-1) * _signs(x)).flatten(-2)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys `[B, N, S, D]`, or with `unsqueeze_dim=2` `[B, S, N, D]`, the first R of D rotated by angles
    `[B, S, R]`; in the dtype that they have times that of the angles."""
    if unsqueeze_dim == 1 and q.dim() == 4 and cos.dim() == 3:  # as projections lie in memory
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2)
        return q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def rotate_in_kind(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """As `rotate`, in the dtypes of queries and keys."""
    rotated_q, rotated_k = rotate(q, k, cos, sin, unsqueeze_dim)
    return rotated_q.to(q.dtype), rotated_k.to(k.dtype)


def rotate_by_half_angles(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[B, N, S, D]` rotated by angles `[B, 1, S, D / 2]`."""
    cos, sin = (torch.cat((angles, angles), -1).transpose(1, 2) for angles in (cos, sin))
    return _rotated(x.transpose(1, 2), cos, sin).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    turned = x[..., :width]
    turned = turned * cos + rotate_halves(turned) * sin
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)


def _signs(x: Tensor) -> Tensor:
    return torch.arange(-1, 2, 2, dtype=x.dtype, device=x.device)


def _heads() -> Tensor:
    return torch.arange(96.0).sin().view(1, 3, 4, 8)


def _of_heads() -> list[tuple[Any, ...]]:
    return [(_heads(),)]


def _of_all() -> list[tuple[Any, ...]]:
    """Whole and part of a head, of one dtype and of two, and either order of heads and tokens."""
    found: list[tuple[Any, ...]] = []
    for width, angles_dtype, dim in ((8, torch.bfloat16, 1), (8, torch.float32, 2), (4, torch.float32, 1)):
        queries = _heads().bfloat16() if dim == 1 else _heads().bfloat16().transpose(1, 2)
        angles = torch.arange(4.0 * width).view(1, 4, width)
        found.append((queries, queries.narrow(dim, 0, 1), *_cos_sin(angles, angles_dtype), dim))
    return found


def _of_half_angles() -> list[tuple[Any, ...]]:
    return [(_heads(), *_cos_sin(torch.arange(16.0).view(1, 1, 4, 4), torch.float32))]


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return angles.cos().to(dtype), angles.sin().to(dtype)


# By the names in Transformers' modelling files: what may stand for a function, and what shows whether it does.
_FUNCTIONS: dict[str, tuple[tuple[Callable[..., Any], ...], Callable[[], list[tuple[Any, ...]]]]] = {
    "rotate_half": ((rotate_halves, rotate_pairs), _of_heads),
    "apply_rotary_pos_emb": ((rotate, rotate_in_kind), _of_all),
    "_apply_rotary_emb": ((rotate_by_half_angles,), _of_half_angles),
}
