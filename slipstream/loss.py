"""Deferred logits: how a model comes to `linear_cross_entropy` without its cooperation.

While a model runs with labels, its output head returns `DeferredLogits`, which remember the hidden states and the
head. The loss consumes them chunk by chunk. Whoever touches `out.logits` gets the ordinary tensor, made on demand.

Dims: B batch, S sequence, T = B * S tokens, H hidden, V vocabulary.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from slipstream import hf
from slipstream.kernels.cross_entropy import Transform
from slipstream.linear_cross_entropy import linear_cross_entropy, z_loss_sum
from slipstream.numerics import compute_dtype

_deferring: ContextVar[bool] = ContextVar("slipstream_deferring_logits", default=False)


class DeferredLogits(torch.Tensor):
    """The logits `head(hidden)`, `[B, S, V]`, not computed yet.

    `.float()`, a scalar `*` or `/`, `tanh`, a slice of the vocabulary and hooks on the gradient are remembered; any
    other use computes the tensor once and goes on with it, as the forward would have: with a graph if that had one.
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
        self._weight = _state_of(head.weight)
        self._has_graph = torch.is_grad_enabled()
        self._hooks: OrderedDict[int, Any] = OrderedDict()
        self._made_of: tuple[Any, ...] | None = None
        self._tensor: torch.Tensor | None = None

    def materialize(self) -> torch.Tensor:
        """The logits as an ordinary tensor that autograd follows.

        Raises:
            RuntimeError: the head's weights have changed since the forward pass, or FSDP2 has put them away.
        """
        if self._tensor is None:
            if _state_of(self.head.weight) != self._weight:
                raise RuntimeError(
                    "these logits were never computed, and the output head has changed since (in optimizer.step(), or, "
                    "over several ranks, been put away in backward()): read out.logits before backward(), or load the "
                    "model with backend=BackendConfig(loss='transformers')"
                )
            with torch._C.DisableTorchFunctionSubclass(), torch.set_grad_enabled(self._has_graph):
                self._tensor = self._again()
                if self._tensor is None:
                    self._tensor = F.linear(self.hidden, self.head.weight, self.head.bias).to(self.dtype)
                    if self.transform != Transform(self._tensor.shape[-1]):  # else a view, which may lose its hooks
                        self._tensor = self.transform.apply(self._tensor)
            if self._hooks:
                # Not `self`, which holds the tensor: garbage collection sees no hooks on tensors.
                self._tensor.register_hook(functools.partial(_call_hooks, self._hooks))
        return self._tensor

    def _again(self) -> torch.Tensor | None:
        """Made of the logits that these were made of, as their hooks and slices want it; None if that is too late."""
        if self._made_of is None:
            return None
        (function, before, *arguments), self._made_of = self._made_of, None
        tensor = before.materialize()
        changed_since = tensor._version > 0 and function is not torch.Tensor.__getitem__
        return None if changed_since else function(tensor, *arguments)

    def _follows(self) -> bool:
        """Whether the tensor requires a gradient, or will."""
        if self._tensor is not None:
            return self._tensor.requires_grad
        return self._has_graph and (self.hidden.requires_grad or self.head.weight.requires_grad)

    def _remember(self, hook: Any) -> RemovableHandle:
        """FSDP2 puts a hook on all that a model returns: nobody may read these logits after all."""
        if not self._follows():
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        if func == _REQUIRES_GRAD:
            return args[0]._follows()
        if func == torch.Tensor.register_hook and args[0]._tensor is None:
            return args[0]._remember(*args[1:], **(kwargs or {}))
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


_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_METADATA = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    torch.Tensor._base.__get__,  # type: ignore[attr-defined, union-attr]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
}


def _state_of(weight: torch.Tensor) -> tuple[int, ...]:
    """Another when the weight is, changed in place or by another tensor or shard of one in its place."""
    return id(weight), weight._version, weight.data_ptr() if type(weight) is torch.nn.Parameter else 0


def _call_hooks(hooks: OrderedDict[int, Any], grad: torch.Tensor) -> torch.Tensor:
    for hook in list(hooks.values()):
        changed = hook(grad)
        grad = grad if changed is None else changed
    return grad


def _defer_op(func: Any, logits: DeferredLogits, argument: Any = None, *more: Any) -> DeferredLogits | None:
    """`func(logits, argument)` as deferred logits again, or None where it has to be computed."""
    if logits._tensor is not None:  # which may have been changed in place
        return None
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
        if not isinstance(columns, slice) or columns.start is not None or columns.step is not None:
            return None
        if not isinstance(columns.stop, int) or columns.stop <= 0:
            return None
        transform = transform._replace(vocabulary=min(columns.stop, transform.vocabulary))
    else:
        return None
    later = DeferredLogits(logits.hidden, logits.head, transform, dtype)
    later._weight, later._has_graph = logits._weight, logits._has_graph and later._has_graph
    later._made_of = (func, logits) if argument is None else (func, logits, argument)
    return later


def deferred_causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    z_loss: float = 0.0,
    **kwargs: Any,
) -> torch.Tensor:
    """`ForCausalLMLoss` of Transformers, same arguments and value, without its logits where they are deferred.

    Args:
        logits: `[B, S, V]`, deferred or not.
        labels: `[B, S]`, shifted here unless `shift_labels` `[B, S]` is given.
        num_items_in_batch: an int or scalar tensor; what to divide the sum by, instead of the number of labels
            (gradient accumulation).
        z_loss: coefficient of `logsumexp(logits)^2`, ours; `linear_cross_entropy` explains it.
    """
    if not isinstance(logits, DeferredLogits):
        loss = hf.causal_lm_loss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        if not z_loss:
            return loss
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    labels_T = shift_labels.reshape(-1).to(logits.device)
    scale = _one_over(num_items_in_batch, labels_T, ignore_index)
    if not isinstance(logits, DeferredLogits):
        return loss + z_loss_sum(logits.float().reshape(-1, vocab_size), labels_T, ignore_index, z_loss) * scale
    hidden_TH, head = logits.hidden.reshape(-1, logits.hidden.shape[-1]), logits.head
    return linear_cross_entropy(
        hidden_TH, head.weight, labels_T, head.bias, logits.transform, ignore_index, scale, z_loss
    )


def _one_over(num_items: Any, labels_T: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """One over `num_items`, or over the number of labels, on the labels' device; the host does not wait for it."""
    if num_items is None:
        num_items = (labels_T != ignore_index).sum()
    elif not isinstance(num_items, torch.Tensor) or num_items.device.type == "cpu":
        num_items = torch.full((), float(num_items), dtype=torch.float32, device=labels_T.device)
    return num_items.to(labels_T.device, torch.float32).reciprocal()


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
    _defer_head(model.get_output_embeddings())
    model.forward = MethodType(_with_signature_of(type(model).forward, _takes_cache(model)), model)
    model.loss_function = deferred_causal_lm_loss


def _defer_head(head: Any) -> None:
    # Bound methods, because copy.deepcopy binds them anew to the copy, where a closure would keep the original's
    # weights; both named "forward", because pickle stores them by name and so restores the class's own.
    plain = type(head).forward is nn.Linear.forward
    if plain and vars(head).get("forward", head.forward) == MethodType(nn.Linear.forward, head):
        head.forward = MethodType(_head, head)


def _takes_cache(model: PreTrainedModel) -> bool:
    """Whether `use_cache` may be given, by name or among the keyword arguments that go on to the decoder."""
    outer, inner = (inspect.signature(type(m).forward).parameters for m in (model, model.get_decoder()))
    passed_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in outer.values())
    return "use_cache" in outer or (passed_on and "use_cache" in inner)


def _head(self: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    if _deferring.get():
        return DeferredLogits(hidden, self)
    return F.linear(hidden, self.weight, self.bias)


_head.__name__ = "forward"


@functools.cache
def _with_signature_of(original: Any, takes_cache: bool) -> Any:
    """`original`, deferring the logits where labels are given; Trainer and generate read its signature.

    With labels no cache of keys and values is made, unless it is asked for: nothing generates from a training step.
    """
    names = list(inspect.signature(original).parameters)
    position = names.index("labels")
    cache_position = names.index("use_cache") if "use_cache" in names else len(names)

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        labels = args[position - 1] if len(args) >= position else kwargs.get("labels")
        if labels is None or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        if len(args) < cache_position and takes_cache:
            kwargs.setdefault("use_cache", False)
        _defer_head(self.get_output_embeddings())  # resize_token_embeddings makes another
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
