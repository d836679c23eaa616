"""The routers of a model in training: what the log says of them, and what a recipe asks to be done to them."""

import math

import torch
from torch import Tensor, nn

from slipstream.moe.balance import BiasBalancing, check_routers, freeze_routers, load_health, router_gradient_norms
from slipstream.moe.load import ExpertLoad, sum_over_ranks
from slipstream.train.callbacks import PER_LAYER


class Routers:
    """Counts what each expert gets, for the log and for balancing; nothing of it waits for the device.

    Make it on all ranks, before the optimizer. Without experts it does nothing.
    """

    def __init__(self, model: nn.Module, device: torch.device, freeze: bool, bias_update_rate: float) -> None:
        """`device` is where the model computes. Raises as `check_routers`."""
        check_routers(model, freeze, bias_update_rate)
        self._model = model
        if freeze:
            freeze_routers(model)
        load = ExpertLoad(model, device)
        self._load = load if load.layers else None
        self._balancing = BiasBalancing(model, bias_update_rate) if bias_update_rate else None
        self._summed_NE: Tensor | None = None  # since the last log, where balancing sums the ranks' counts each step
        self._norms_N: Tensor | None = None

    def see(self, attention_mask: Tensor | None) -> None:
        """Say which tokens of the next micro-batch count; see `ExpertLoad.see`."""
        if self._load is not None:
            self._load.see(attention_mask)

    def before_update(self, grad_norm: Tensor, max_grad_norm: float, will_log: bool) -> None:
        """Balance by the step's loads; where the step will be logged, take the norms of the routers' gradients.

        Args:
            grad_norm: of the whole gradient, before it was clipped to `max_grad_norm` (0: it was not).
            will_log: whether `health` is called after the update.
        """
        if self._load is None:
            return
        if will_log:
            self._norms_N = router_gradient_norms(self._model)
            if self._norms_N is not None and max_grad_norm:
                self._norms_N /= (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        if self._balancing is not None:
            loads_NE = sum_over_ranks(self._load.take())
            self._balancing.update(loads_NE)
            self._summed_NE = loads_NE if self._summed_NE is None else self._summed_NE + loads_NE

    def forget(self) -> None:
        """Leave out what was counted since the last update."""
        if self._load is not None:
            self._load.take()

    def health(self) -> tuple[dict[str, float], dict[str, float]]:
        """How experts and routers fared since the last call, on all ranks: of the worst layer, and `moe/NAME/LAYER`.

        Waits for the device once.
        """
        if self._load is None:
            return {}, {}
        loads_NE = sum_over_ranks(self._load.take()) if self._summed_NE is None else self._summed_NE
        measured = load_health(loads_NE, self._load.num_experts)
        if self._norms_N is not None:
            measured["router_grad_norm"] = self._norms_N
        self._summed_NE = self._norms_N = None
        rows = torch.stack([value_N.float() for value_N in measured.values()]).tolist()
        values = dict(zip(measured, rows, strict=True))
        worst = {
            "moe_load_max_over_mean": max(values["load_max_over_mean"]),
            "moe_load_entropy": min(values["load_entropy"]),
            "moe_dead_experts": sum(values["dead_experts"]),
        }
        if "router_grad_norm" in values:
            worst["router_grad_norm"] = math.hypot(*values["router_grad_norm"])
        by_layer = {
            f"{PER_LAYER}/{name}/{layer}": _short(value)
            for name, of_layers in values.items()
            for layer, value in zip(self._load.layers, of_layers, strict=True)
        }
        return {name: _short(value) for name, value in worst.items()}, by_layer


def _short(value: float) -> float:
    return float(f"{value:.6g}")
