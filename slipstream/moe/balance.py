"""Routers: their health, freezing them, and balancing their experts without a loss.

Dims: see load.py.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from slipstream import hf


def load_health(counts_NE: Tensor, num_experts: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """What the loads of N layers say, each fp32 `[N]` on the device of `counts_NE` (tokens of each expert).

    load_max_over_mean: the fullest expert's tokens over the mean's: 1 is balanced, E is all tokens to one. With expert
        parallelism the slowest rank waits for about this much.
    load_entropy: of the load, over log E: 1 is balanced, 0 is all tokens to one.
    dead_experts: how many got no token at all.

    Example: loads [[2, 2], [4, 0]] give max_over_mean [1, 2], entropy [1, 0], dead [0, 1].
    """
    sizes_N = torch.as_tensor(num_experts, device=counts_NE.device)  # a list would have to wait for the device
    share_NE = counts_NE / counts_NE.sum(dim=1, keepdim=True).clamp(min=1)
    missing_N = counts_NE.shape[1] - sizes_N  # columns that only pad the matrix
    return {
        "load_max_over_mean": share_NE.amax(dim=1) * sizes_N,
        "load_entropy": torch.special.entr(share_NE).sum(dim=1) / sizes_N.clamp(min=2).log(),
        "dead_experts": ((counts_NE == 0).sum(dim=1) - missing_N).float(),
    }


class RouterNorms:
    """The norms of the gradients of the routers of a model, which are looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self._routers = [router for _, _, router, _ in hf.routers(model)]
        self._indices: dict[tuple[int, ...], Tensor] = {}  # making one waits for the device

    def take(self) -> Tensor | None:
        """Of each layer's router, `[N]` fp32 on the device; None where none has a gradient.

        Exact for parameters that FSDP2 sharded: one all-reduce for all layers. Call it on all ranks.
        """
        by_mesh: dict[DeviceMesh | None, list[tuple[int, Tensor]]] = {}
        shards: dict[DeviceMesh | None, list[int]] = {}
        for layer, router in enumerate(self._routers):
            for parameter in router.parameters():
                grad = parameter.grad
                if grad is None:
                    continue
                mesh, local = None, grad
                if isinstance(grad, DTensor):
                    mesh, local = grad.device_mesh, grad.to_local()
                    shards[mesh] = [dim for dim, placed in enumerate(grad.placements) if isinstance(placed, Shard)]
                by_mesh.setdefault(mesh, []).append((layer, local))
        total_N: Tensor | None = None
        for mesh, grads in by_mesh.items():
            norms = torch.stack(torch._foreach_norm([grad for _, grad in grads], dtype=torch.float32))
            layers = self._index(tuple(layer for layer, _ in grads), norms.device)
            squares_N = norms.new_zeros(len(self._routers)).index_add_(0, layers, norms.square())
            if mesh is not None:
                for dim in shards[mesh]:
                    dist.all_reduce(squares_N, group=mesh.get_group(dim))
            total_N = squares_N if total_N is None else total_N + squares_N
        return None if total_N is None else total_N.sqrt()

    def _index(self, layers: tuple[int, ...], device: torch.device) -> Tensor:
        if layers not in self._indices or self._indices[layers].device != device:
            self._indices[layers] = torch.tensor(layers, device=device)
        return self._indices[layers]


def freeze_routers(model: nn.Module) -> int:
    """Let no router of `model` train, adapters on it included; how many there are."""
    found = [router for _, _, router, _ in hf.routers(model)]
    for router in found:
        router.requires_grad_(False)
    return len(found)


def check_routers(model: nn.Module, freeze: bool, bias_update_rate: float) -> None:
    """Raises: ValueError where `model` has no router to freeze, or none whose bias can be updated."""
    kind, found = type(model).__name__, list(hf.routers(model))
    if freeze and not found:
        raise ValueError(f"train.freeze_router: {kind} has no router; leave it out")
    if not bias_update_rate:
        return
    given = f"train.router_bias_update_rate={bias_update_rate}"
    biases = [bias for _, _, router, block in found if (bias := hf.selection_bias(router, block)) is not None]
    if not biases:
        raise ValueError(
            f"{given}: the routers of {kind} have no bias for choosing experts; leave it out, or use "
            "train.router_aux_loss_coef if the model has such a loss"
        )
    if any(isinstance(bias, DTensor) and bias.dtype != torch.float32 for bias in biases):
        raise ValueError(
            f"{given}: {kind} has its routers' biases as parameters, which are sharded in {biases[0].dtype} and would "
            "lose most updates; load it with model.dtype: float32, or leave it out"
        )


class BiasBalancing:
    """Balances the experts of a model whose routers have a bias for choosing them, as DeepSeek-V3's do.

    After each step the bias of every expert that got more tokens than the mean falls by `rate`, and that of the others
    rises: b += rate * sign(mean - load) (Wang et al. 2024, arXiv 2408.15664). No gradient, and no part of the loss. The
    bias says which experts a token goes to, not how much they count.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        """Biases are kept in fp32 from here on: bfloat16 would lose most updates. Raises as `check_routers`."""
        check_routers(model, False, rate)
        self.rate = rate
        found = [hf.selection_bias(router, block) for _, _, router, block in hf.routers(model)]
        self.biases = [(layer, bias) for layer, bias in enumerate(found) if bias is not None]
        for _, bias in self.biases:
            if not isinstance(bias, DTensor):
                bias.data = bias.data.float()

    @torch.no_grad()
    def update(self, counts_NE: Tensor) -> None:
        """Move the biases by the tokens that each expert got on all ranks, the same numbers on each."""
        for layer, bias in self.biases:
            load_E = counts_NE[layer, : bias.numel()].float()
            change_E = (load_E.mean() - load_E).sign().mul_(self.rate).to(bias.dtype).view(bias.shape)
            if isinstance(bias, DTensor):
                part = distribute_tensor(change_E, bias.device_mesh, bias.placements, src_data_rank=None)
                bias.to_local().add_(part.to_local())
            else:
                bias.add_(change_E.to(bias.device))
