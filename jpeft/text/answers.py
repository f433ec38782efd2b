"""The texts that a conversation is learned from: rendered by the chat template, with the spans of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jpeft.text.chat_template import ChatTokenizer
from jpeft.text.template import ChatError, Message, Reads, Span, Template

# Keys that a template may leave out without loss: the order of messages says the same.
_IMPLIED = {"tool_call_id": ("tool",), "name": ("tool",)}
_THINKING = ("reasoning_content", "reasoning", "thinking")
_APART = ("tool_calls", *_THINKING)  # what a message holds beside its content
_OTHER = "\ue000an answer\ue000"  # a content that is in no conversation


@dataclass
class Text:
    """A rendered conversation.

    Attributes:
        text: what the chat template writes, up to a last answer or beyond.
        spans: the `(start, end)` of each answer to learn, in order.
    """

    text: str
    spans: list[Span] = field(default_factory=list)

    @property
    def answers(self) -> list[str]:
        """The text of each span.

        >>> Text("Tea? Yes.", [(5, 9)]).answers
        ['Yes.']
        """
        return [self.text[start:end] for start, end in self.spans]


def texts(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    trained: Sequence[bool] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[Text]:
    """The texts that a conversation is learned from. Together they hold each answer once.

    A template may mark answers by `{% generation %}`; then there is one text, and what is marked is learned. Without
    marks, an answer is what follows the prompt for it, up to the token that ends it: each is learned after the text
    that the model is given when it is to answer. Answers whose text later messages do not change share one text.
    Others, such as those that lose their thinking once more messages follow, each end a text of their own.

    Args:
        messages: the conversation.
        trained: by message, whether to learn it; by default, all of the assistant's.
        variables: other variables of the template, such as `tools`.

    Raises:
        ChatError: there is no template, it fails, an answer cannot be located in its text, or the template does not
            read a key of a message or a variable, so that its content would be lost.

    >>> [text.answers for text in texts(tokenizer, tea_and_yes)]  # doctest: +SKIP
    [['Yes</s>']]
    """
    checked, variables = tokenizer.check(messages), variables or {}
    if unread := [name for name in variables if name not in tokenizer.program.variables]:
        raise ChatError(
            f"{tokenizer.where}: the chat template does not read {unread[0]!r}, so its content would be lost; remove "
            "it from the row, or give a template that reads it (`chat_template` FILE)"
        )
    chosen = [
        index
        for index, message in enumerate(checked)
        if message["role"] == "assistant" and (trained is None or trained[index])
    ]
    renderer = _Renderer(tokenizer, checked, {**tokenizer.special, **variables})
    try:
        found = _marked(renderer, chosen) if tokenizer.program.marks_answers else _located(renderer, chosen)
    except ChatError:
        renderer.check_names()  # often the cause
        raise
    renderer.check_reads(checked if tokenizer.program.marks_answers else checked[: max(chosen, default=-1) + 1])
    renderer.check_shown(max(chosen, default=-1) + 1, ("tools", "documents"))
    return found


def check_prompt(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> None:
    """Raises a ChatError if the chat template does not read a key of the messages of a prompt.

    >>> check_prompt(tokenizer, [{"role": "user", "content": "Tea?"}])  # doctest: +SKIP
    """
    checked = tokenizer.check(messages)
    renderer = _Renderer(tokenizer, checked, tokenizer.special)
    renderer.text(len(checked), add_generation_prompt=True)
    renderer.check_reads(checked)


class _Renderer:
    """Renders beginnings of a conversation, and records what the template reads."""

    def __init__(self, tokenizer: ChatTokenizer, messages: Sequence[Message], variables: Mapping[str, Any]):
        self.tokenizer, self.messages, self.variables = tokenizer, messages, variables
        self.template: Template = tokenizer.program
        self._reads: Reads = [set() for _ in messages]

    def run(self, count: int, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The text of the first `count` messages, and the spans that the template marks."""
        return self.template.run(self.messages[:count], add_generation_prompt, self.variables, self._reads)

    def text(self, count: int, add_generation_prompt: bool = False, last: Message | None = None) -> str:
        """The text of the first messages; `last` takes the place of the last of them."""
        if last is None:
            return self.run(count, add_generation_prompt)[0]
        return self.template.run([*self.messages[: count - 1], last], add_generation_prompt, self.variables)[0]

    def error(self, index: int, reason: str) -> ChatError:
        return ChatError(f"{self.template.where}: message {index}: {reason}")

    def check_reads(self, messages: Sequence[Message]) -> None:
        """Raises a ChatError for a key of a message that the template never read."""
        for index, message in enumerate(messages):
            for key, value in message.items():
                implied = key == "role" or message["role"] in _IMPLIED.get(key, ())
                if _says_something(value) and not implied and key not in self._reads[index]:
                    raise self._unread(index, key)

    def check_names(self) -> None:
        """Raises a ChatError for a key of a message whose name is not in the template."""
        for index, message in enumerate(self.messages):
            for key, value in message.items():
                named = key in ("role", "content", *_IMPLIED) or key in self.template.source
                if _says_something(value) and not named and key not in self._reads[index]:
                    raise self._unread(index, key)

    def check_shown(self, count: int, names: Sequence[str]) -> None:
        """Raises a ChatError for a variable of these names that does not change the text of the first messages."""
        for name in names:
            if self.variables.get(name) and count:
                without = {key: value for key, value in self.variables.items() if key != name}
                if self.template.run(self.messages[:count], False, without)[0] == self.text(count):
                    raise ChatError(
                        f"{self.template.where}: the chat template does not write {name!r} for these messages, so its "
                        "content would be lost; remove it from the row, or give a template that writes it "
                        "(`chat_template` FILE)"
                    )

    def _unread(self, index: int, key: str) -> ChatError:
        role = self.messages[index]["role"]
        remedy = "remove the message" if key == "content" else "remove it (`ignore_keys`)"
        return self.error(
            index,
            f"the chat template does not read {key!r:.40} of the role {role}, so its content would be lost; {remedy}, "
            "or give a template that reads it (`chat_template` FILE)",
        )


def _says_something(value: Any) -> bool:
    """Whether a value is more than an empty one; false and 0 are values."""
    return value is not None and value not in ("", [], {})


def _marked(renderer: _Renderer, chosen: Sequence[int]) -> list[Text]:
    """The text of the whole conversation, with what the template marks."""
    text, spans = renderer.run(len(renderer.messages))
    answers = [index for index, message in enumerate(renderer.messages) if message["role"] == "assistant"]
    if len(chosen) == len(answers):
        return [Text(text, spans)]
    if len(spans) != len(answers):
        raise ChatError(
            f"{renderer.template.where}: the chat template marks {len(spans)} parts by {{% generation %}}, and the "
            f"assistant has {len(answers)} messages, so those of weight 0 cannot be told from the others"
        )
    return [Text(text, [span for index, span in zip(answers, spans, strict=True) if index in chosen])]


def _located(renderer: _Renderer, chosen: Sequence[int]) -> list[Text]:
    """The fewest texts in which each answer follows its own prompt."""
    found: list[Text] = []
    for index in reversed(chosen):
        text, span = _answer(renderer, index)
        for longer in found:
            if longer.text.startswith(text[: span[1]]):
                longer.spans.insert(0, span)
                break
        else:
            found.append(Text(text, [span]))
    return found[::-1]


def _answer(renderer: _Renderer, index: int) -> tuple[str, Span]:
    """The text up to an answer and with it, and the span of the answer."""
    before, after = _prompt(renderer, index), renderer.text(index + 1)
    if not (after.startswith(before) and _holds(after[len(before) :], renderer.messages[index])):
        after = before + _written(renderer, index, before, after)
    answer = after[len(before) :]
    stops = renderer.tokenizer.stop_tokens
    end = max((answer.rfind(token) + len(token) for token in stops if token in answer), default=len(answer))
    blank = not answer[end:].strip()  # a line break after the stop token, which a model never writes
    return after, (len(before), len(before) + (end if blank else len(answer)))


def _prompt(renderer: _Renderer, index: int) -> str:
    """The text that the model is given when it is to write a message."""
    try:
        return renderer.text(index, add_generation_prompt=True)
    except ChatError as error:
        if index:
            raise
        raise renderer.error(
            index,
            "an answer that begins the conversation has no prompt, so it cannot be learned; remove it, or give it "
            '"weight": 0',
        ) from error


def _holds(text: str, message: Message) -> bool:
    """Whether a text contains a message's thinking and content, except for blanks."""
    parts = [message.get(key) for key in (*_THINKING, "content")]
    squeezed = _squeezed(text)
    return all(_squeezed(part) in squeezed for part in parts if isinstance(part, str))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _written(renderer: _Renderer, index: int, before: str, after: str) -> str:
    """The text that the model writes after the prompt `before`, where the template renders an answer differently.

    Templates of reasoning models take the thinking out of answers, or begin the thinking in the prompt. The model then
    writes the message as it is, from where the prompt ends, and what the template writes after the message.
    """
    head, closing = _around(renderer, index)
    content = renderer.messages[index].get("content") or ""
    visible = after[len(head) : len(after) - len(closing)]
    is_end = after == head + visible + closing and _squeezed(content).endswith(_squeezed(visible))
    if not (is_end and before.startswith(head)) or any(renderer.messages[index].get(key) for key in _APART):
        raise renderer.error(
            index,
            "the chat template renders the answer without a part of it, or after another text than its generation "
            "prompt, so what the model is to write is not known; mark it in the template by {% generation %}, and give "
            "that template by `chat_template` FILE",
        )
    begun = before[len(head) :]
    if not content.startswith(begun.strip()):
        raise renderer.error(
            index,
            f"the chat template's generation prompt ends in {begun!r:.40}, and the answer does not begin with it; "
            "begin the answer with it and what the model thinks, or give a template without it (`chat_template` FILE)",
        )
    return (content[len(begun.strip()) :].lstrip() if begun.strip() else content) + closing


def _around(renderer: _Renderer, index: int) -> tuple[str, str]:
    """The texts before and after the content of a message, from a rendering of another content in its place."""
    message = {**renderer.messages[index], "content": _OTHER}
    head, _, closing = renderer.text(index + 1, last=message).partition(_OTHER)
    return head, closing
