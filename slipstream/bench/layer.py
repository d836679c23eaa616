"""The expert layer alone: one experts module of a preset's config, ours beside others', over routings and sizes.

Dims: T tokens, H hidden, K experts per token, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from slipstream import fp8, hf
from slipstream.bench.presets import build_config
from slipstream.bench.timing import peak_above_gib, time_ms
from slipstream.compilation import first_line
from slipstream.moe.routing import balanced_index
from slipstream.planning.flops import meta_model, top_k

RIVALS = ("transformers", "liger", "sonic")
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def bench_layer(
    model: str,
    tokens: list[int],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    simulate_ep: int = 1,
    ceiling: float = 750.0,
    tiny: bool = False,
    iterations: int = 20,
    rivals: Sequence[str] = RIVALS,
) -> Iterator[dict[str, Any]]:
    """Yield rows of `tokens`, `routing`, `imbalance`, `contender`, and either `error` or times, rates and memory, as
    they are measured: the slow starters last.

    Args:
        model: a preset with experts.
        tokens: of one rank, a list of sizes.
        simulate_ep: ranks of a group of which one's share is run: `E / simulate_ep` experts, `T * K` rows in all, as
            they arrive after an exchange (one expert each).
        rivals: of `RIVALS`, beside ours.
        ceiling: the TFLOP/s that a dense GEMM reaches on this device, to compare with.

    Raises:
        ValueError: the preset is dense, its experts don't divide by `simulate_ep`, or there is no such rival.
    """
    if unknown := [name for name in rivals if name not in RIVALS]:
        raise ValueError(f"--rivals {unknown[0]}: use some of {','.join(RIVALS)}")
    config = build_config(model, tiny=tiny)
    config = build_config(model, experts=0, tiny=tiny) if hf.num_routed_experts(config) else config
    experts = hf.num_routed_experts(config)
    if experts is None:
        raise ValueError(f"--model {model}: a dense model has no expert layer")
    if simulate_ep < 1 or experts % simulate_ep:
        raise ValueError(f"--simulate-ep {simulate_ep} does not divide {experts} experts")
    owner, module = _experts_module(model, experts // simulate_ep, tiny, device, dtype)
    for count in tokens:
        k = top_k(config) if simulate_ep == 1 else 1
        count = count if simulate_ep == 1 else count * top_k(config)
        about = {"tokens": count, "experts": module.num_experts, "top_k": k}
        inputs = {routing: _inputs(module, count, k, routing, device, dtype) for routing in ("balanced", "learned")}
        imbalances = {routing: _imbalance(idx_TK, module.num_experts) for routing, (_, idx_TK, _) in inputs.items()}
        for name, forward in _contenders(owner, module, rivals):
            for routing, given in inputs.items():
                yield {
                    **about,
                    "routing": routing,
                    "imbalance": imbalances[routing],
                    "contender": name,
                    **_measure(forward, module, given, ceiling, iterations),
                }


def _experts_module(model: str, experts: int, tiny: bool, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model on the meta device whose first experts module, returned beside it, lies on `device`."""
    config = build_config(model, experts=experts, tiny=tiny)
    owner = meta_model(config)
    _, module = next(hf.experts_modules(owner))
    module.to_empty(device=device).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02)
    return owner, module


def _inputs(
    module: Any, tokens: int, k: int, routing: str, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x_TH`, `idx_TK`, `weights_TK`. Learned: the top of a softmax over random logits, some experts likelier."""
    generator = torch.Generator(device).manual_seed(0)
    weight = module.down_proj
    hidden = weight.shape[2] if module.is_transposed else weight.shape[1]
    x_TH = torch.randn(tokens, hidden, device=device, dtype=dtype, generator=generator)
    logits_TE = torch.randn(tokens, module.num_experts, device=device, generator=generator)
    logits_TE += 0.5 * torch.randn(module.num_experts, device=device, generator=generator)
    weights_TK, idx_TK = torch.topk(logits_TE.softmax(-1), k)
    if routing == "balanced":
        idx_TK = balanced_index(idx_TK, module.num_experts)
    weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(dtype)
    return x_TH.requires_grad_(), idx_TK, weights_TK.requires_grad_()


def _imbalance(idx_TK: torch.Tensor, experts: int) -> float:
    load = torch.bincount(idx_TK.flatten(), minlength=experts).float()
    return (load.max() / load.mean()).item()


def _contenders(owner: Any, module: Any, rivals: Sequence[str]) -> Iterator[tuple[str, Experts | str]]:
    """Names, each with its forward or the reason why there is none."""
    import slipstream.moe.experts  # noqa: F401  (registers the implementation "slipstream")

    owner.set_experts_implementation("slipstream")  # until the next one is asked for
    yield "slipstream", module
    if "transformers" in rivals:
        owner.set_experts_implementation("grouped_mm")
        yield "transformers grouped_mm", module
    weights = [parameter for parameter in module.parameters() if parameter.ndim == 3]
    if weights[0].dtype == torch.bfloat16 and not any(
        fp8.obstacle(weight.device) or fp8.width_obstacle(*weight.shape[1:]) for weight in weights
    ):
        owner.set_experts_implementation("slipstream_fp8")
        yield "slipstream fp8", module
    # These compile and tune their kernels for minutes.
    if "sonic" in rivals:
        yield "sonic-moe (quack)", _sonic(module)
    if "liger" in rivals:
        yield "liger fused moe", _liger(module)


def _obstacle(module: Any, package: str) -> str | None:
    """Why a package with kernels for plain SwiGLU experts cannot run an experts module, or None."""
    plain = module.has_gate and module.is_concatenated and not module.is_transposed and not module.has_bias
    if not plain or "silu" not in type(module.act_fn).__name__.lower():
        return "only SwiGLU as [gate; up] without biases"
    return None if find_spec(package) is not None else f"{package} is not installed"


def _sonic(module: Any) -> Experts | str:
    """SonicMoE (Guo et al. 2025, arXiv 2512.14080), whose GEMMs are quack's."""
    if (why := _obstacle(module, "sonicmoe")) is not None:
        return why
    try:
        from sonicmoe import moe_general_routing_inputs
        from sonicmoe.enums import ActivationType
    except ImportError as error:  # its pins and quack's differ
        return f"sonic-moe does not import: {error}"

    def forward(x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        tokens, top_k = idx_TK.shape
        token_R = torch.arange(tokens, dtype=torch.int32, device=x_TH.device).repeat_interleave(top_k)
        up_NHE, down_HIE = module.gate_up_proj.permute(1, 2, 0), module.down_proj.permute(1, 2, 0)
        out_TH, _ = moe_general_routing_inputs(
            x_TH, weights_TK.flatten(), token_R, idx_TK.flatten().to(torch.int32), up_NHE, None, down_HIE, None,
            module.num_experts, torch.cuda.current_stream().cuda_stream if x_TH.is_cuda else 0, ActivationType.SWIGLU,
            concat_layout=True,
        )  # fmt: skip
        return out_TH

    return forward


def _liger(module: Any) -> Experts | str:
    if (why := _obstacle(module, "liger_kernel")) is not None:
        return why
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def forward(x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return LigerFusedMoEFunction.apply(
            x_TH, module.gate_up_proj, module.down_proj, idx_TK.to(torch.int32), weights_TK
        )

    return forward


def _measure(
    forward: Experts | str, module: Any, inputs: tuple[torch.Tensor, ...], ceiling: float, iterations: int
) -> dict[str, Any]:
    if isinstance(forward, str):
        return {"error": forward}
    x_TH, idx_TK, _ = inputs
    grad_TH = torch.randn_like(x_TH)
    leaves = [x_TH, inputs[2], *module.parameters()]

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward(*inputs).backward(grad_TH)

    def only_forward() -> None:
        forward(*inputs)

    device = x_TH.device
    try:
        peak = peak_above_gib(both, device)
        times = {
            "forward": time_ms(only_forward, device, iterations=iterations),
            "forward_backward": time_ms(both, device, iterations=iterations),
        }
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:
        if forward is module:  # ours or Transformers': a fault, where a package's kernels may just not run here
            raise
        return {"error": first_line(error)}
    finally:
        for leaf in leaves:
            leaf.grad = None
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 3)
    flops = 2 * idx_TK.numel() * weights / module.num_experts
    rate = {"forward": flops / times["forward"]["median"] / 1e9,
            "forward_backward": 3 * flops / times["forward_backward"]["median"] / 1e9}  # fmt: skip
    return {
        "ms": times,
        "tflops": rate,
        "of_ceiling": {name: value / ceiling for name, value in rate.items()},
        "peak_gib": peak,
    }
