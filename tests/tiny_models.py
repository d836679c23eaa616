"""Tiny random models of any architecture, as `slipstream coverage` makes them."""

from collections.abc import Iterable
from typing import Any

import torch

from slipstream.coverage.architectures import moe_architectures
from slipstream.coverage.tiny import SMALL, VOCAB_SIZE, tiny_batch, tiny_config, tiny_model

__all__ = ["SMALL", "VOCAB_SIZE", "moe_architectures", "sgd_losses", "tiny_batch", "tiny_config", "tiny_model"]


def sgd_losses(model: Any, batches: Iterable[torch.Tensor], lr: float = 0.5) -> list[float]:
    """The loss of each batch of ids, with a step of SGD behind it; a large one unless told."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
