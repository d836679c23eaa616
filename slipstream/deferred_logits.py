"""Logits that are not computed unless somebody looks at them.

Dims: B batch, S sequence, T = B * S tokens, H hidden, V vocabulary.
"""

import functools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from slipstream.kernels.cross_entropy import Transform
from slipstream.linear_cross_entropy import linear_cross_entropy, one_over
from slipstream.numerics import compute_dtype

_deferring: ContextVar[bool] = ContextVar("slipstream_deferring_logits", default=False)


@contextmanager
def deferring() -> Iterator[None]:
    """While in here, heads that `loss.defer_logits` changed return `DeferredLogits`."""
    token = _deferring.set(True)
    try:
        yield
    finally:
        _deferring.reset(token)


def is_deferring() -> bool:
    return _deferring.get()


class DeferredLogits(torch.Tensor):
    """The logits `head(hidden)`, `[B, S, V]`, not computed yet.

    `.float()`, a scalar `*` or `/`, `tanh`, other shapes and slices of the rows, the vocabulary's first columns and
    hooks on the gradient are remembered, and a cross-entropy within the model's forward is computed without them. Any
    other use computes the tensor once and goes on with it, as the forward would have: with a graph if that had one.
    """

    hidden: torch.Tensor
    head: nn.Linear
    transform: Transform
    _weight: tuple[int, ...]
    _has_graph: bool
    _hooks: OrderedDict[int, Any]
    _made_of: tuple[Any, ...] | None
    _is_part: bool  # a view of what it was made of
    _tensor: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        hidden: torch.Tensor,
        head: nn.Linear,
        transform: Transform | None = None,
        dtype: torch.dtype | None = None,
        strides: tuple[int, ...] | None = None,
    ) -> "DeferredLogits":
        transform = transform or Transform(head.weight.shape[0])
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            (*hidden.shape[:-1], transform.vocabulary),
            strides=strides,
            dtype=dtype or compute_dtype(hidden),
            device=hidden.device,
        )
        self.hidden, self.head, self.transform = hidden, head, transform
        self._weight = _state_of(head.weight)
        self._has_graph = torch.is_grad_enabled()
        self._hooks = OrderedDict()
        self._made_of = None
        self._is_part = False
        self._tensor = None
        return self

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
        changed_since = tensor._version > 0 and not self._is_part
        return None if changed_since else function(tensor, *arguments)

    def _is_known(self) -> bool:
        """Whether somebody has these logits, or those that they were made of, as a tensor or waits for a gradient."""
        before = self._made_of[1] if self._made_of is not None else None
        return self._tensor is not None or bool(self._hooks) or (before is not None and before._is_known())

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
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func == _REQUIRES_GRAD:
            return args[0]._follows()
        if func == torch.Tensor.register_hook and args[0]._tensor is None:
            return args[0]._remember(*args[1:], **kwargs)
        if args and isinstance(args[0], DeferredLogits):
            if func is F.cross_entropy and is_deferring():
                later = _cross_entropy(*args, **kwargs)
            else:
                later = None if kwargs else _made_later(func, *args)
            if later is not None:
                return later
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialize, (args, kwargs))
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
    torch.Tensor.stride,
    torch.Tensor.is_contiguous,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
}
_RESHAPING = ("view", "reshape", "flatten", "contiguous")


def _state_of(weight: torch.Tensor) -> tuple[int, ...]:
    """Another when the weight is, changed in place or by another tensor or shard of one in its place."""
    return id(weight), weight._version, weight.data_ptr() if type(weight) is torch.nn.Parameter else 0


def _call_hooks(hooks: OrderedDict[int, Any], grad: torch.Tensor) -> torch.Tensor:
    for hook in list(hooks.values()):
        changed = hook(grad)
        grad = grad if changed is None else changed
    return grad


def _made_later(func: Any, logits: DeferredLogits, *arguments: Any) -> DeferredLogits | None:
    """`func(logits, *arguments)` as deferred logits again, or None where it has to be computed."""
    if logits._tensor is not None:  # which may have been changed in place
        return None
    name = getattr(func, "__name__", "")
    rows: tuple[Any, ...] = ()
    transform: Transform | None = logits.transform
    if name == "__getitem__":
        index = _rows_and_columns(arguments[0], logits.ndim)
        if index is None:
            return None
        rows, columns = index
        transform = logits.transform._replace(vocabulary=len(range(logits.shape[-1])[columns]))
    elif name not in _RESHAPING:
        transform = _transformed(name, logits.transform, arguments)
    if transform is None:
        return None
    whole = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="meta")
    part = func(whole, *arguments)
    if part is whole:  # `contiguous` of what is
        return logits
    if part.shape[-1:] != (transform.vocabulary,) or (part.dtype != logits.dtype and name != "float"):
        return None
    with torch.set_grad_enabled(logits._has_graph and torch.is_grad_enabled()):
        hidden = logits.hidden[rows] if rows else logits.hidden.reshape(*part.shape[:-1], logits.hidden.shape[-1])
        later = DeferredLogits(hidden, logits.head, transform, part.dtype, part.stride())
    later._weight, later._made_of = logits._weight, (func, logits, *arguments)
    later._is_part = part.untyped_storage()._cdata == whole.untyped_storage()._cdata
    return later


def _transformed(name: str, transform: Transform, arguments: tuple[Any, ...]) -> Transform | None:
    """What `logits.name(*arguments)` makes of the transform."""
    argument = arguments[0] if len(arguments) == 1 else None
    if name == "float" and not arguments:
        return transform
    if name == "tanh" and not arguments:
        return None if transform.tanh else transform._replace(tanh=True)
    if not isinstance(argument, int | float):
        return None
    if name in ("mul", "__mul__", "__rmul__"):
        factor = argument
    elif name in ("div", "__truediv__") and argument:
        factor = 1 / argument
    else:
        return None
    field = "outer" if transform.tanh else "inner"
    return transform._replace(**{field: getattr(transform, field) * factor})


def _rows_and_columns(index: Any, dimensions: int) -> tuple[tuple[Any, ...], slice] | None:
    """Of an index into logits: the one into hidden states, and the columns, where those are the first ones."""
    index = tuple(index) if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or type(part) is int or _is_plain_slice(part) for part in index):
        return None
    places = [place for place, part in enumerate(index) if part is Ellipsis]
    missing = dimensions - len(index) + len(places)
    if missing < 0 or len(places) > 1:
        return None
    place = places[0] if places else len(index)
    *rows, columns = index[:place] + (slice(None),) * missing + index[place + 1 :]
    if not isinstance(columns, slice) or columns.start is not None or columns.step is not None:
        return None
    if columns.stop is not None and columns.stop <= 0:
        return None
    return (*rows, slice(None)), columns


def _is_plain_slice(part: Any) -> bool:
    return isinstance(part, slice) and all(type(x) in (int, type(None)) for x in (part.start, part.stop, part.step))


def _cross_entropy(
    logits: DeferredLogits,
    labels_T: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """`F.cross_entropy`, which some architectures call themselves, or None where it is not `linear_cross_entropy`."""
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    if not plain or reduction not in ("mean", "sum") or logits.ndim != 2 or logits._is_known():
        return None
    if labels_T.dtype != torch.int64 or labels_T.shape != logits.shape[:1] or labels_T.device != logits.device:
        return None
    scale = one_over(None, labels_T, ignore_index) if reduction == "mean" else None
    head, autocast = logits.head, torch.is_autocast_enabled(logits.device.type)
    with torch.set_grad_enabled(logits._has_graph and torch.is_grad_enabled()):
        loss = linear_cross_entropy(
            logits.hidden, head.weight, labels_T, head.bias, logits.transform, ignore_index, scale
        )
        return loss if autocast else loss.to(logits.dtype)
