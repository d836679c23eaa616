"""Norms and clipping of gradients on several meshes, and inside our optimizer: the numbers of one process."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from slipstream import clip_grad_norm_
from slipstream.optim import AdamW
from slipstream.parallel.clip import divisor, total_grad_norm
from tests.distributed.harness import run_ranks

# Of one row, and so with nothing on one of the ranks; plain on all ranks; sharded over one mesh and another; mixed.
SHAPES = {"one": (1, 6), "plain": (5, 3), "rows": (5, 4), "columns": (4, 6), "replicated": (3,), "half": (4, 2)}
LAYOUTS: dict[str, list[Any] | None] = {
    "one": [Shard(0)], "plain": None, "rows": [Shard(0)], "columns": [Replicate(), Shard(1)],
    "replicated": [Replicate()], "half": [Shard(0), Replicate()],
}  # fmt: skip


def make(spread: bool) -> dict[str, nn.Parameter]:
    params = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(seed)
        tensor, grad = (torch.randn(shape, generator=generator) for _ in range(2))
        if name == "half":
            tensor, grad = tensor.bfloat16(), grad.bfloat16()
        layout = LAYOUTS[name]
        if spread and layout is not None:
            ranks = dist.get_world_size()
            mesh = init_device_mesh("cpu", (ranks,) if len(layout) == 1 else (1, ranks))
            tensor, grad = (distribute_tensor(each, mesh, layout) for each in (tensor, grad))
        params[name] = nn.Parameter(tensor)
        params[name].grad = grad
    return params


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def work(spread: bool) -> dict[str, Any]:
    params = make(spread)
    norms = {p: float(total_grad_norm(params.values(), p)) for p in (1.0, 2.0, 3.0, torch.inf)}
    optimizer = AdamW(params.values(), lr=0.1, rounding="nearest")
    optimizer.grad_scale = divisor(total_grad_norm(params.values()), 0.5)
    optimizer.step()
    inside = {name: full(param) for name, param in params.items()}
    params = make(spread)
    clipped = float(clip_grad_norm_(params.values(), 0.5))
    grads = {name: full(param.grad) for name, param in params.items()}
    AdamW(params.values(), lr=0.1, rounding="nearest").step()
    before = {name: full(param) for name, param in params.items()}
    return {"norms": norms, "clipped": clipped, "grads": grads, "inside": inside, "before": before}


def partial() -> float:
    """Each rank's part of a sum, of which the norm is taken once it is one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    grad = DTensor.from_local(torch.tensor([1.0 + dist.get_rank(), 0.0]), mesh, [Partial()])
    holder: Any = SimpleNamespace(grad=grad)  # a parameter takes no gradient of another layout
    return float(total_grad_norm([holder]))


def test_norms_and_clipping_are_those_of_one_process() -> None:
    expected = work(False)
    grads = [param.grad.float() for param in make(False).values() if param.grad is not None]
    for p, norm in expected["norms"].items():
        assert norm == pytest.approx(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]), p)))
    assert expected["clipped"] == expected["norms"][2.0]
    for got in run_ranks(work, 2, True):
        assert got["norms"] == pytest.approx(expected["norms"], rel=1e-6)
        for part in ("grads", "inside", "before"):
            torch.testing.assert_close(got[part], expected[part])
        for name, weight in got["inside"].items():
            rough = 1e-2 if name == "half" else 1e-5
            torch.testing.assert_close(weight, got["before"][name], rtol=rough, atol=rough)


def test_parts_of_a_sum() -> None:
    assert run_ranks(partial, 2) == [3.0, 3.0]
