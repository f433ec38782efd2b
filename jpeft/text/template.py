"""The chat template: a Jinja program in a model's files that renders messages to text.

It runs in Jinja's sandbox, in the environment of transformers' templates, so that both render the same text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jpeft.errors import UserError

if TYPE_CHECKING:
    import jinja2

# A template may compare the role with other names, such as `message.role == "ipython"`; they are accepted too.
_ROLE = re.compile(r"""role['"]?\]?\s*==\s*['"](\w+)['"]""")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TAKES_TEXT_ARGUMENTS = re.compile(r"arguments['\"]?\]?\s+is\s+(?:not\s+)?string")
_ANSWERS = "_jpeft_answers"  # the template variable that collects the spans of answers
# More than any model's context holds. It stops templates that loop and write; one that writes nothing loops forever.
_MAX_CHARACTERS = 1 << 25

Message = Mapping[str, Any]
Span = tuple[int, int]
Reads = list[set[str]]  # by message, the keys that a template has read


class ChatError(UserError):
    """A tokenizer, a chat template or messages that cannot be used."""


@dataclass(frozen=True, eq=False)
class Template:
    """A chat template.

    Attributes:
        source: its text, in Jinja.
        where: the path it was read from, for error messages.

    >>> Template("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", "./tiny").run(
    ...     [{"role": "user", "content": "Tea?"}], False, {})
    ('user: Tea?', [])
    """

    source: str
    where: str

    @property
    def marks_answers(self) -> bool:
        """Whether it marks answers by `{% generation %}`."""
        return _GENERATION.search(self.source) is not None

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles that it compares with."""
        return tuple(dict.fromkeys(_ROLE.findall(self.source)))

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that it reads, `messages` among them.

        >>> sorted(Template("{% if tools %}{{ messages }}{% endif %}", "./tiny").variables)
        ['messages', 'tools']
        """
        from jinja2 import meta

        self._program  # noqa: B018 (reports syntax errors)
        return frozenset(meta.find_undeclared_variables(_environment().parse(self.source)))

    def run(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        reads: Reads | None = None,
    ) -> tuple[str, list[Span]]:
        """The rendered text, and the spans that the template marks.

        Args:
            reads: filled with the keys that are read, by message.

        Raises:
            ChatError: the template fails, or rejects the messages.
        """
        import jinja2

        pieces, size, marked = [], 0, []
        if not _TAKES_TEXT_ARGUMENTS.search(self.source):
            messages = [_with_arguments(message) for message in messages]
        if reads is not None:
            messages = [_Tracked(message, read) for message, read in zip(messages, reads, strict=False)]
        context = {"tools": None, "documents": None, **variables}
        context |= {"messages": messages, "add_generation_prompt": add_generation_prompt, _ANSWERS: (pieces, marked)}
        try:
            for piece in self._program.generate(context):
                pieces.append(piece)
                size += len(piece)
                if size > _MAX_CHARACTERS:
                    raise ChatError(f"{self.where}: the chat template wrote more than {_MAX_CHARACTERS} characters")
        except ChatError:
            raise
        except Exception as error:  # a template can raise whatever Python's operators and methods do
            if type(error) is jinja2.TemplateError:  # raised by the template's own `raise_exception`
                raise ChatError(f"{self.where}: the chat template rejects the messages: {_one_line(error)}") from error
            raise ChatError(
                f"{self.where}: the chat template failed ({type(error).__name__}: {_one_line(error)})"
            ) from error
        text = "".join(pieces)
        if any(not text.startswith(answer, start) for start, answer in marked):
            raise ChatError(
                f"{self.where}: {{% generation %}} is inside a macro or a block, so answers cannot be located"
            )
        return text, [(start, start + len(answer)) for start, answer in marked]

    @cached_property
    def _program(self) -> jinja2.Template:
        import jinja2

        try:
            return _environment().from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ChatError(f"{self.where}: the chat template is not valid Jinja{line}: {_one_line(error)}") from error


def plain_text(content: list[Any]) -> str:
    """The text of a list of content parts, such as `[{"type": "text", "text": "Tea?"}]`, joined without separators.

    Raises:
        ValueError: a part is not text.

    >>> plain_text([{"type": "text", "text": "Tea"}, {"type": "text", "text": "?"}])
    'Tea?'
    """
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"has a part of the type {kind!r:.40}; only parts of the type 'text' can be read")
        if kind is None or not isinstance(text := part.get("text"), str):
            raise ValueError(f"must be text, got {json.dumps(content, default=str)[:40]}")
        if more := [key for key, value in part.items() if key not in ("type", "text") and value]:
            raise ValueError(f"has a part with the key {more[0]!r:.40}, which would be lost; remove it")
        texts.append(text)
    return "".join(texts)


# -------------------------------------------------------------------------------------------------------- environment


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _environment() -> jinja2.Environment:
    """The Jinja environment that transformers gives to chat templates (`utils/chat_template_utils.py`)."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}…{% endgeneration %}` around an answer: records its beginning and its text."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it on instances)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

        @jinja2.pass_context
        def _record(self, context: Any, caller: Any) -> str:
            answer = caller()
            pieces, marked = context[_ANSWERS]
            marked.append((sum(map(len, pieces)), answer))
            return answer

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        """JSON without HTML escapes, unlike Jinja's own filter."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.LoopControlExtension]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


class _Tracked(dict[str, Any]):
    """A message that records which of its keys a template reads."""

    def __init__(self, message: Message, read: set[str]):
        super().__init__(message)
        self._read = read  # Jinja's sandbox hides names with an underscore from templates

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # so that `dict(message)` takes values by `__getitem__`

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        self._read.update(super().keys())
        return super().items()

    def values(self) -> Any:
        self._read.update(super().keys())
        return super().values()


class _Arguments(dict[str, Any]):
    """The arguments of a tool call, for templates that take them as an object and for those that take JSON text.

    OpenAI's rows hold the text. A template that writes `arguments | tojson` would quote it once more, and one that
    writes `"…" + arguments` fails on an object.
    """

    def __init__(self, arguments: Mapping[str, Any], text: str):
        super().__init__(arguments)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def _with_arguments(message: Message) -> Message:
    """A message whose tool calls have `_Arguments`."""
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple)):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call) for call in calls]}


def _call_with_arguments(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _call_with_arguments(function)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return call
        return {**call, "arguments": _Arguments(parsed, arguments)} if isinstance(parsed, dict) else call
    if isinstance(arguments, Mapping):
        return {**call, "arguments": _Arguments(arguments, json.dumps(arguments, ensure_ascii=False))}
    return call
