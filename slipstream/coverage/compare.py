"""How close two models are, and what a check says."""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from slipstream.compilation import first_line

LIMIT = 1e-5  # of the loss and of each gradient, relative
# Gated delta nets divide small numbers on the CPU: Transformers' own `grouped_mm` is as far from its `eager`.
NOISY_LIMIT = 1e-4
NOISY = ("linear_attention", "gated_delta_net")


@dataclass
class Cell:
    """One check's outcome.

    Attributes:
        status: "ok", "failed", "refused" (an error that says what to do), or "n/a".
        text: a figure or a reason.
    """

    status: str
    text: str = ""

    def __str__(self) -> str:
        return self.text if self.status == "ok" and self.text else " ".join(filter(None, (self.status, self.text)))


class Attempt:
    """As a context it keeps what is raised inside, in one line."""

    error = ""

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is not None:
            self.error = first_line(error)[:200]
        return isinstance(error, Exception)


def limit_of(model: PreTrainedModel) -> float:
    """How far the loss and gradients of `model` may be from Transformers'."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    return NOISY_LIMIT if set(kinds) & set(NOISY) else LIMIT


def loss_and_gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of one batch whose first labels are masked."""
    torch.manual_seed(3)  # for models with dropout or jitter
    labels = ids.clone()
    labels[:, :5] = -100
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rounding(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """How far the worst gradient of `model`, in fp32, is from the same model's in fp64: sums in another order can't be
    held to less."""
    gradients = []
    for exact in (False, True):
        one = copy.deepcopy(model)
        gradients.append(loss_and_gradients(one.double() if exact else one, ids)[1])
    return worst_gradient(*gradients)[0]


def worst_gradient(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error of a gradient over its own largest value, or over the median of those values where that is
    larger: a gradient far below the others is a difference of larger numbers and carries their rounding."""
    if found.keys() != expected.keys():
        return float("inf"), f"gradients of other parameters: {sorted(found.keys() ^ expected.keys())[0]}"
    median = torch.stack([grad.abs().max() for grad in expected.values()]).median()
    errors = {
        name: ((found[name] - grad).abs().max() / torch.maximum(grad.abs().max(), median)).item()
        for name, grad in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def compared(loss: float, gradient: tuple[float, str], limit: float) -> Cell:
    """The cell for a relative error of the loss and the worst one of a gradient."""
    worst, name = gradient
    good = loss <= limit and worst <= limit
    return Cell("ok" if good else "failed", f"{loss:.0e}, {worst:.0e}" + ("" if good else f" ({name})"))


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the safetensors files of a checkpoint hold, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return dict(sorted(tensors.items()))
