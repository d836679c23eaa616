"""Exchanges by stores on two GPUs: races, host waits, CUDA graphs."""

import warnings

import pytest
import torch
import torch.distributed as dist

from slipstream.kernels.expert_activation import Activation
from slipstream.moe.activation import register
from slipstream.moe.dispatch import AllGatherDispatcher, NvlinkDispatcher, nvlink_experts, peers
from slipstream.moe.lora import LowRank
from tests.distributed.harness import run_ranks
from tests.distributed.test_dispatch import LOCAL_EXPERTS, TOP_K

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")]


def _races(_: None) -> int:
    """1000 exchanges with both gradients, each rank late at random; how many differ from the all-gather's."""
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    torch.manual_seed(rank)
    nvlink, reference = NvlinkDispatcher(LOCAL_EXPERTS), AllGatherDispatcher(LOCAL_EXPERTS)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for step in range(1000):
        tokens = int(torch.randint(0, 300, ()))
        x_TH = torch.randn(tokens, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
        idx_TK = torch.rand(tokens, 2 * LOCAL_EXPERTS, device=device).topk(TOP_K, dim=1).indices
        weights_TK = torch.rand(tokens, TOP_K, device=device, requires_grad=True)
        grad_TH = torch.randn_like(x_TH)
        outcomes = []
        for dispatcher in (nvlink, reference) if step % 10 == 0 else (nvlink,):
            sent = dispatcher.dispatch(x_TH, idx_TK, weights_TK)
            if torch.rand(()) < 0.3:
                torch.cuda._sleep(int(torch.randint(1, 2_000_000, ())))
            out_TH = dispatcher.combine(sent.rows_RH * sent.weights_RK.sum(dim=1, keepdim=True).bfloat16(), sent)
            if torch.rand(()) < 0.3:
                torch.cuda._sleep(int(torch.randint(1, 2_000_000, ())))
            outcomes.append((out_TH, *torch.autograd.grad(out_TH, (x_TH, weights_TK), grad_TH)))
        if len(outcomes) == 2:
            for found, expected in zip(*outcomes, strict=True):
                bad = (found.float() - expected.float()).abs() > 0.05 * (1 + expected.float().abs())
                wrong += bad.sum() + found.isnan().sum()
        else:
            wrong += sum(tensor.isnan().sum() for tensor in outcomes[0])
    return int(wrong)


def test_exchanges_back_to_back() -> None:
    assert run_ranks(_races, 2, None, timeout=300, backend="nccl") == [0, 0]


def _syncs(adapted: bool) -> int:
    """How often the host waits for the device in forward and backward of the operator."""
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    group = peers.peers_of(None, device)
    activation = Activation("silu")
    name = register(str(activation), activation)
    x_TH = torch.randn(64, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    idx_TK = torch.rand(64, 2 * LOCAL_EXPERTS, device=device).topk(TOP_K, dim=1).indices
    weights_TK = torch.rand(64, TOP_K, device=device, requires_grad=True)
    up = torch.randn(LOCAL_EXPERTS, 128, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    down = torch.randn(LOCAL_EXPERTS, 64, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    lora = {}
    if adapted:
        for key, weight in (("up_lora", up), ("down_lora", down)):
            wide, out = weight.requires_grad_(False).shape[1:]
            factors = (torch.randn(LOCAL_EXPERTS, *size, device=device) for size in ((wide, 8), (8, out)))
            lora[key] = LowRank(*(factor.bfloat16().requires_grad_() for factor in factors))
    count = 0
    for _round in range(3):  # the first ones compile and make the areas
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            nvlink_experts(x_TH, weights_TK, idx_TK, up, down, name, **lora, peers=group.name).sum().backward()
            count = len(caught)
        torch.cuda.set_sync_debug_mode("default")
    return count


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])
def test_the_host_does_not_wait(adapted: bool) -> None:
    assert run_ranks(_syncs, 2, adapted, timeout=120, backend="nccl") == [0, 0]


def _captured(_: None) -> float:
    """A layer's forward and backward as a CUDA graph, replayed with new tokens, against eager."""
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    torch.manual_seed(rank)
    group = peers.peers_of(None, device)
    activation = Activation("silu")
    name = register(str(activation), activation)
    x_TH = torch.randn(64, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    idx_TK = torch.rand(64, 2 * LOCAL_EXPERTS, device=device).topk(TOP_K, dim=1).indices
    weights_TK = torch.rand(64, TOP_K, device=device)
    up = torch.randn(LOCAL_EXPERTS, 128, 128, device=device, dtype=torch.bfloat16)
    down = torch.randn(LOCAL_EXPERTS, 64, 128, device=device, dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out_TH = nvlink_experts(x_TH, weights_TK, idx_TK, up, down, name, peers=group.name)
        return out_TH, torch.autograd.grad(out_TH.float().square().sum(), x_TH)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _round in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    worst = 0.0
    for _round in range(5):
        with torch.no_grad():
            x_TH.normal_()
            idx_TK.copy_(torch.rand(64, 2 * LOCAL_EXPERTS, device=device).topk(TOP_K, dim=1).indices)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for found, expected in zip(replayed, step(), strict=True):
            worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
    return worst


def test_a_layer_as_a_cuda_graph() -> None:
    assert max(run_ranks(_captured, 2, None, timeout=120, backend="nccl")) == 0.0
