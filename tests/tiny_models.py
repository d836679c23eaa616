"""Tiny random models of any architecture, as `slipstream coverage` makes them."""

from slipstream.coverage.architectures import moe_architectures
from slipstream.coverage.tiny import SMALL, VOCAB_SIZE, tiny_batch, tiny_config, tiny_model

__all__ = ["SMALL", "VOCAB_SIZE", "moe_architectures", "tiny_batch", "tiny_config", "tiny_model"]
