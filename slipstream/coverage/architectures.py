"""Which causal-LM architectures the installed Transformers has."""

import functools
import inspect
import sys

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slipstream.coverage.tiny import OVERRIDES

# Experts that Transformers does not call through its interface.
OWN_EXPERTS = ("llama4_text", "dbrx", "longcat_flash", "jetmoe", "doge")


def architectures() -> list[str]:
    """Every causal-LM model type, those with experts first."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, key=lambda name: (not has_experts(name), name))


def has_experts(model_type: str) -> bool:
    """Whether its layers have routed experts."""
    return model_type in OWN_EXPERTS or model_type in moe_architectures()


def is_composite(model_type: str) -> bool:
    """Whether it holds more than a language model (vision, sound); its text model is a model type of its own."""
    return bool(CONFIG_MAPPING[model_type].sub_configs) and model_type not in OVERRIDES


@functools.cache
def moe_architectures() -> list[str]:
    """The causal-LM model types whose modelling code calls its experts through the interface, from Transformers' own
    mapping; composites (vision and text) are left to their text model."""
    found = []
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        class_name = names if isinstance(names, str) else names[0]
        model_class = getattr(transformers, class_name)
        source = inspect.getsource(sys.modules[model_class.__module__])
        if "@use_experts_implementation" in source and model_type in CONFIG_MAPPING and not is_composite(model_type):
            found.append(model_type)
    return found
