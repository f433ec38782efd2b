"""Rows of conversation files in the forms that people have, each read into messages.

    row = read("train.jsonl", 3, {"conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", …}]})
    row.messages, row.trained

What a row says is read, passed to the chat template, or refused by its line and key. Keys that only describe a row,
such as `id`, are listed as ignored.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jpeft.errors import UserError
from jpeft.text.chat_template import ROLES
from jpeft.text.reading import check_text, check_unicode
from jpeft.text.template import Message, plain_text

# Keys that describe a row and hold nothing to learn from; so do those that end in `_id`.
METADATA = frozenset(
    (
        *("id", "idx", "index", "uuid", "guid", "hash", "source", "dataset", "data_source", "origin", "split", "url"),
        *("category", "categories", "topic", "tags", "task", "language", "lang", "locale", "license", "author"),
        *("title", "timestamp", "created_at", "date", "version", "model"),
    )
)
_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
)
_EXPECTED = (
    "'messages', 'conversations', 'prompt' and 'completion', 'instruction' and 'output' (with or without 'input'), "
    "or 'question' and 'answer'"
)
_SYSTEM = ("system", "system_prompt")
# Roles of ShareGPT. `function_call` is the assistant's, and holds JSON.
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "function_call": "assistant",
}
_ROLES = (*ROLES, "developer", "ipython")  # the chat template decides about the last two


class Row(NamedTuple):
    """A conversation.

    Attributes:
        messages: its messages, as chat templates take them.
        trained: by message, whether it is an answer to learn.
        variables: variables of the chat template, such as `tools`.
        ignored: keys that were left out because they only describe the row.
    """

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    variables: Mapping[str, Any]
    ignored: tuple[str, ...]


class _Turn(NamedTuple):
    message: dict[str, Any]
    trained: bool


class _At(NamedTuple):
    """The place of a row, and the keys that the user said to ignore."""

    path: str | Path
    line: int
    ignore: Collection[str] = ()

    def error(self, reason: str) -> UserError:
        return UserError(f"{self.path}: line {self.line}: {reason}")

    def text(self, name: str, value: Any) -> str:
        return check_text(self.path, self.line, name, value)


def read(path: str | Path, line: int, row: Mapping[str, Any], ignore: Collection[str] = ()) -> Row:
    """Reads one row.

    Args:
        path: the file, and `line`, the row's line in it, for error messages.
        ignore: keys of the row and of its messages to leave out, whatever they hold.

    Raises:
        UserError: the row is malformed, or has a key that would be lost.

    >>> read("a.jsonl", 1, {"question": "Tea?", "answer": "Yes.", "id": 7})[1:]
    ((False, True), {}, ('id',))
    """
    at = _At(path, line, ignore)
    rest = {key: value for key, value in row.items() if key not in ignore}
    turns = _conversation(at, rest)
    turns = _with_system(at, rest, turns)
    variables = _variables(at, rest)
    ignored = _leftovers(at, rest, turns)
    if not any(turn.trained for turn in turns):
        raise at.error("every message of the assistant has the weight 0, so there is nothing to learn")
    messages = tuple(turn.message for turn in turns)
    return Row(messages, tuple(turn.trained for turn in turns), variables, ignored)


# ----------------------------------------------------------------------------------------------------- conversations


def _conversation(at: _At, rest: dict[str, Any]) -> list[_Turn]:
    """The turns of a row, whose keys are removed from `rest`."""
    lists = [key for key in _LISTS if rest.get(key) is not None]
    pairs = [pair for pair in _PAIRS if all(key in rest for key in pair)]
    forms = lists or [" and ".join(pair) for pair in pairs]
    if len(forms) > 1:
        raise at.error(f"ambiguous keys, {' or '.join(forms)}? keep one of them")
    if lists:
        turns = _turns(at, lists[0], rest.pop(lists[0]))
    elif pairs:
        turns = _pair(at, rest, *pairs[0])
    else:
        keys = ", ".join(repr(key)[:40] for key in list(rest)[:8]) or "none"
        preferences = "; rows of preferences have no answer to learn" if {"chosen", "rejected"} <= rest.keys() else ""
        raise at.error(f"the keys are {keys}; expected {_EXPECTED}{preferences}")
    if not any(turn.message["role"] == "assistant" for turn in turns):
        raise at.error(f"{lists[0]!r} has no message of the assistant, so there is nothing to learn")
    return turns


def _pair(at: _At, rest: dict[str, Any], request: str, reply: str) -> list[_Turn]:
    """A request and its reply, each a text or, for prompts and completions, a list of messages."""
    asked, answered = rest.pop(request), rest.pop(reply)
    if isinstance(asked, list) and request == "prompt":
        before = [turn._replace(trained=False) for turn in _turns(at, request, asked)]
    else:
        question = at.text(request, asked)
        more = rest.pop("input", None) if request == "instruction" else None
        if more is not None and str(more).strip():
            question += "\n\n" + at.text("input", more)
        before = [_Turn({"role": "user", "content": question}, False)]
    if isinstance(answered, list) and request == "prompt":
        after = _turns(at, reply, answered)
        if not any(turn.message["role"] == "assistant" for turn in after):
            raise at.error(f"{reply!r} has no message of the assistant, so there is nothing to learn")
    else:
        after = [_Turn({"role": "assistant", "content": at.text(reply, answered)}, True)]
    if (request, reply) == ("instruction", "output"):
        rest.pop("text", None)  # Alpaca's rows repeat themselves there, as one text
    return before + after


def _with_system(at: _At, rest: dict[str, Any], turns: list[_Turn]) -> list[_Turn]:
    """The turns behind the system message that a key of the row holds."""
    found = {key: rest.pop(key) for key in _SYSTEM if key in rest}
    found = {key: value for key, value in found.items() if not _says_nothing(value)}
    if not found:
        return turns
    if len(found) > 1:
        raise at.error(f"ambiguous keys, {' or '.join(found)}? keep one of them")
    ((key, value),) = found.items()
    if isinstance(value, str) and not value.strip():
        return turns
    message = {"role": "system", "content": at.text(key, value)}
    if any(turn.message == message for turn in turns):
        return turns
    if any(turn.message["role"] == "system" for turn in turns):
        raise at.error(f"{key!r} is a system message beside another one among the messages; keep one of them")
    return [_Turn(message, False), *turns]


def _variables(at: _At, rest: dict[str, Any]) -> dict[str, Any]:
    """The variables of the chat template in a row, whose keys are removed from `rest`."""
    variables: dict[str, Any] = {}
    for key in ("tools", "documents"):
        value = rest.pop(key, None)
        if isinstance(value, str) and value.strip():  # as in files of LLaMA-Factory and in columns of Arrow
            value = _parsed(at, key, value)
        if _says_nothing(value) or isinstance(value, str):
            continue
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise at.error(f"{key!r} must be a list of objects, got {json.dumps(value)[:40]}")
        variables[key] = value
    more = rest.pop("chat_template_kwargs", None)
    if not _says_nothing(more):
        if not isinstance(more, dict):
            raise at.error(f"'chat_template_kwargs' must be an object, got {json.dumps(more)[:40]}")
        if taken := [key for key in more if key in (*variables, "messages", "add_generation_prompt")]:
            raise at.error(f"'chat_template_kwargs' has the key {taken[0]!r}, which jpeft gives to the chat template")
        variables |= more
    check_unicode(at.path, at.line, "tools", json.dumps(variables, ensure_ascii=False))
    return variables


def _leftovers(at: _At, rest: Mapping[str, Any], turns: Sequence[_Turn]) -> tuple[str, ...]:
    """The keys of a row that only describe it. Raises a UserError for those that hold something else."""
    texts = {content for turn in turns if isinstance(content := turn.message.get("content"), str)}
    ignored = []
    for key, value in rest.items():
        if _says_nothing(value) or (isinstance(value, str) and value in texts):  # such as a prompt beside its messages
            continue
        if key not in METADATA and not key.endswith("_id"):
            raise at.error(
                f"the key {key!r:.40} means nothing here, and what it holds would be lost; rename it to one that is "
                f"read, or leave it out by `ignore_keys` {key:.40}"
            )
        ignored.append(key)
    return tuple(ignored)


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _parsed(at: _At, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise at.error(f"{name!r} must hold JSON: {error}") from None


# ------------------------------------------------------------------------------------------------------------- turns


def _turns(at: _At, key: str, messages: Any) -> list[_Turn]:
    if not isinstance(messages, list):
        raise at.error(f"{key!r} must be a list, got {json.dumps(messages)[:40]}")
    return [_turn(at, f"{key}[{index}]", message) for index, message in enumerate(messages)]


def _turn(at: _At, name: str, message: Any) -> _Turn:
    """One message, with `role` and `content` or ShareGPT's `from` and `value`."""
    known = isinstance(message, dict) and ("role" in message or "from" in message)
    fields = {key: value for key, value in message.items() if key not in at.ignore} if known else {}
    given, content = _spelled(at, name, fields, "role", "from"), _spelled(at, name, fields, "content", "value")
    if not _says_nothing(call := fields.pop("function_call", None)):  # OpenAI's, before it had `tool_calls`
        fields["tool_calls"] = _calls(at, f"{name}.function_call", call)
    has_calls = not _says_nothing(fields.get("tool_calls"))
    if not known or given is _MISSING or (content is _MISSING and not has_calls and given != "function_call"):
        raise at.error(f"{name!r} must be an object with 'role' and 'content', got {json.dumps(message)[:60]}")
    role = _SHAREGPT.get(given, given) if isinstance(given, str) else given
    if role not in _ROLES:
        raise at.error(f"{name!r} has the role {json.dumps(given)[:40]}, expected {', '.join((*ROLES, *_SHAREGPT))}")
    trained = _trained(at, name, role, fields)
    more = {key: value for key, value in fields.items() if not _says_nothing(value) and key not in METADATA}
    if given == "function_call":
        more["tool_calls"], content, has_calls = _calls(at, f"{name}.value", content), None, True
    content = _content(at, f"{name}.content", None if content is _MISSING else content, role, has_calls)
    check_unicode(at.path, at.line, name, json.dumps(more, ensure_ascii=False))
    return _Turn({"role": role, "content": content, **more}, trained)


_MISSING = object()


def _spelled(at: _At, name: str, fields: dict[str, Any], *keys: str) -> Any:
    """The value of the one of some keys that is there, which is removed."""
    values = [fields.pop(key) for key in keys if key in fields]
    if len(values) > 1:
        raise at.error(f"{name!r} has the keys {' and '.join(map(repr, keys))}, which mean the same; keep one of them")
    return values[0] if values else _MISSING


def _content(at: _At, name: str, content: Any, role: str, has_calls: bool) -> str | None:
    if isinstance(content, list):
        try:
            content = plain_text(content)
        except ValueError as error:
            raise at.error(f"{name!r} {error}") from None
    if has_calls and (content is None or content == ""):
        return content
    if role == "assistant":
        return at.text(name, content)
    if not isinstance(content, str):  # a system prompt may be blank
        raise at.error(f"{name!r} must be text, got {json.dumps(content)[:40]}")
    return check_unicode(at.path, at.line, name, content)


def _trained(at: _At, name: str, role: str, fields: dict[str, Any]) -> bool:
    """Whether a message is an answer to learn, by its `weight`, `train` or `loss` (ms-swift's), which are removed."""
    weight, train, loss = (fields.pop(key, None) for key in ("weight", "train", "loss"))
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise at.error(f"'{name}.weight' must be 0 (not trained on) or 1, got {json.dumps(weight)[:40]}")
    for key, value in (("train", train), ("loss", loss)):
        if value is not None and not isinstance(value, bool):
            raise at.error(f"'{name}.{key}' must be true or false, got {json.dumps(value)[:40]}")
    given = {"weight": weight, "train": train, "loss": loss}
    said = {bool(value) for value in given.values() if value is not None}
    if len(said) > 1:
        shown = " and ".join(f"{key} {json.dumps(value)}" for key, value in given.items() if value is not None)
        raise at.error(f"{name!r} has {shown}, which contradict each other")
    if role != "assistant" and said == {True}:
        raise at.error(f"{name!r} asks to train on a message of the role {role}; only the assistant's are learned")
    return role == "assistant" and said != {False}


def _calls(at: _At, name: str, content: Any) -> list[dict[str, Any]]:
    """The tool calls in a `function_call`, or in the JSON of ShareGPT's."""
    parsed = _parsed(at, name, content) if isinstance(content, str) else content
    calls = parsed if isinstance(parsed, list) else [parsed]
    for call in calls:
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            raise at.error(f"{name!r} must hold a call with 'name' and 'arguments', got {json.dumps(call)[:40]}")
    return [{"type": "function", "function": call} for call in calls]
