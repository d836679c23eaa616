"""The rest of `hf.py`: touches of private parts of layers that mix tokens by something else than plain attention.

Checked against Transformers 5.23.0, each with a test in tests/test_hf_recurrent.py.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from slipstream.hf_models import causal_lm_class, modelling_file, replaced, unreplaced
from slipstream.parallel.units import class_of

MAMBA_SCAN = "mamba2_chunk_scan"  # in the modelling files with Mamba2 layers
SELECTIVE_SCAN = "mamba_selective_scan"  # in those with Mamba1 layers, which tell it nothing of documents
LIGHTNING = "MiniMaxLightningAttention"  # see `recurrent.lightning`
RG_LRU, RWKV = "RecurrentGemmaRglru", "RwkvSelfAttention"  # see `recurrent.linear_recurrence`
JETMOE_EXPERTS, JETMOE_ROUTER = "JetMoeParallelExperts", "JetMoeTopKGating"  # see `moe.grouped_projections`
# Kinds of layers that mix tokens by plain attention, and those that mix none.
_PLAIN = {
    "full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid_attention",
    "moe", "mlp", "dense", "sparse",
}  # fmt: skip
# The functions of a modelling file that its recurrent layers call, each a kernel's where a package has it: the scans,
# and what comes before or beside them.
SCANS = (MAMBA_SCAN, "torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")
CONVOLUTION = "causal_conv1d_fn"
_BESIDE = (CONVOLUTION, "mamba2_split_conv1d_scan_combined")
# They split by sizes on the host, which are others in every step.
_LOOPING_MODULES = ("JetMoeAttention", "JetMoeMoE")


@contextmanager
def scanning_by(model: Any, scans: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Let the layers of `model` call these `scans`, by the names of those that they stand for, and leave all other
    optional packages (mamba_ssm, causal_conv1d, fla) aside for Transformers' own PyTorch: their kernels take no fake
    tensors.

    Mamba2's is called as `mamba_chunk_scan_combined(x [B, S, H, D], dt, A, B, C, …)`, Mamba1's as
    `selective_scan_fn(x [B, D, S], dt, A, B, C, …)`.
    """
    module = modelling_file(model)
    # What `use_kernel_func_from_hub_with_fallback` made: the reference is inside.
    before = {name: value for name, value in module.items() if "torch_function" in _inside(unreplaced(value))}
    for name, value in before.items():
        module[name] = scans.get(name, unreplaced(value).__wrapped__)
    try:
        yield
    finally:
        module.update(before)


def _inside(function: Any) -> tuple[str, ...]:
    """The names that a function closes over."""
    return getattr(getattr(function, "__code__", None), "co_freevars", ())


def runs_package(function: Any) -> bool:
    """Whether one of those functions runs an optional package's kernel instead of Transformers' PyTorch."""
    return bool(inspect.getclosurevars(unreplaced(function)).nonlocals.get("is_new_implementation"))


def recurrent_functions(model: Any) -> dict[str, Any]:
    """Those functions of the modelling file of `model`, by name."""
    module = modelling_file(model)
    return {name: unreplaced(module[name]) for name in (*SCANS, SELECTIVE_SCAN, *_BESIDE) if name in module}


def looping_modules(model: nn.Module) -> list[nn.Module]:
    """The modules in `model` whose forward has a loop in Python in it, still."""
    named = [module for module in model.modules() if class_of(module).__name__ in _LOOPING_MODULES]
    return [module for module in named if not any(map(_is_grouped, module.modules()))]


def _is_grouped(module: nn.Module) -> bool:
    return class_of(module).__name__ == JETMOE_ROUTER and "forward" in vars(module)


def modules_named(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules in `model` whose class Transformers names so, such as `LIGHTNING`."""
    return [module for module in model.modules() if class_of(module).__name__ == name]


def replace_recurrent(model: Any, replacements: dict[str, Callable[..., Any]]) -> None:
    """Let the modelling file of `model` call `replacement(original, *args, **kwargs)` in the place of each."""
    module = modelling_file(model)
    for name, replacement in replacements.items():
        module[name] = replaced(unreplaced(module[name]), replacement)


def beside_attention(config: PretrainedConfig) -> list[str]:
    """The kinds of layers, by the config's names, that mix tokens by something else than plain causal attention."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    return sorted(set(kinds) - _PLAIN)


def calls_any(config: PretrainedConfig, functions: Iterable[str]) -> bool:
    """Whether the architecture's modelling file has one of those functions, which `recurrent_functions` knows, or
    lightning attention."""
    model_class = causal_lm_class(config)
    return model_class is not None and any(name in vars(sys.modules[model_class.__module__]) for name in functions)


def set_time_step_limit(module: Any) -> None:
    """Let a Mamba2 layer clamp its steps as its config says: Nemotron-H's in 5.23 clamps them to `time_step_min`
    (transformers#48989)."""
    limit = getattr(getattr(module, "config", None), "time_step_limit", None)
    if hasattr(module, "time_step_limit") and limit is not None:
        module.time_step_limit = tuple(map(float, limit))


def ask_for_scan(module: Any, name: str) -> None:
    """Let a Mamba1 layer hand `name` to its selective scan, as `use_associative_scan`: it hands on nothing else that
    says whose layer it is."""
    if hasattr(module, "use_associative_scan"):
        module.use_associative_scan = name
