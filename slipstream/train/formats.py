"""The forms that rows of training data come in, each brought to one of four, and what is wrong with a bad one.

| form | keys | trained on |
|---|---|---|
| messages | `messages`: `role` and `content` each; `tools` if any | what the assistant says |
| ShareGPT | `conversations`: `from` and `value` each; `system` if any | what the assistant says |
| Alpaca | `instruction`, `output`; `input`, `system` if any | the output |
| prompt/completion | `prompt`, `completion`, as texts | the completion |
| prompt/completion | `prompt`, `completion`, as messages; `tools` if any | what the assistant says in the completion |
| text | `text` | everything |
| pre-tokenised | `input_ids`; `labels` if any, -100 where not trained | the labels, or everything |

A row may have other keys too, and so may a message: its template decides. A key that is null counts as absent.
"""

from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, Undefined
from jinja2.sandbox import SandboxedEnvironment

IGNORE = -100
ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's `from`.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
            **{role: role for role in ROLES}}  # fmt: skip
# For models without a chat template (Taori et al. 2023, Stanford Alpaca).
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
KNOWN = "'messages', 'conversations', 'instruction' and 'output', 'prompt' and 'completion', 'text', or 'input_ids'"


def drop_nulls(value: Any) -> Any:
    """The value without the keys that are null, at any depth. Lists keep their nulls."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def read_row(row: Any, chat: bool) -> dict[str, Any]:
    """A row of any form as `messages` (and `tools`), `prompt` and `completion`, `text`, or `input_ids` and `labels`.

    With `messages` may come `trained_from`, the index of the first that is trained on.

    Args:
        row: what a line of a file held.
        chat: whether there is a chat template; without it, Alpaca's rows become `prompt` and `completion`.

    Raises: ValueError saying what is wrong with the row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a line must be one JSON object, not {kind(row)}")
    if row.get("input_ids") is not None:
        return _tokens(row)
    made = _read_text(_given(row), chat)
    for key, value in made.items():
        _check_characters(value, key)
    return made


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _read_text(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    for key in ("messages", "conversations"):
        if key in row:
            return _conversation(row, key)
    if "instruction" in row:
        return _alpaca(row, chat)
    keys = ("text",) if "text" in row else ("prompt", "completion")
    if not any(key in row for key in keys):
        raise ValueError(f"needs {KNOWN}; has {', '.join(map(repr, row)) or 'nothing'}")
    if any(isinstance(row.get(key), list) for key in ("prompt", "completion")) and "text" not in keys:
        return _prompted(row, keys)
    return {key: _string(row, key, keys) for key in keys}


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _check_characters(value: Any, where: str) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} holds half a character ({value[error.start]!r}, a surrogate without its other half)"
            ) from error
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_characters(key, f"a key of {where}")
            _check_characters(item, f"{where}.{key}" if isinstance(value, dict) else f"{where}[{key}]")


def _check_there(row: dict[str, Any], key: str, beside: tuple[str, ...]) -> None:
    if key not in row:
        raise ValueError(f"{key!r} is missing beside {next(k for k in beside if k in row)!r}")


def _string(row: dict[str, Any], key: str, beside: tuple[str, ...]) -> str:
    _check_there(row, key, beside)
    if not isinstance(row[key], str):
        raise ValueError(f"{key!r} must be a string, not {kind(row[key])}")
    if not row[key]:
        raise ValueError(f"{key!r} is empty")
    return str(row[key])


def _alpaca(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    instruction, output = (_string(row, key, ("instruction", "output")) for key in ("instruction", "output"))
    extra = {key: row.get(key) or "" for key in ("input", "system")}
    for key, value in extra.items():
        if not isinstance(value, str):
            raise ValueError(f"{key!r} must be a string, not {kind(value)}")
    if not chat:
        given = f"### Input:\n{extra['input']}\n\n" if extra["input"] else ""
        paired = ", paired with an input that provides further context" if given else ""
        system = f"{extra['system']}\n\n" if extra["system"] else ""
        return {"prompt": system + ALPACA.format(instruction=instruction, input=given, paired=paired),
                "completion": output}  # fmt: skip
    system_turn = [{"role": "system", "content": extra["system"]}] if extra["system"] else []
    question = f"{instruction}\n\n{extra['input']}" if extra["input"] else instruction
    return {
        "messages": [
            *system_turn,
            {"role": "user", "content": question},
            {"role": "assistant", "content": output},
        ]
    }


def _conversation(row: dict[str, Any], key: str) -> dict[str, Any]:
    messages = _turns(row[key], key)
    system = row.get("system")
    if key == "conversations" and isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, **_tools(row)}


def _prompted(row: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """TRL's conversational form: two lists of messages."""
    for key in keys:
        _check_there(row, key, keys)
    prompt, completion = (_turns(row[key], key) for key in keys)
    return {"messages": [*prompt, *completion], "trained_from": len(prompt), **_tools(row)}


def _tools(row: dict[str, Any]) -> dict[str, Any]:
    return {"tools": row["tools"]} if row.get("tools") else {}


def _turns(turns: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise ValueError(f"{key!r} must be a list, not {kind(turns)}")
    if not turns:
        raise ValueError(f"{key!r} is empty")
    return [_turn(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """One message with `role`, `content`, `tool_calls` if any, and what else the row says of it.

    Templates read `reasoning_content` or `thinking`, `name`, `tool_call_id` and more.
    """
    if not isinstance(turn, dict):
        raise ValueError(f"{where} must be an object with 'role' and 'content', not {kind(turn)}")
    turn = _given(turn)
    speaker, content = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    calls = turn.get("tool_calls") or None
    if isinstance(turn.get(content), list):
        turn = {**turn, content: _joined(turn[content], f"{where}.{content}")}
    for key in (speaker, content):
        if key not in turn and not (key == content and calls):
            raise ValueError(f"{where}: {key!r} is missing")
        if not isinstance(turn.get(key, ""), str):
            raise ValueError(f"{where}: {key!r} must be a string, not {kind(turn[key])}")
    roles = SPEAKERS if speaker == "from" else {role: role for role in ROLES}
    if turn[speaker] not in roles:
        raise ValueError(f"{where}: {speaker} {turn[speaker]!r} is not one of {', '.join(roles)}")
    role = roles[turn[speaker]]
    if not turn.get(content) and role in ("user", "assistant") and not calls:
        raise ValueError(f"{where}: {content!r} is empty")
    others = {key: value for key, value in turn.items() if key not in ("from", "value", "tool_calls")}
    return {**others, "role": role, "content": turn.get(content) or "", **({"tool_calls": calls} if calls else {})}


def _joined(parts: list[Any], where: str) -> str:
    """Content in parts, as OpenAI has it, as one text."""
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            what = f"of type {part['type']!r}" if isinstance(part, dict) and part.get("type") else kind(part)
            raise ValueError(f"{where}[{index}] is {what}; content in parts has {{'type': 'text', 'text': …}} only")
    return "".join(part["text"] for part in parts)


def _tokens(row: dict[str, Any]) -> dict[str, Any]:
    ids, labels = row["input_ids"], row.get("labels")
    for key, values in (("input_ids", ids), ("labels", labels)):
        if values is None and key == "labels":
            continue
        if not isinstance(values, list):
            raise ValueError(f"{key!r} must be a list, not {kind(values)}")
        if any(type(value) is not int for value in values):
            raise ValueError(f"{key!r} must hold whole numbers")
    if not ids:
        raise ValueError("'input_ids' is empty")
    for extreme in (min(ids), max(ids)):
        if not 0 <= extreme < 2**31:
            raise ValueError(f"'input_ids' holds {extreme}; ids are 0 or more, and below 2**31")
    if labels is not None:
        if len(labels) != len(ids):
            raise ValueError(f"'labels' has {len(labels)} entries and 'input_ids' {len(ids)}; they go together")
        pairs = enumerate(zip(ids, labels, strict=True))
        wrong = next((index for index, (token, label) in pairs if label not in (token, IGNORE)), None)
        if wrong is not None:
            raise ValueError(f"labels[{wrong}] is {labels[wrong]}; a label is the id itself ({ids[wrong]}) or {IGNORE}")
    return {"input_ids": ids, "labels": labels}


class _Null(StrictUndefined):
    """A column that is null: it may be asked for, and not written."""

    __bool__ = Undefined.__bool__  # type: ignore[assignment]


class RowMap:
    """`data.map` of a recipe: a row made by Jinja templates over the columns of another.

    Example: `{"prompt": "{{ ctx }}", "completion": " {{ endings[label | int] }}"}` for HellaSwag.
    """

    def __init__(self, templates: Mapping[str, str]) -> None:
        """Raises: ValueError for a template that is not valid Jinja."""
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        self.templates: dict[str, Template] = {}
        for key, text in templates.items():
            try:
                self.templates[key] = environment.from_string(text)
            except TemplateError as error:
                raise ValueError(f"data.map.{key}: not a valid Jinja template: {error}") from error

    def __call__(self, row: Any) -> dict[str, Any]:
        """Raises: ValueError where the row lacks a column or has it of another type."""
        if not isinstance(row, dict):
            raise ValueError(f"a line must be one JSON object, not {kind(row)}")
        made = {}
        columns = {key: _Null(name=key) if value is None else drop_nulls(value) for key, value in row.items()}
        for key, template in self.templates.items():
            try:
                made[key] = template.render(columns)
            except (TemplateError, TypeError, ValueError, LookupError) as error:
                nulls = [name for name in row if row[name] is None]
                absent = f"; null, which counts as absent: {', '.join(nulls)}" if nulls else ""
                raise ValueError(f"data.map.{key}: {error} (columns: {', '.join(_given(row))}{absent})") from error
        if "user" not in made:
            return made
        roles = [role for role in ("system", "user", "assistant") if made.get(role)]
        return {"messages": [{"role": role, "content": made[role]} for role in roles]}
