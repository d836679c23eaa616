"""Rows to token ids, and which of them are trained on: the assistant's turns, found without markers in the template."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import has_generation_markers

from slipstream.train.formats import IGNORE

Span = tuple[int, int]
Row = dict[str, Any]


class UnstableTemplateError(ValueError):
    """What the template renders of a part of a conversation is not how the whole begins: turns cannot be told apart."""


class Tokens(NamedTuple):
    """Ids `[T]` int64, and which of them are trained on `[T]` bool."""

    ids: np.ndarray
    trained: np.ndarray


class _Text(NamedTuple):
    """What is still to be tokenized; without a template, special tokens are the tokenizer's to add."""

    text: str
    spans: list[Span]
    special_tokens: bool


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Tokens:
    """Token ids of a row, and which of them are trained on.

    `messages`: the assistant's turns, from where the generation prompt ends to the end of the turn, so that the model
    learns to stop; those from `trained_from` on, if given. `prompt`/`completion`: the completion and an end-of-sequence
    token. `text`: everything, likewise. `input_ids`: as its `labels` say, or everything.

    Raises: ValueError when `messages` come without a chat template, or the template refuses them;
        UnstableTemplateError when turns cannot be told apart.
    """
    (made,) = encode_rows([row], tokenizer, template)
    if isinstance(made, ValueError):
        raise made
    return made


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: str | None
) -> list[Tokens | ValueError]:
    """`encode` for many rows, which a fast tokenizer works on in parallel; an error stands in its row's place."""
    made: list[Tokens | ValueError | _Text] = []
    for row in rows:
        try:
            made.append(_render(row, tokenizer, template))
        except ValueError as error:
            made.append(error)
    for special_tokens in (False, True):
        places = [i for i, x in enumerate(made) if isinstance(x, _Text) and x.special_tokens == special_tokens]
        texts = [made[i] for i in places]
        for place, tokens in zip(places, _tokenize(texts, tokenizer, special_tokens), strict=True):  # type: ignore[arg-type]
            made[place] = tokens
    return made  # type: ignore[return-value]


def _render(row: Row, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Tokens | _Text:
    if "input_ids" in row:
        ids = np.array(row["input_ids"], dtype=np.int64)
        labels = row.get("labels")
        return Tokens(ids, np.ones(len(ids), bool) if labels is None else np.array(labels) != IGNORE)
    if "messages" not in row:
        prompt, answer = ("", row["text"]) if "text" in row else (row["prompt"], row["completion"])
        return _Text(prompt + answer, [(len(prompt), len(prompt + answer))], True)
    if template is None:
        raise ValueError("'messages' need a chat template and the tokenizer has none; name one as data.chat_template")
    messages, tools, start = row["messages"], row.get("tools"), row.get("trained_from", 0)
    _check_developer(messages, tokenizer, template, tools)
    # Markers do not tell the answers of a prompt from those of its completion.
    if has_generation_markers(template) and not any(message["role"] == "assistant" for message in messages[:start]):
        encoded = _apply_template(
            messages, tokenizer, template, tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return Tokens(np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"], dtype=bool))
    text, spans = assistant_spans(messages, tokenizer, template, tools, start)
    return _Text(text, spans, False)


def _check_developer(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, tools: Any
) -> None:
    """Raises: ValueError when the template leaves out what a developer says; many know no such role."""
    said = [(index, message["content"]) for index, message in enumerate(messages) if message["role"] == "developer"]
    text = _apply_template(messages, tokenizer, template, tools, tokenize=False) if said else ""
    for index, content in said:
        if content.strip() not in text:
            raise ValueError(
                f"messages[{index}]: the chat template leaves out what the role 'developer' says; use 'system'"
            )


def _apply_template(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, tools: Any, **kwargs: Any
) -> Any:
    """Raises: ValueError when the template refuses the messages, or was not written for such."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, **kwargs)
    except TemplateError as error:
        raise ValueError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"the chat template fails at this row: {type(error).__name__}: {error}") from error


def assistant_spans(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, tools: Any = None, start: int = 0
) -> tuple[str, list[Span]]:
    """The rendered conversation and the characters [start, end) of each assistant turn, found by rendering prefixes.

    Of turns before `messages[start]` none is looked for.

    Needs no `{% generation %}` markers: turn i starts where the turns before it plus the generation prompt end, and
    ends where the turns up to it end.

    Raises: ValueError when the template refuses the conversation; UnstableTemplateError.
    """

    def render(turns: list[dict[str, Any]], prompt: bool) -> str:
        return str(_apply_template(turns, tokenizer, template, tools, tokenize=False, add_generation_prompt=prompt))

    text = render(messages, False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < start:
            continue
        before = render(messages[:index], True) if index else _opening(text, render)
        upto = render(messages[: index + 1], False)
        if not (text.startswith(before) and text.startswith(upto)):
            raise UnstableTemplateError(
                f"the chat template renders what leads to messages[{index}] differently once later turns follow, so "
                "the assistant's tokens cannot be told apart; name a template with {% generation %} markers as "
                "data.chat_template, or split the conversation so that each row ends with its only trained answer"
            )
        spans.append((len(before), len(upto)))
    return text, spans


def _opening(text: str, render: Callable[[list[dict[str, Any]], bool], str]) -> str:
    """What leads to the turn of an assistant who speaks first: there are no turns before it that could be rendered.

    It is what the template writes ahead of any first turn, a default system prompt for instance, and the generation
    prompt.
    """
    other = [{"role": "user", "content": "\0"}]
    given, prompted = render(other, False), render(other, True)
    pairs = enumerate(zip(given, text, strict=False))
    shared = next((place for place, (a, b) in pairs if a != b), min(len(given), len(text)))
    prompt = prompted.removeprefix(given)
    start = text.rfind(prompt, 0, shared + len(prompt))
    if start < 0:
        raise UnstableTemplateError(
            "the conversation begins with the assistant, and the chat template does not render messages[0] as it does "
            "an answer, so the assistant's tokens cannot be told apart; name a template with {% generation %} markers "
            "as data.chat_template, or begin with a turn of the user"
        )
    return text[: start + len(prompt)]


def _tokenize(texts: Sequence[_Text], tokenizer: PreTrainedTokenizerBase, special_tokens: bool) -> list[Tokens]:
    """The tokens of each text; trained are those in one of its spans, from the first that reaches into it to the last.

    As a range, because some tokenizers give white space no characters, and an end-of-sequence token has none.
    """
    if not texts:
        return []
    encoded: Any = tokenizer(
        [text for text, _, _ in texts], add_special_tokens=special_tokens, return_offsets_mapping=True
    )
    made = []
    for (_, spans, _), ids, pairs in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids, offsets = np.array(ids, dtype=np.int64), np.array(pairs, dtype=np.int64).reshape(-1, 2)
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            reach, begin = np.flatnonzero(offsets[:, 1] > start), np.flatnonzero(offsets[:, 0] < end)
            if reach.size:
                trained[reach[0] : begin[-1] + 1] = True
        if (
            special_tokens
            and tokenizer.eos_token_id is not None
            and (not ids.size or ids[-1] != tokenizer.eos_token_id)
        ):
            ids, trained = np.append(ids, tokenizer.eos_token_id), np.append(trained, True)
        made.append(Tokens(ids, trained))
    return made


def trained_segments(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """A row of `input_ids` and `labels` as consecutive (text, trained on) pieces, special tokens shown."""
    segments: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        trained = label != IGNORE
        if not segments or segments[-1][1] != trained:
            segments.append(([], trained))
        segments[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), trained) for ids, trained in segments]
