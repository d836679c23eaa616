"""AdamW as one kernel a tensor, with three ways to keep 16-bit weights from losing small updates."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from slipstream.kernels.adamw import Coefficients, Facts, Update
from slipstream.kernels.adamw_many import adamw_all_
from slipstream.optim.shards import place_of, random_at

Rounding = Literal["nearest", "stochastic", "master"]
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_STATES = (torch.float32, torch.bfloat16)


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with decoupled weight decay, in one pass over memory.

    For fp32 parameters and states it is `torch.optim.AdamW`, whatever `rounding` says. The arithmetic is always fp32;
    `rounding` is what happens to results that are stored in 16 bits:

    - "nearest": as `torch.optim.AdamW(fused=True)`. bf16 has steps of 1/128 to 1/256 of a value, so smaller updates of
      a weight are lost, and `exp_avg_sq`, which wants to shrink by 1/1000 a step, never shrinks.
    - "stochastic": up or down at random, so that the mean is exact and nothing is lost on average (Zamirai et al. 2020,
      "Revisiting BFloat16 Training", arXiv 2010.06192). Costs no memory.
    - "master": exact fp32 weights, of which the model sees the nearest bf16 and the state keeps the other 16 bits, 2
      bytes a parameter. bf16 states are rounded stochastically.

    Random bits depend on nothing but `seed`, the step, the parameter's number and the element, so a run can be repeated
    and continued bit for bit. Replicas of a parameter draw the same bits and its shards different ones; plain tensors
    stay equal on all ranks. That takes the same `seed` and the same order of parameters on all ranks.

    State of a parameter: `step` (fp32 scalar on the CPU), `exp_avg`, `exp_avg_sq` and, with "master", `residual`
    (int16), laid out as the parameter, so that `torch.distributed.checkpoint` reshards them. Collectives carry no
    int16: save "master" states sharded, not with `full_state_dict=True`.

    Two attributes change the next step, by the names that torch's fused optimizers have for them. Both are scalar
    tensors that may lie on the device, where the host does not know their values:

    - `grad_scale`: gradients are divided by it as they are read, so that clipping costs no pass over memory.
    - `found_inf`: where it is not 0, weights and states stay as they are. Whoever finds out calls `forget_step`, before
      the next step.

    Args:
        params: parameters or groups of them, as for any optimizer; every argument below can be set for a group. Plain
            tensors and DTensors in fp32, bf16 or (not with "master") fp16.
        lr: learning rate, a float or a scalar tensor on the CPU.
        betas: decay of the running means of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second, > 0.
        weight_decay: a weight shrinks by `lr * weight_decay` of itself a step.
        rounding: see above.
        state_dtype: of the running means, fp32 or bf16. Default: the parameter's; for fp16 bf16, for fp16 holds no
            squares of gradients.
        seed: of the random bits.

    Raises:
        TypeError, ValueError: for arguments, and at a step for gradients, that it does not take.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rounding: Rounding = "stochastic",
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._stepped: list[Tensor] = []  # the numbers of steps that the last step has raised
        self._parts: dict[Tensor, _Part] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "state_dtype": state_dtype,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.grad_scale, self.found_inf, self._stepped, self._parts = None, None, [], {}
        for group in self.param_groups:  # of a checkpoint of torch.optim.AdamW
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`, which casts states to their parameter's dtype; here they keep their own."""
        super().load_state_dict(state_dict)
        numbers = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(numbers, params, strict=True):
            for name, saved in state_dict["state"].get(number, {}).items():
                if name == "step":
                    self.state[param][name] = torch.as_tensor(saved, dtype=torch.float32, device="cpu")
                elif isinstance(saved, Tensor) and self.state[param][name].dtype != saved.dtype:
                    self.state[param][name] = saved.to(param.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; the value of `closure`, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        number = 0
        coefficients = functools.cache(Coefficients.of)
        controls = functools.cache(functools.partial(_controls, self.grad_scale, self.found_inf))
        self.grad_scale, self.found_inf, self._stepped = None, None, []
        for group in self.param_groups:
            group_lr = _float(group["lr"])
            for param in group["params"]:
                if param.grad is not None:
                    work.append((number, param, _local_grad(number, param), group, group_lr))
                number += 1
        self._stepped = [self._states(param, group)["step"] for _, param, _, group, _ in work]
        if work:
            torch._foreach_add_(self._stepped, torch.tensor(1.0), alpha=1.0)  # 1 would become a tensor for each
        steps = torch.stack(self._stepped).tolist() if work else []
        adamw_all_(
            self._update(*entry, int(step), coefficients, controls) for entry, step in zip(work, steps, strict=True)
        )
        # Autograd does not see what a kernel writes.
        torch.autograd.graph.increment_version([param for _, param, *_ in work])
        return loss

    def forget_step(self) -> None:
        """Count the last step as not made: `found_inf` was set. Bias corrections are then those of the steps made."""
        if self._stepped:
            torch._foreach_sub_(self._stepped, 1)
        self._stepped = []

    def _states(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's, made where they are missing."""
        state = self.state[param]
        if not state:
            dtype = group["state_dtype"] or (torch.bfloat16 if param.dtype == torch.float16 else param.dtype)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
        if "residual" not in state and _has_residual(param, group):
            state["residual"] = torch.zeros_like(param, dtype=torch.int16)
        return state

    def _update(
        self,
        number: int,
        param: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        lr: float,
        step: int,
        coefficients: Callable[..., Coefficients],
        controls: Callable[[torch.device], tuple[Tensor | None, Tensor | None]],
    ) -> Update:
        state = self.state[param]
        residual = state["residual"] if _has_residual(param, group) else None
        whole = (_local(param), state["exp_avg"], state["exp_avg_sq"], residual)
        part = self._parts.get(param)
        if part is None or not part.is_still_of(*whole):
            local: list[Any] = [None if tensor is None else _local(tensor) for tensor in whole]
            part = self._parts[param] = _Part(whole, local, place_of(param), Facts.of(*local))
        own, exp_avg, exp_avg_sq, missing = part.local
        return Update(
            own,
            grad,
            exp_avg,
            exp_avg_sq,
            missing,
            coefficients(lr, tuple(group["betas"]), group["eps"], group["weight_decay"], step),
            None if group["rounding"] == "nearest" else random_at(part.place, group["seed"], number, step),
            *controls(param.device),
            part.facts,
        )


class _Part(NamedTuple):
    """What a step would find out anew for each parameter, a good part of the host's time where there are many."""

    whole: tuple[Any, ...]  # this rank's weights and the states, which it was found for
    local: list[Any]
    place: tuple[int, int]
    facts: Facts

    def is_still_of(self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, residual: Tensor | None) -> bool:
        one, two, three, four = self.whole
        same = param is one and exp_avg is two and exp_avg_sq is three and residual is four
        return same and self.facts.still_of(*self.local)


def _has_residual(param: Tensor, group: dict[str, Any]) -> bool:
    return group["rounding"] == "master" and param.dtype == torch.bfloat16


def _controls(
    grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """What gradients are multiplied by, and what says that nothing is written, as the kernel takes them."""
    scale = None if grad_scale is None else grad_scale.to(device, torch.float32).reciprocal()
    return scale, None if found_inf is None else found_inf.to(device, torch.float32)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_grad(number: int, param: Tensor) -> Tensor:
    """This rank's part of the gradient. Raises: TypeError or ValueError where it is not laid out as the parameter."""
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise TypeError(f"the gradient of parameter {number} is {grad.layout}; AdamW takes dense gradients only")
    if isinstance(param, DTensor) != isinstance(grad, DTensor):
        raise TypeError(
            f"parameter {number} is a {type(param).__name__} and its gradient a {type(grad).__name__}; "
            "both must be DTensors or neither"
        )
    if isinstance(param, DTensor) and isinstance(grad, DTensor):
        if (param.device_mesh, param.placements) != (grad.device_mesh, grad.placements):
            raise ValueError(
                f"parameter {number} lies as {param.placements} on {param.device_mesh} and its gradient as "
                f"{grad.placements} on {grad.device_mesh}; give it the parameter's layout with "
                "grad.redistribute(param.device_mesh, param.placements)"
            )
        return grad.to_local()
    return grad


def _float(lr: float | Tensor) -> float:
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or lr.dim()):
        raise TypeError(
            f"lr is a tensor of shape {[*lr.shape]} on {lr.device}: give a float or a scalar tensor on the CPU"
        )
    return float(lr)


def _check_group(group: dict[str, Any]) -> None:
    if not _float(group["lr"]) >= 0:
        raise ValueError(f"lr={group['lr']}: give a number >= 0")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']}: give two numbers >= 0 and < 1")
    if not group["eps"] > 0:
        raise ValueError(f"eps={group['eps']}: give a number > 0")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={group['weight_decay']}: give a number >= 0")
    if group["rounding"] not in get_args(Rounding):
        raise ValueError(f"rounding={group['rounding']!r}: use one of {', '.join(map(repr, get_args(Rounding)))}")
    if group["state_dtype"] not in (None, *_STATES):
        raise ValueError(f"state_dtype={group['state_dtype']}: use None, torch.float32 or torch.bfloat16")
    if not isinstance(group["seed"], int) or not 0 <= group["seed"] < 1 << 64:
        raise ValueError(f"seed={group['seed']!r}: give a whole number >= 0 and < 2**64")
    for param in group["params"]:
        if param.dtype not in _WEIGHTS:
            raise TypeError(
                f"a parameter is {param.dtype}: AdamW takes torch.float32, torch.bfloat16 and torch.float16; "
                "use torch.optim.AdamW for others"
            )
        if param.dtype == torch.float16 and group["rounding"] == "master":
            raise TypeError('rounding="master" takes no torch.float16 parameters: use "stochastic", or torch.bfloat16')
