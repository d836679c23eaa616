"""Names in a recipe's `lora` that nothing in the model has: PEFT lets them pass where another one fits."""

import copy
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from slipstream.planning.flops import meta_model
from slipstream.train.recipe import ALL_EXPERTS

ALL_LINEAR = "all-linear"  # PEFT's


def check_names(lora: LoraConfig, config: PreTrainedConfig) -> None:
    """Look for every name of `lora` in the model of `config`, which is built without weights.

    "all-experts" is not looked for.

    Raises: ValueError for one that nothing has, with the nearest that something has.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return  # it comes with code of its own, for which PEFT's own checks have to do
    model = meta_model(config)
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()] + [ALL_EXPERTS]
    given = copy.deepcopy(lora)
    # Names that experts had before Transformers fused them become those of today.
    convert_peft_config_for_transformers(given, model, None)
    kind = type(model).__name__
    targets = given.target_modules or []
    if isinstance(targets, str):
        if targets != ALL_LINEAR and not any(re.fullmatch(targets, name) for name in modules):
            raise ValueError(f"lora.target_modules: {targets!r}, a regular expression, matches no module of {kind}")
        targets = []
    for setting, names, known, matches in (
        ("target_modules", targets, modules, _is_end),
        ("target_parameters", given.target_parameters or [], parameters, _is_end),
        ("modules_to_save", given.modules_to_save or [], modules, str.endswith),
    ):
        _check(f"lora.{setting}", names, known, matches, kind)


def _is_end(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check(
    setting: str, targets: Iterable[str], known: list[str], matches: Callable[[str, str], Any], kind: str
) -> None:
    for target in sorted(targets):
        if any(matches(name, target) for name in known):
            continue
        parts = target.count(".") + 1
        ends = sorted({".".join(name.split(".")[-parts:]) for name in known})
        near = difflib.get_close_matches(target, ends, n=1)
        what = "parameter" if setting.endswith("parameters") else "module"
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{setting}: no {what} of {kind} has a name that ends with {target!r}{hint}")
