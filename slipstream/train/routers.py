"""The routers of a model in training: what the log says of them, and what a recipe asks to be done to them."""

import math

import torch
from torch import Tensor, nn

from slipstream.moe.balance import BiasBalancing, RouterNorms, check_routers, freeze_routers, load_health
from slipstream.moe.load import ExpertLoad, sum_over_ranks
from slipstream.train.callbacks import PER_LAYER

ROUTER_NORM = "router_grad_norm"


class Routers:
    """Counts what each expert gets, for the log and for balancing; nothing of it waits for the device.

    Make it on all ranks, before the optimizer. Without experts it does nothing.
    """

    def __init__(self, model: nn.Module, device: torch.device, freeze: bool, bias_update_rate: float) -> None:
        """`device` is where the model computes. Raises as `check_routers`."""
        check_routers(model, freeze, bias_update_rate)
        if freeze:
            freeze_routers(model)
        load = ExpertLoad(model, device)
        self._router_norms = RouterNorms(model)
        self._load = load if load.layers else None
        self._balancing = BiasBalancing(model, bias_update_rate) if bias_update_rate else None
        self._summed_NE: Tensor | None = None  # since the last log, where balancing sums the ranks' counts each step
        self._norms_N: Tensor | None = None

    def see(self, attention_mask: Tensor | None) -> None:
        """Say which tokens of the next micro-batch count; see `ExpertLoad.see`."""
        if self._load is not None:
            self._load.see(attention_mask)

    def before_update(self, divided_by: Tensor | None, will_log: bool, bad: Tensor | None = None) -> None:
        """Balance by the step's loads; where the step will be logged, take the norms of the routers' gradients.

        Args:
            divided_by: what clipping has divided the gradients by; None: they are as they were.
            will_log: whether `measure` is called after the update.
            bad: a scalar; where it is true, the tokens since the last update, or the last `measure`, don't count.
        """
        if self._load is None:
            return
        if bad is not None:
            self._load.forget_if(bad)
        if will_log:
            self._norms_N = self._router_norms.take()
            if self._norms_N is not None and divided_by is not None:
                self._norms_N *= divided_by
        if self._balancing is not None:
            loads_NE = sum_over_ranks(self._load.take())  # all 0 after a bad step, which then moves no bias
            self._balancing.update(loads_NE)
            self._summed_NE = loads_NE if self._summed_NE is None else self._summed_NE + loads_NE

    def forget(self) -> None:
        """Leave out what was counted since the last update."""
        if self._load is not None:
            self._load.take()

    def measure(self) -> dict[str, Tensor]:
        """How experts and routers fared since the last call, on all ranks: name -> fp32 `[N]` on the device."""
        if self._load is None:
            return {}
        loads_NE = sum_over_ranks(self._load.take()) if self._summed_NE is None else self._summed_NE
        measured = load_health(loads_NE, self._load.sizes_N)
        if self._norms_N is not None:
            measured[ROUTER_NORM] = self._norms_N
        self._summed_NE = self._norms_N = None
        return measured

    def health(self, values: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, float]]:
        """What to log of what `measure` returned: the worst layer's figures, and `moe/NAME/LAYER`."""
        if self._load is None:
            return {}, {}
        worst = {
            "moe_load_max_over_mean": max(values["load_max_over_mean"]),
            "moe_load_entropy": min(values["load_entropy"]),
            "moe_dead_experts": sum(values["dead_experts"]),
        }
        if ROUTER_NORM in values:
            worst[ROUTER_NORM] = math.hypot(*values[ROUTER_NORM])
        by_layer = {
            f"{PER_LAYER}/{name}/{layer}": _short(value)
            for name, of_layers in values.items()
            for layer, value in zip(self._load.layers, of_layers, strict=True)
        }
        return {name: _short(value) for name, value in worst.items()}, by_layer


def _short(value: float) -> float:
    return float(f"{value:.6g}")
