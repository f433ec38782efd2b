"""Tokenizers of language models with their chat templates: messages to token ids, and generated ids back to text.

Example::

    tokenizer = read("./SmolLM2-135M-Instruct")     # a HuggingFace folder or a .gguf file
    ids = tokenizer.encode_chat([{"role": "user", "content": "Why is the sky blue?"}])
    stream = Stream(tokenizer)
    for (id,) in jpeft.stream(model, params, [ids], stop_ids=tokenizer.stop_ids):
        print(stream.push(id), end="", flush=True)
    print(stream.finish())

`jpeft.text.template` runs the chat template, and `jpeft.text.conversations` tokenizes training data with it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from jpeft.files import read_json
from jpeft.storage import as_path
from jpeft.text import reading
from jpeft.text.template import ChatError, Message, Template, plain_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEMPLATE = "chat_template.jinja"  # the file of a model folder that holds the chat template
ROLES = ("system", "user", "assistant", "tool")
_REPLACED = " with `chat_template`"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A language model's tokenizer and chat template.

    Attributes:
        tokenizer: the tokenizer, without truncation and padding.
        template: the model's chat template, in Jinja; None if it has none.
        special: `bos_token`, `eos_token` and so on, as variables of the template.
        stop_ids: the ids that end an answer.
        where: the path it was read from, for error messages.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> words = Tokenizer(models.WordLevel({"?": 0, "user": 1, ":": 2, "tea": 3, "bot": 4}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}bot:"
    >>> tokenizer = ChatTokenizer(words, template, {}, (0,), "./tiny")
    >>> messages = [{"role": "user", "content": "tea"}]
    >>> tokenizer.render(messages), tokenizer.encode_chat(messages)
    ('user: tea bot:', [1, 2, 3, 4, 2])
    >>> tokenizer.encode("tea"), tokenizer.decode([3, 1])
    ([3], 'tea user')
    """

    tokenizer: Tokenizer
    template: str | None
    special: Mapping[str, str]
    stop_ids: tuple[int, ...]
    where: str

    @cached_property
    def size(self) -> int:
        """The highest id plus one."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """The ids that `decode` skips."""
        return frozenset(id for id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str) -> list[int]:
        """The ids of a plain prompt, with the special tokens that the tokenizer adds (often a BOS token)."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids of messages, rendered by the chat template. The template writes the special tokens; none are added.

        Args: as for `render`.
        """
        return self._encode(self.render(messages, add_generation_prompt, **variables), add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ChatError(
                f"the prompt is not valid Unicode: half a surrogate pair at character {error.start}"
            ) from None
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids if text else []
        if not ids:
            raise ChatError(f"the prompt {text[:40]!r} has no tokens; give some text")
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids, without special tokens.

        Raises:
            ChatError: the tokenizer does not have an id.
        """
        return self.tokenizer.decode([self._check_id(id) for id in ids], skip_special_tokens=True)

    def _check_id(self, id: SupportsIndex) -> int:
        """The id as an int. Raises a `ChatError` if the tokenizer does not have it."""
        number = operator.index(id)
        if not 0 <= number < self.size or self.tokenizer.id_to_token(number) is None:
            raise ChatError(f"{self.where}: the tokenizer has no id {number}; its ids are 0 to {self.size - 1}")
        return number

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of messages, rendered by the chat template.

        Args:
            messages: each with a `role` and a `content`, a text or a list of text parts; the template may use other
                keys. A message with `tool_calls` may have no content.
            add_generation_prompt: end with the beginning of the assistant's turn.
            variables: other variables of the template, such as `tools` or `enable_thinking`.

        Raises:
            ChatError: there is no template, a message is malformed, or the template fails.
        """
        return self.program.run(self.check(messages), add_generation_prompt, {**self.special, **variables})[0]

    def check(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as templates take them: lists of content parts become text.

        Raises:
            ChatError: there is no template, or a message is malformed.
        """
        roles = list(dict.fromkeys([*ROLES, *self.program.roles]))
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ChatError('no messages; expected a list such as [{"role": "user", "content": "Hello"}]')
        checked = []
        for index, message in enumerate(messages):
            calls = isinstance(message, Mapping) and bool(message.get("tool_calls"))
            if not isinstance(message, Mapping) or "role" not in message or not ("content" in message or calls):
                raise ChatError(f"message {index}: expected an object with 'role' and 'content', got {message!r:.60}")
            if message["role"] not in roles:
                raise ChatError(f"message {index}: the role is {message['role']!r:.40}, expected {', '.join(roles)}")
            content = message.get("content")
            if isinstance(content, list):
                try:
                    message = {**message, "content": plain_text(content)}
                except ValueError as error:
                    raise ChatError(f"message {index}: 'content' {error}") from None
            elif not isinstance(content, str) and not (content is None and calls):
                raise ChatError(f"message {index}: 'content' must be text, got {content!r:.40}")
            checked.append(message)
        return checked

    @cached_property
    def program(self) -> Template:
        """The chat template. Raises a `ChatError` if there is none."""
        if not self.template:
            raise ChatError(
                f"{self.where}: no chat template, so not a chat model; give a plain prompt (jpeft generate --raw)"
            )
        return Template(self.template, self.where)

    @cached_property
    def stop_tokens(self) -> tuple[str, ...]:
        """The tokens that end an answer, as text."""
        known = (self.tokenizer.id_to_token(id) for id in self.stop_ids if id < self.size)
        return tuple(token for token in known if token)

    def with_template(self, template: str | None) -> ChatTokenizer:
        """The same tokenizer with another chat template; None keeps its own.

        Raises:
            ChatError: the template is not valid Jinja.

        >>> tokenizer.with_template("{{ messages[0].content }}").encode_chat(messages)  # doctest: +SKIP
        """
        if template is None:
            return self
        model = self.where.removesuffix(_REPLACED)
        changed = replace(self, template=template, where=f"{model}{_REPLACED}")
        changed.program.variables  # noqa: B018 (reports syntax errors)
        return changed


class Stream:
    """Decodes ids to text one by one.

    The pieces of text together equal `decode` of all ids. Text is held back while it may still change: inside a
    character, and with SentencePiece throughout a run of byte tokens, all of which become U+FFFD if one is wrong.

    >>> stream = Stream(tokenizer)  # doctest: +SKIP
    >>> [stream.push(id) for id in tokenizer.encode("tea 🫖!")] + [stream.finish()]  # doctest: +SKIP
    ['tea', ' ', '', '', '🫖', '!', '']
    """

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer
        # A token's text may depend on whether another precedes it, so the ids of the last piece are decoded again.
        self._window: list[int] = []  # the ids of the last piece of text, and those pushed since
        self._since: list[int] = []  # the ids pushed since the last piece
        self._returned = 0  # characters of the window's text that were returned

    def push(self, id: SupportsIndex) -> str:
        """The text that this id completes; empty if it may still change.

        Raises:
            ChatError: the tokenizer does not have the id.
        """
        number = self._tokenizer._check_id(id)
        if number in self._tokenizer._special_ids:
            return ""
        self._window.append(number)
        self._since.append(number)
        text = self._tokenizer.decode(self._window)
        if text.endswith("\ufffd") or _BYTE_TOKEN.fullmatch(self._tokenizer.tokenizer.id_to_token(number) or ""):
            return ""
        new, self._returned = text[self._returned :], len(text)
        if again := self._tokenizer.decode(self._since):  # if empty, the next token would seem the first
            self._window, self._returned = self._since, len(again)
        self._since = []
        return new

    def finish(self) -> str:
        """The text that was held back. The stream can be used again."""
        rest = self._tokenizer.decode(self._window)[self._returned :]
        self._window, self._since, self._returned = [], [], 0
        return rest


def check_vocabulary(tokenizer: ChatTokenizer, rows: int) -> None:
    """Raises a `ChatError` if the tokenizer has ids beyond the rows of the model's embedding.

    >>> check_vocabulary(tokenizer, params["embed_tokens"]["embedding"].shape[0])  # doctest: +SKIP
    """
    last = tokenizer.size - 1
    if last >= rows:
        raise ChatError(
            f"{tokenizer.where}: the tokenizer gives {tokenizer.tokenizer.id_to_token(last)!r} the id {last}, but the "
            f"embedding has {rows} rows: the tokenizer belongs to another model, or tokens were added to it (jpeft "
            "finetune --resize-embeddings trains rows for them)"
        )


# ---------------------------------------------------------------------------------------------------------- reading


def read(path: str | Path) -> ChatTokenizer:
    """Reads the tokenizer and the chat template of a HuggingFace folder or a .gguf file.

    Raises:
        UserError: the path or its tokenizer does not exist, or a file is malformed; the message names it.

    >>> read("./SmolLM2-135M-Instruct").stop_ids  # doctest: +SKIP
    (2,)
    """
    path = as_path(path)
    if path.is_dir():
        tokenizer = _read_folder(path)
    elif path.is_file() and path.suffix.lower() == ".gguf":
        tokenizer = _read_gguf(path)
    else:
        found = "not a model" if path.exists() else "no such path"
        raise ChatError(f"{path}: {found}; expected a HuggingFace folder or a .gguf file")
    inner = tokenizer.tokenizer
    inner.no_truncation()
    inner.no_padding()
    # As transformers does: a token named in the model's files is recognized in text, and skipped by `decode`.
    named = {id: token for token in tokenizer.special.values() if (id := inner.token_to_id(token)) is not None}
    known = inner.get_added_tokens_decoder()
    inner.add_special_tokens([named[id] for id in named if id not in known or not known[id].special])
    return tokenizer


def _read_gguf(path: Path) -> ChatTokenizer:
    from jpeft.models import gguf

    file = gguf.open_file(path)
    special, template = gguf.read_special_tokens(file), gguf.read_chat_template(file)
    return ChatTokenizer(gguf.read_tokenizer(file), template, special, gguf.stop_ids(file), str(path))


def _read_folder(folder: Path) -> ChatTokenizer:
    tokenizer = reading.load_tokenizer(folder, max_length=1 << 31)  # `read` removes the truncation
    config = _read_optional_json(folder / "tokenizer_config.json")
    special = _special(config)
    if "added_tokens_decoder" not in config:  # before transformers 4.34 the map took precedence; since, it is ignored
        special |= _special(_read_optional_json(folder / "special_tokens_map.json"))
    stop_ids = _stop_ids(folder)
    if (eos := tokenizer.token_to_id(special.get("eos_token", ""))) is not None and eos not in stop_ids:
        stop_ids.append(eos)
    return ChatTokenizer(tokenizer, _read_template(folder, config), special, tuple(stop_ids), str(folder))


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    """The entries like `"eos_token": "</s>"` or `"eos_token": {"content": "</s>", …}`."""
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}  # `add_bos_token` is a bool


def _stop_ids(folder: Path) -> list[int]:
    """The `eos_token_id`s of all configs. A chat model's turn often ends with another token than a document."""
    stop_ids = []
    for name in ("generation_config.json", "config.json"):
        config = _read_optional_json(folder / name)
        inner = config.get("text_config")  # of models that also take images
        for owner in (config, inner if isinstance(inner, dict) else {}):
            value = owner.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(type(id) is not int for id in ids):
                raise ChatError(f"{folder / name}: eos_token_id must be an id or a list of ids, got {value!r:.40}")
            stop_ids += [id for id in ids if id >= 0]  # -1 means none
    return list(dict.fromkeys(stop_ids))


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / TEMPLATE
    if path.is_file():
        try:
            return path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ChatError(f"{path}: not UTF-8 (byte offset {error.start})") from error
    path, template = folder / "tokenizer_config.json", config.get("chat_template")
    if template is None:  # a processor's file, whose template the tokenizer shares
        path = folder / "chat_template.json"
        template = _read_optional_json(path).get("chat_template")
    if isinstance(template, list) and all(isinstance(each, dict) for each in template):
        named = {str(each.get("name")): each.get("template") for each in template}
        if "default" not in named:
            raise ChatError(
                f"{path}: the chat templates are {', '.join(named) or 'none'}; expected one named 'default'"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ChatError(f"{path}: chat_template must be text or a list of named templates, got {template!r:.40}")
    return template


def _read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return read_json(path, ChatError) if path.is_file() else {}
