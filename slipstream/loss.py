"""Deferred logits: how a model comes to `linear_cross_entropy` without its cooperation.

While a model runs with labels, its output head returns `DeferredLogits`, which remember the hidden states and the
head. The loss consumes them chunk by chunk. Whoever touches `out.logits` gets the ordinary tensor, made on demand.

Dims: B batch, S sequence, T = B * S tokens, V vocabulary.
"""

import functools
import inspect
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from slipstream import hf
from slipstream.deferred_logits import DeferredLogits, deferring, is_deferring
from slipstream.linear_cross_entropy import linear_cross_entropy, one_over, z_loss_sum


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
    scale = one_over(num_items_in_batch, labels_T, ignore_index)
    if not isinstance(logits, DeferredLogits):
        return loss + z_loss_sum(logits.float().reshape(-1, vocab_size), labels_T, ignore_index, z_loss) * scale
    hidden_TH, head = logits.hidden.reshape(-1, logits.hidden.shape[-1]), logits.head
    return linear_cross_entropy(
        hidden_TH, head.weight, labels_T, head.bias, logits.transform, ignore_index, scale, z_loss
    )


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
    if is_deferring():
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
        with deferring():
            return original(self, *args, **kwargs)

    return forward
