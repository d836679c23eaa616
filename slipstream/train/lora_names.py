"""Names in a recipe's `lora` that nothing in the model has: PEFT lets them pass where another one fits, slips too."""

import copy
import difflib
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from slipstream.planning.flops import meta_model
from slipstream.train.recipe import ALL_EXPERTS

ALL_LINEAR = "all-linear"  # PEFT's
# Recipes name these for any model, and PEFT trains those that there are.
USUAL = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
_MISSPELT = 0.85  # difflib's ratio, from which on a name is taken for a slip of the pen


def check_names(lora: LoraConfig, config: PreTrainedConfig) -> str | None:
    """Look for every name of `lora` in the model of `config`, which is built without weights.

    "all-experts" is not looked for.

    Returns: which of several `target_modules` nothing has, where that is no mistake.
    Raises: ValueError for a name that nothing has, with the nearest that something has.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None  # it comes with code of its own, for which PEFT's own checks have to do
    model = meta_model(config)
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()] + [ALL_EXPERTS]
    made = copy.deepcopy(lora)
    # Names that experts had before Transformers fused them become those of today.
    convert_peft_config_for_transformers(made, model, None)
    kind = type(model).__name__
    for setting, names, known, matches in (
        ("target_parameters", _left(lora.target_parameters, made.target_parameters), parameters, _is_end),
        ("modules_to_save", lora.modules_to_save or [], modules, str.endswith),
    ):
        for name, near in _unknown(names, known, matches):
            raise ValueError(f"lora.{setting}: {_said(kind, setting, name, near)}")
    if isinstance(lora.target_modules, str):
        pattern = lora.target_modules
        if pattern.lower() != ALL_LINEAR and not any(re.fullmatch(pattern, name) for name in modules):
            raise ValueError(f"lora.target_modules: {pattern!r}, a regular expression, matches no module of {kind}")
        return None
    unknown = _unknown(_left(lora.target_modules, made.target_modules), modules, _is_end)
    trains_others = len(unknown) < len(lora.target_modules or []) or lora.target_parameters
    for name, near in unknown:
        if not trains_others or not (name in USUAL or difflib.SequenceMatcher(None, name, near).ratio() < _MISSPELT):
            raise ValueError(f"lora.target_modules: {_said(kind, 'target_modules', name, near)}")
    absent = ", ".join(name for name, _ in unknown)
    return f"lora.target_modules: {kind} has no {absent}; the others get adapters" if unknown else None


def _left(given: Collection[str] | None, made: Collection[str] | None) -> list[str]:
    """Those of the user's names that the conversion has neither put others in place of nor added."""
    return sorted(set(given or ()) & set(made or ()))


def _is_end(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _unknown(names: Iterable[str], known: list[str], matches: Callable[[str, str], Any]) -> list[tuple[str, str]]:
    """The names that nothing has, each with the nearest that something has, or ""."""
    found = []
    for name in names:
        if not any(matches(each, name) for each in known):
            parts = name.count(".") + 1
            ends = sorted({".".join(each.split(".")[-parts:]) for each in known})
            found.append((name, next(iter(difflib.get_close_matches(name, ends, n=1)), "")))
    return found


def _said(kind: str, setting: str, name: str, near: str) -> str:
    what = "parameter" if setting.endswith("parameters") else "module"
    return f"no {what} of {kind} has a name that ends with {name!r}" + (f"; did you mean {near!r}?" if near else "")
