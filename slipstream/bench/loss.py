"""The output head with the loss alone, against the time of its three GEMMs.

Dims: T tokens, H hidden, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from slipstream.bench.presets import build_config
from slipstream.bench.timing import peak_above_gib, time_ms
from slipstream.loss import linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_LIGER_CHUNKS = 16  # chunks of about 16 H / V of the tokens, which its GEMMs need to run at full rate


def bench_loss(
    tokens: int, hidden: int, vocabulary: int, device: torch.device, *, iterations: int = 20
) -> dict[str, Any]:
    """`gemm_ms`, the three GEMMs on whole logits, and rows of `contender` and either `error` or figures.

    Each is forward and backward of the mean loss, in bf16: `ms`, `over_gemms` (its time over theirs), `tflops`,
    `peak_gib` above its inputs, and `loss`, which has to agree.
    """
    generator = torch.Generator(device).manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16, generator=generator).requires_grad_()
    weight_VH = torch.empty(vocabulary, hidden, device=device, dtype=torch.bfloat16).normal_(
        0, 0.02, generator=generator
    )
    weight_VH.requires_grad_()
    labels_T = torch.randint(0, vocabulary, (tokens,), device=device, generator=generator)
    inputs = hidden_TH, weight_VH, labels_T

    gemm = _gemms(hidden_TH.detach(), weight_VH.detach(), iterations)
    rows = []
    for name, loss in _contenders():
        figures = {"error": loss} if isinstance(loss, str) else _measure(loss, inputs, gemm["median"], iterations)
        rows.append({"contender": name, **figures})
    return {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary, "gemm_ms": gemm, "rows": rows}


def shape_of(model: str, *, tiny: bool = False) -> tuple[int, int]:
    """(hidden, vocabulary) of a preset."""
    text = build_config(model, tiny=tiny).get_text_config()
    return text.hidden_size, text.vocab_size


def _gemms(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, iterations: int) -> dict[str, float]:
    logits_TV = F.linear(hidden_TH, weight_VH)

    def gemms() -> None:
        F.linear(hidden_TH, weight_VH)
        torch.mm(logits_TV, weight_VH)
        torch.mm(logits_TV.t(), hidden_TH)

    return time_ms(gemms, hidden_TH.device, iterations=iterations)


def _ours(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden_TH, weight_VH, labels_T) / labels_T.shape[0]


def _torch(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """As Transformers computes it: fp32 logits."""
    return F.cross_entropy(F.linear(hidden_TH, weight_VH).float(), labels_T)


def _contenders() -> Iterator[tuple[str, Loss | str]]:
    """Names, each with its loss or the reason why there is none."""
    yield "slipstream", _ours
    yield "torch (fp32 logits)", _torch
    if find_spec("liger_kernel") is None:
        yield "liger", "liger_kernel is not installed"
        return
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    # Parameters after ctx, in order, with their defaults: apply() takes them by position only.
    parameters = list(inspect.signature(Function.forward).parameters.values())[1:]
    defaults = [parameter.default for parameter in parameters[3:]]

    def liger(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        return Function.apply(hidden_TH, weight_VH, labels_T, *defaults)[0]

    yield "liger", liger
    names = [parameter.name for parameter in parameters[3:]]
    if "chunk_mem_const" in names:
        larger = list(defaults)
        larger[names.index("chunk_mem_const")] = _LIGER_CHUNKS

        def liger_larger(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
            return Function.apply(hidden_TH, weight_VH, labels_T, *larger)[0]

        yield f"liger, chunk_mem_const={_LIGER_CHUNKS}", liger_larger


def _measure(
    loss: Loss, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], gemm_ms: float, iterations: int
) -> dict[str, Any]:
    hidden_TH, weight_VH, _ = inputs

    def both() -> torch.Tensor:
        hidden_TH.grad = weight_VH.grad = None
        value = loss(*inputs)
        value.backward()
        return value.detach()

    try:
        value = both().item()
        hidden_TH.grad = weight_VH.grad = None
        peak = peak_above_gib(both, hidden_TH.device)
        ms = time_ms(both, hidden_TH.device, iterations=iterations)
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}
    finally:
        hidden_TH.grad = weight_VH.grad = None
    flops = 6 * hidden_TH.shape[0] * weight_VH.numel()
    return {
        "ms": ms,
        "over_gemms": ms["median"] / gemm_ms,
        "tflops": flops / ms["median"] / 1e9,
        "peak_gib": peak,
        "loss": value,
    }
