"""Optimizers that run at memory speed and train 16-bit weights without losing small updates."""

from slipstream.optim.adamw import AdamW

__all__ = ["AdamW"]
