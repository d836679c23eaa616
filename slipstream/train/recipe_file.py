"""Read a recipe from YAML, with command-line overrides, and report every mistake with its place in the file."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from slipstream.train.recipe import Recipe

# What Axolotl, LLaMA-Factory, torchtune and NeMo AutoModel call our keys; read at the top level or in any section.
ALIASES = {
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "pretrained_model_name_or_path": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "val_set_size": "data.eval_fraction",
    "val_size": "data.eval_fraction",
    "micro_batch_size": "train.per_device_train_batch_size",
    "local_batch_size": "train.per_device_train_batch_size",
    "num_epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "gradient_checkpointing": "train.activation_checkpointing",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target_modules": "lora.target_modules",
    "lora_target": "lora.target_modules",
}
COMMAND_LINE = "command line"
KeyPath = tuple[str | int, ...]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Read, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings; the value is read as YAML. They win over the file.

    Returns: the recipe, and one note for each key that was given under another tool's name.
    Raises: ValueError with one line for each mistake, `file:line: section.key: what is wrong`; OSError when the file
        cannot be read.
    """
    values, places, mistakes = _read_yaml(Path(path))
    notes: list[str] = []
    _rename_aliases(values, places, notes, mistakes)
    for override in overrides:
        try:
            _apply_override(override, values, places, notes)
        except ValueError as error:
            mistakes.append(f"{COMMAND_LINE}: {error}")
    for name in list(values):
        # `train:` with nothing below it is an empty section, not a null.
        if values[name] is None and name in Recipe.model_fields:
            values[name] = {}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        mistakes += [_explain(dict(e), places, str(path)) for e in error.errors(include_url=False)]
    if mistakes:
        raise ValueError("\n".join(dict.fromkeys(mistakes)))
    return recipe, notes


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; reading it back gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str], list[str]]:
    """The file's values, for each key path its place as `file:line`, and a line for each key given twice."""
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe file")
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        places: dict[KeyPath, str] = {}
        repeated = []
        for key_path, line, again in _walk(node):
            place = f"{path}:{line}"
            if again:
                first = places[key_path].rpartition(":")[2]
                repeated.append(f"{place}: {_dotted(key_path)}: given twice, first in line {first}; keep one")
            places.setdefault(key_path, place)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{mark}: not valid YAML: {error.problem}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping with the sections {', '.join(Recipe.model_fields)}")
    return values, places, repeated


def _walk(node: yaml.Node | None, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, int, bool]]:
    """(key path, line, whether the key repeats an earlier one) for everything below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            key_path = (*prefix, key.value)
            yield key_path, key.start_mark.line + 1, key.value in seen
            seen.add(key.value)
            yield from _walk(value, key_path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1, False
            yield from _walk(value, (*prefix, index))


def _apply_override(override: str, values: dict[str, Any], places: dict[KeyPath, str], notes: list[str]) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if len(keys) <= 2 and keys[-1] in ALIASES:
        notes.append(f"{COMMAND_LINE}: {name} is read as {ALIASES[keys[-1]]}")
        keys = ALIASES[keys[-1]].split(".")
    if not equals or not all(keys):
        raise ValueError(f"{override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {text!r} is not a valid YAML value") from error
    here = values
    for depth, key in enumerate(keys[:-1], start=1):
        if here.get(key) is None:
            here[key] = {}
            places[tuple(keys[:depth])] = COMMAND_LINE
        here = here[key]
        if not isinstance(here, dict):
            raise ValueError(f"{name}: {key!r} is a value in the recipe, not a section")
    here[keys[-1]] = value
    places[tuple(keys)] = COMMAND_LINE


def _rename_aliases(values: dict[str, Any], places: dict[KeyPath, str], notes: list[str], mistakes: list[str]) -> None:
    """Move every key that another tool names differently to where our schema has it."""
    homes = [(), *((name,) for name, section in values.items() if isinstance(section, dict))]
    for home in homes:
        source = values[home[0]] if home else values
        for alias in [key for key in source if key in ALIASES]:
            section, key = ALIASES[alias].split(".")
            place = places[*home, alias]
            target = values.get(section)
            if target is None:
                target = values[section] = {}
            value = source.pop(alias)
            if not isinstance(target, dict) or key in target:
                mistakes.append(f"{place}: {alias}: {section}.{key} is given as well; keep one")
                continue
            target[key] = value
            places[section, key] = place
            notes.append(f"{place}: {'.'.join((*home, alias))} is read as {section}.{key}")


def _explain(error: dict[str, Any], places: dict[KeyPath, str], file: str) -> str:
    """One line for one of pydantic's errors."""
    # Below section.key pydantic names the branches of a union, which are no keys of the file; an index is.
    location = tuple(part for depth, part in enumerate(error["loc"]) if depth < 2 or isinstance(part, int))
    place = next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), file)
    if error["type"] == "extra_forbidden":
        return f"{place}: {_dotted(location)}: unknown key; {_nearest(location)}"
    if error["type"] == "missing":
        field = _fields(location[:-1])[str(location[-1])]
        return f"{place}: {_dotted(location)}: missing; {field.description or 'it has no default'}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]} (given {error['input']!r})"
    return f"{place}: {_dotted(location)}: {message}"


def _nearest(location: KeyPath) -> str:
    """What the writer of an unknown key may have meant: a key of its section, of another one, or the list."""
    key, siblings = str(location[-1]), list(_fields(location[:-1]))
    elsewhere = {name: f"{section}.{name}" for section in Recipe.model_fields for name in _fields((section,))}
    if key in elsewhere:
        return f"did you mean {elsewhere[key]!r}?"
    for candidates in ({name: name for name in siblings}, elsewhere):
        match = difflib.get_close_matches(key, candidates, n=1)
        if match:
            return f"did you mean {candidates[match[0]]!r}?"
    return f"allowed here: {', '.join(siblings)}"


def _fields(section: KeyPath) -> dict[str, Any]:
    """The pydantic fields of a section; none for a free-form one."""
    if not section:
        return dict(Recipe.model_fields)
    annotation = Recipe.model_fields[str(section[0])].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return dict(candidate.model_fields)
    return {}


def _dotted(key_path: KeyPath) -> str:
    return ".".join(map(str, key_path))
