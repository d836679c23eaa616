"""Rows that are divided over ranks, put together and back, against DTensor."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from slipstream.parallel.gather import gather_parts, spread_over
from tests.distributed.harness import run_ranks

SHAPES = [(9, 3), (8, 5), (2, 4), (1, 1)]  # over 4 ranks: with parts of different sizes, and with empty ones
SHARE = 0.5


def _differences(names: tuple[str, ...], replicated: tuple[bool, ...]) -> list[float]:
    """Of the whole, and of the parts' gradients, to what DTensor computes."""
    mesh = init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)
    placements = [Replicate() if same else Shard(0) for same in replicated]
    torch.manual_seed(0)
    wholes = [torch.randn(shape) for shape in SHAPES]
    parts = [distribute_tensor(whole, mesh, placements).to_local().requires_grad_() for whole in wholes]
    rows, over = [rows for rows, _ in SHAPES], spread_over(mesh, replicated)
    found = gather_parts(parts, rows, over, SHARE, torch.bfloat16)
    torch.manual_seed(dist.get_rank())
    grads = [torch.randn(shape).bfloat16() for shape in SHAPES]
    torch.autograd.backward(found, grads)
    mode = FakeTensorMode()
    fake = [mode.from_tensor(part.detach()) for part in parts]
    with mode:  # what the compiler is told
        told = torch.ops.slipstream.gather_parts(fake, rows, *over, SHARE, torch.bfloat16)
        back = torch.ops.slipstream.scatter_sums(told, rows, *over, SHARE, torch.float32)
    assert [(one.shape, one.dtype, one.stride()) for one in (*told, *back)] == [
        (one.shape, one.dtype, one.stride()) for one in (*found, *(part.grad for part in parts))
    ]
    differences = []
    for whole, part, got, grad in zip(wholes, parts, found, grads, strict=True):
        of_rank = DTensor.from_local(grad.float(), mesh, [Partial()] * mesh.ndim)
        expected = of_rank.redistribute(placements=placements).to_local() * SHARE
        assert part.grad is not None
        assert part.grad.dtype == torch.float32
        assert part.grad.shape == expected.shape == part.shape
        differences += [float((got - whole.bfloat16()).abs().max()), float((part.grad - expected).abs().sum())]
    return differences


@pytest.mark.parametrize(
    ("names", "replicated"),
    [(("ep",), (False,)), (("efsdp", "ep"), (False, False)), (("dp_replicate", "ep"), (True, False))],
)
def test_as_dtensor_does(names: tuple[str, ...], replicated: tuple[bool, ...]) -> None:
    for found in run_ranks(_differences, 2 ** len(names), names, replicated):
        assert max(found) < 1e-6
