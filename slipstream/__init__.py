"""Slipstream: fine-tune Mixture-of-Experts Transformers models several times faster by changing one import.

The public names are resolved on first use, so that `import slipstream` costs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slipstream.acceleration import accelerate
    from slipstream.auto import AutoModelForCausalLM
    from slipstream.backend import BackendConfig
    from slipstream.cuda_graphs import GraphedStep
    from slipstream.description import describe
    from slipstream.mtp import train_mtp
    from slipstream.parallel.clip import clip_grad_norm_
    from slipstream.parallel.setup import DistributedSetup, create_distributed_setup_from_config

__version__ = "0.1.0.dev0"

_HOME = {
    "AutoModelForCausalLM": "slipstream.auto",
    "BackendConfig": "slipstream.backend",
    "DistributedSetup": "slipstream.parallel.setup",
    "GraphedStep": "slipstream.cuda_graphs",
    "accelerate": "slipstream.acceleration",
    "clip_grad_norm_": "slipstream.parallel.clip",
    "create_distributed_setup_from_config": "slipstream.parallel.setup",
    "describe": "slipstream.description",
    "train_mtp": "slipstream.mtp",
}

__all__ = [
    "AutoModelForCausalLM",
    "BackendConfig",
    "DistributedSetup",
    "GraphedStep",
    "accelerate",
    "clip_grad_norm_",
    "create_distributed_setup_from_config",
    "describe",
    "train_mtp",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slipstream' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
