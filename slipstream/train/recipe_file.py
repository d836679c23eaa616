"""Read a recipe from YAML, with command-line overrides, and report every mistake with its place in the file."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from slipstream.train.recipe import Recipe
from slipstream.train.recipe_names import KeyPath, dotted, keys_of, meant, suggest

COMMAND_LINE = "command line"
# Numbers that YAML 1.1 takes for words: 1e-5 has no dot.
_FLOAT = re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Read, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings; the value is read as YAML. They win over the file.

    Returns: the recipe, and one note for each key that was given under another tool's name or in another section.
    Raises: ValueError with one line for each mistake, `file:line: section.key: what is wrong`; OSError when the file
        cannot be read.
    """
    values, places, mistakes = _read_yaml(Path(path))
    notes: list[str] = []
    _move_keys(values, places, notes, mistakes)
    for override in overrides:
        try:
            _apply_override(override, values, places, notes)
        except ValueError as error:
            mistakes.append(f"{COMMAND_LINE}: {error}")
    for name in list(values):
        # `train:` with nothing below it is an empty section, not a null.
        if values[name] is None and name in Recipe.model_fields:
            values[name] = {}
    mistakes += _unknown_keys(values, places)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        mistakes += [_explain(dict(e), places, str(path)) for e in error.errors(include_url=False)]
    if mistakes:
        raise ValueError("\n".join(dict.fromkeys(mistakes)))
    return recipe, notes


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; reading it back gives the same recipe."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str], list[str]]:
    """The file's values, for each key path its place as `file:line`, and a line for each key given twice."""
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe file")
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=_Loader)
        places: dict[KeyPath, str] = {}
        repeated = []
        for key_path, line, again in _walk(node):
            place = f"{path}:{line}"
            if again:
                first = places[key_path].rpartition(":")[2]
                repeated.append(f"{place}: {dotted(key_path)}: given twice, first in line {first}; keep one")
            places.setdefault(key_path, place)
        values = yaml.load(text, Loader=_Loader)
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
    if not equals or not all(keys):
        raise ValueError(f"{override!r} is not of the form section.key=value")
    if len(keys) <= 2 and (target := meant(keys[0] if len(keys) == 2 else None, keys[-1])):
        notes.append(f"{COMMAND_LINE}: {name} is read as {target}")
        keys = target.split(".")
    try:
        value = yaml.load(text, Loader=_Loader)
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


def _move_keys(values: dict[str, Any], places: dict[KeyPath, str], notes: list[str], mistakes: list[str]) -> None:
    """Move every key that another tool names differently, or that lies in another section, to where ours has it."""
    # A section of another tool's is read too, unless its name is a slip of the pen.
    sections = [
        name
        for name, section in values.items()
        if isinstance(section, dict) and (name in Recipe.model_fields or not _is_slip(name))
    ]
    for home in (None, *sections):
        source = values if home is None else values[home]
        for given in list(source):
            target = meant(home, str(given))
            if target is None or (isinstance(source[given], dict) and given in sections):
                continue
            section, key = target.split(".")
            at = (given,) if home is None else (home, given)
            goal = values.get(section)
            if goal is None:
                goal = values[section] = {}
            value = source.pop(given)
            if not isinstance(goal, dict) or key in goal:
                mistakes.append(f"{places[at]}: {given}: {target} is given as well; keep one")
                continue
            goal[key] = value
            for path, place in list(places.items()):
                if path[: len(at)] == at:
                    places[section, key, *path[len(at) :]] = place
            notes.append(f"{places[at]}: {dotted(at)} is read as {target}")
    for name in sections:
        if name not in Recipe.model_fields and not values[name]:
            del values[name]


def _is_slip(name: Any) -> bool:
    """Whether a key of the top level is one of our sections, misspelt."""
    return bool(difflib.get_close_matches(str(name), Recipe.model_fields, n=1))


def _unknown_keys(values: dict[str, Any], places: dict[KeyPath, str]) -> list[str]:
    """A line for each unknown key that pydantic would not name: of another tool's section, or of a mapping that a
    class of the library's validates. These keys are removed."""
    foreign = [name for name in values if name not in Recipe.model_fields and not _is_slip(name)]
    model = values.get("model")
    found: list[tuple[KeyPath, Any]] = [((name,), values[name]) for name in foreign]
    found.append((("distributed",), values.get("distributed")))
    found.append((("model", "backend"), model.get("backend") if isinstance(model, dict) else None))
    mistakes = []
    for location, mapping in found:
        if not isinstance(mapping, dict):
            continue
        for key in [key for key in mapping if key not in keys_of(location)]:
            path = (*location, key)
            mistakes.append(f"{_place(path, places)}: {dotted(path)}: unknown key; {suggest(path)}")
            del mapping[key]
        if location[0] in foreign:
            del values[str(location[0])]
    return mistakes


def _explain(error: dict[str, Any], places: dict[KeyPath, str], file: str) -> str:
    """One line for one of pydantic's errors."""
    location = tuple(part for part in error["loc"] if not str(part).startswith("function-") and part != "[key]")
    if error["type"] == "missing":
        field = keys_of(location[:-1])[str(location[-1])]
        return f"{_place(location, places, file)}: {dotted(location)}: missing; {field.description or 'no default'}"
    if error["type"] == "extra_forbidden":
        return f"{_place(location, places, file)}: {dotted(location)}: unknown key; {suggest(location)}"
    # Below a known key pydantic may name the branches of a union, which are no keys of the file.
    while len(location) > 2 and location not in places:
        location = location[:-1]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]} (given {error['input']!r})"
    elif len(location) < 2 and (named := re.match(r"([a-z_.]+): ", message)):
        # What a section's validator says of one of its keys.
        location, message = (*location, *named[1].split(".")), message[named.end() :]
    return f"{_place(location, places, file)}: {dotted(location)}: {message}"


def _place(location: KeyPath, places: dict[KeyPath, str], file: str = COMMAND_LINE) -> str:
    """The line of a key, or of the nearest one around it."""
    return next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), file)
