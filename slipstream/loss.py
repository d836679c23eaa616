"""Fused linear cross-entropy on deferred logits: the `[T, V]` logits of a training step never exist.

While a model runs with labels, its output head returns `DeferredLogits`, which remember the hidden states and the
head. The loss consumes them chunk by chunk. Whoever touches `out.logits` gets the ordinary tensor, made on demand.
The idea of computing gradients chunk by chunk in the forward pass is Liger Kernel's (Hsu et al. 2024,
arXiv 2410.10989); deferral makes it work without a model's cooperation.

Dims: B batch, S sequence, T = B * S tokens, H hidden, V vocabulary.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from slipstream import hf
from slipstream.kernels.cross_entropy import Transform, cross_entropy_
from slipstream.numerics import compute_dtype

# Enough rows for the head's GEMMs to run at full rate, few enough that a chunk's logits stay below the weights in
# memory: 2048 x 151,936 x 2 B = 0.6 GB.
CHUNK_TOKENS = 2048

_deferring: ContextVar[bool] = ContextVar("slipstream_deferring_logits", default=False)


class DeferredLogits(torch.Tensor):
    """The logits `head(hidden)`, `[B, S, V]`, not computed yet.

    `.float()`, a scalar `*` or `/`, `tanh` and a slice of the vocabulary are remembered; any other use computes the
    tensor once and goes on with it, gradients included.
    """

    hidden: torch.Tensor
    head: nn.Linear
    transform: Transform

    @staticmethod
    def __new__(
        cls, hidden: torch.Tensor, head: nn.Linear, transform: Transform | None = None, dtype: torch.dtype | None = None
    ) -> "DeferredLogits":
        vocabulary = head.weight.shape[0] if transform is None else transform.vocabulary
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (*hidden.shape[:-1], vocabulary), dtype=dtype or compute_dtype(hidden), device=hidden.device
        )

    def __init__(
        self,
        hidden: torch.Tensor,
        head: nn.Linear,
        transform: Transform | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.hidden, self.head = hidden, head
        self.transform = transform or Transform(head.weight.shape[0])
        self._weight_version = head.weight._version
        self._tensor: torch.Tensor | None = None

    def materialize(self) -> torch.Tensor:
        """The logits as an ordinary tensor that autograd follows.

        Raises:
            RuntimeError: the head's weights have changed since the forward pass.
        """
        if self._tensor is None:
            if self.head.weight._version != self._weight_version:
                raise RuntimeError(
                    "these logits were never computed and the output head has changed since (optimizer.step()?): "
                    "read out.logits before the step, or load the model with backend=BackendConfig(loss='transformers')"
                )
            with torch._C.DisableTorchFunctionSubclass():
                logits = F.linear(self.hidden, self.head.weight, self.head.bias)
                self._tensor = self.transform.apply(logits.to(self.dtype))
        return self._tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        if (
            not kwargs
            and args
            and isinstance(args[0], DeferredLogits)
            and (later := _defer_op(func, *args)) is not None
        ):
            return later
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)


_METADATA = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
}


def _defer_op(func: Any, logits: DeferredLogits, argument: Any = None, *more: Any) -> DeferredLogits | None:
    """`func(logits, argument)` as deferred logits again, or None where it has to be computed."""
    name, transform, dtype = getattr(func, "__name__", ""), logits.transform, logits.dtype
    scalar = isinstance(argument, int | float) and not more
    if name == "float" and argument is None:
        dtype = torch.float32
    elif name == "tanh" and argument is None and not transform.tanh:
        transform = transform._replace(tanh=True)
    elif (name in ("mul", "__mul__", "__rmul__") and scalar) or (
        name in ("div", "__truediv__") and scalar and argument
    ):
        factor = argument if "mul" in name else 1 / argument
        field = "outer" if transform.tanh else "inner"
        transform = transform._replace(**{field: getattr(transform, field) * factor})
    elif name == "__getitem__" and isinstance(argument, tuple) and len(argument) == 2 and argument[0] is Ellipsis:
        columns = argument[1]
        if not isinstance(columns, slice) or columns.start is not None or columns.step is not None or columns.stop <= 0:
            return None
        transform = transform._replace(vocabulary=min(columns.stop, transform.vocabulary))
    else:
        return None
    return DeferredLogits(logits.hidden, logits.head, transform, dtype)


def linear_cross_entropy(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    transform: Transform | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Sum of `cross_entropy(transform(hidden @ weight^T + bias), labels)` over the tokens not ignored, in fp32.

    The softmax runs in fp32, the GEMMs in the inputs' dtype (autocast honoured), the weight gradient is accumulated
    in fp32. Oracle: `linear_cross_entropy_reference`.
    """
    dtype = compute_dtype(hidden_TH)
    if hidden_TH.device.type == "cpu":
        # Only where looking at the labels does not stall a device: leave out the rows that carry no loss.
        kept = (labels_T != ignore_index).nonzero().squeeze(1)
        hidden_TH, labels_T = hidden_TH[kept], labels_T[kept]
    return _LinearCrossEntropy.apply(
        hidden_TH.to(dtype),
        weight_VH.to(dtype),
        None if bias_V is None else bias_V.to(dtype),
        labels_T,
        transform or Transform(weight_VH.shape[0]),
        ignore_index,
        torch.is_grad_enabled(),
    )


def linear_cross_entropy_reference(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    transform: Transform | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """What `linear_cross_entropy` computes, with the logits whole."""
    transform = transform or Transform(weight_VH.shape[0])
    logits_TV = transform.apply(F.linear(hidden_TH, weight_VH, bias_V).float())
    return F.cross_entropy(logits_TV, labels_T, ignore_index=ignore_index, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_T: torch.Tensor,
        transform: Transform,
        ignore_index: int,
        grad_enabled: bool,
    ) -> torch.Tensor:
        need_hidden, need_weight, need_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
        grad_hidden = torch.empty_like(hidden_TH) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and need_bias else None
        with torch.autocast(hidden_TH.device.type, enabled=False):
            for start in range(0, hidden_TH.shape[0], CHUNK_TOKENS):
                rows = slice(start, start + CHUNK_TOKENS)
                hidden_CH = hidden_TH[rows]
                grad_CV = F.linear(hidden_CH, weight_VH, bias_V)  # the logits, until the next line
                loss += cross_entropy_(grad_CV, labels_T[rows], transform, ignore_index).sum()
                if grad_hidden is not None:
                    torch.mm(grad_CV, weight_VH, out=grad_hidden[rows])
                if grad_weight is not None:
                    _add_mm(grad_weight, grad_CV.t(), hidden_CH)
                if grad_bias is not None:
                    grad_bias += grad_CV.sum(0, dtype=torch.float32)
        # Stored in the parameters' own dtype: the fp32 accumulators would stay until backward.
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VH.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def _add_mm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b`; in one GEMM where `total` is fp32 and the factors are not."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def deferred_causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`ForCausalLMLoss` of Transformers, same arguments and value, without its logits where they are deferred.

    Args:
        logits: `[B, S, V]`, deferred or not.
        labels: `[B, S]`, shifted here unless `shift_labels` `[B, S]` is given.
        num_items_in_batch: an int or scalar tensor; what to divide the sum by, instead of the number of labels
            (gradient accumulation).
    """
    if not isinstance(logits, DeferredLogits):
        return hf.causal_lm_loss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    labels_T = shift_labels.reshape(-1).to(logits.device)
    hidden_TH = logits.hidden.reshape(-1, logits.hidden.shape[-1])
    head = logits.head
    total = linear_cross_entropy(hidden_TH, head.weight, labels_T, head.bias, logits.transform, ignore_index)
    if num_items_in_batch is None:
        return total / (labels_T != ignore_index).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def why_not_deferred(model: PreTrainedModel) -> str | None:
    """The reason why `defer_logits` does not apply to `model`, or None if it does."""
    head = model.get_output_embeddings()
    if head is None:
        return "the model has no output head"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"the output head is a {type(head).__name__}, not a plain linear layer"
    if model.loss_function is not deferred_causal_lm_loss and not hf.uses_causal_lm_loss(model):
        return "the model has a loss of its own"
    if any(vars(m).get("forward", m.forward) != MethodType(type(m).forward, m) for m in (model, head)):
        return "something has wrapped its forward already (a device_map over several devices, Accelerate's prepare)"
    return None


def defer_logits(model: PreTrainedModel) -> None:
    """Give `model` the fused loss: with labels its head defers the logits, without labels nothing changes."""
    head = model.get_output_embeddings()
    # Bound methods, because copy.deepcopy binds them anew to the copy, where a closure would keep the original's
    # weights; both named "forward", because pickle stores them by name and so restores the class's own.
    head.forward = MethodType(_head, head)
    model.forward = MethodType(_with_signature_of(type(model).forward), model)
    model.loss_function = deferred_causal_lm_loss


def _head(self: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    if _deferring.get():
        return DeferredLogits(hidden, self)
    return F.linear(hidden, self.weight, self.bias)


_head.__name__ = "forward"


@functools.cache
def _with_signature_of(original: Any) -> Any:
    """`original`, deferring the logits where labels are given; Trainer and generate read its signature."""
    position = list(inspect.signature(original).parameters).index("labels")

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        labels = args[position - 1] if len(args) >= position else kwargs.get("labels")
        if labels is None or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        with _defer():
            return original(self, *args, **kwargs)

    return forward


@contextmanager
def _defer() -> Iterator[None]:
    token = _deferring.set(True)
    try:
        yield
    finally:
        _deferring.reset(token)
