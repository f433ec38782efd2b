"""Between text and the token ids of a causal language model: prompts, chat templates, and answers as they come.

    codec = read("./SmolLM2-135M-Instruct")     # a HuggingFace folder, or a .gguf file
    ids = codec.encode_chat([{"role": "user", "content": "Why is the sky blue?"}])
    stream = Stream(codec)
    for id in generate(ids, stop=codec.stop_ids):
        print(stream.push(id), end="", flush=True)
    print(stream.finish())

A chat template is a Jinja program inside the model's files. It runs in Jinja's sandbox, in the environment that
transformers gives it, so that both render the same text.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from jpeft.errors import UserError
from jpeft.files import read_json
from jpeft.text import reading

if TYPE_CHECKING:
    import jinja2
    from tokenizers import Tokenizer

_ROLES = ("system", "user", "assistant", "tool")
# A role that a template asks about by name, such as `message.role == "ipython"`, may be used with it too.
_ROLE_IN_TEMPLATE = re.compile(r"""role['"]?\]?\s*==\s*['"](\w+)['"]""")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ANSWERS = "_jpeft_answers"  # the template variable in which the answers' spans are gathered
# More than any model's context holds. It ends templates that loop; one that loops without output only the user can end.
_MAX_CHARACTERS = 1 << 25
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")

Message = Mapping[str, Any]
Span = tuple[int, int]


class ChatError(UserError):
    """A tokenizer, a chat template or messages that cannot be used; one line says why."""


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        tokenizer: neither cuts nor pads.
        template: the model's own chat template, in Jinja; None where it has none.
        special: `bos_token`, `eos_token` and so on, as the template sees them.
        stop_ids: the ids that end an answer.
        where: the path it was read from, for errors.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> tokenizer = Tokenizer(models.WordLevel({"?": 0, "user": 1, ":": 2, "tea": 3, "bot": 4}, unk_token="?"))
    >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}bot:"
    >>> codec = ChatTokenizer(tokenizer, template, {}, (0,), "./tiny")
    >>> messages = [{"role": "user", "content": "tea"}]
    >>> codec.render(messages), codec.encode_chat(messages), codec.encode("tea"), codec.decode([3, 1])
    ('user: tea bot:', [1, 2, 3, 4, 2], [3], 'tea user')
    """

    tokenizer: Tokenizer
    template: str | None
    special: Mapping[str, str]
    stop_ids: tuple[int, ...]
    where: str

    @cached_property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out."""
        return frozenset(id for id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str) -> list[int]:
        """The ids of a plain prompt, with what the tokenizer itself puts around it (often a BOS token)."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids of rendered messages: the template has put the special tokens, none are added."""
        return self._encode(self.render(messages, add_generation_prompt, **variables), add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ChatError(
                f"the prompt is no Unicode text: half a surrogate pair at character {error.start}"
            ) from None
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids if text else []
        if not ids:
            raise ChatError(f"the prompt {text[:40]!r} is empty, or nothing to the tokenizer; give some text")
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids, without special tokens. An id that the tokenizer does not have is a `ChatError`."""
        return self.tokenizer.decode([self._check_id(id) for id in ids], skip_special_tokens=True)

    def _check_id(self, id: SupportsIndex) -> int:
        """The id as an int, if the tokenizer has it."""
        number = operator.index(id)
        if not 0 <= number < self.size or self.tokenizer.id_to_token(number) is None:
            raise ChatError(f"{self.where}: the tokenizer has no id {number}; its ids are 0 to {self.size - 1}")
        return number

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text that the template makes of messages.

        Args:
            messages: each with a `role` and a `content`, both texts; other keys are for the template.
            add_generation_prompt: end with the head of an answer.
            variables: what else the template knows, such as `tools` or `enable_thinking`.

        Raises:
            ChatError: there is no template, a message is malformed, or the template refuses or fails.
        """
        self._check(messages)
        return self._run(messages, add_generation_prompt, variables)[0]

    def render_with_spans(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[Span]]:
        """The text of a whole conversation, and where in it the assistant's answers lie, as `(start, end)`.

        The template marks them by `{% generation %}`. For one that does not, an answer is what follows the rendering
        of the messages before it, up to the token that ends it; it must stand there unchanged.

        Raises:
            ChatError: as `render`, or the answers' places cannot be told.

        >>> codec.render_with_spans(tea_and_yes)  # doctest: +SKIP
        ('<user>Tea?</s><assistant>Yes</s>', [(25, 32)])
        """
        self._check(messages)
        text, spans = self._run(messages, False, variables)
        if _GENERATION.search(self.template or ""):
            return text, spans
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._span(text, messages, index, variables) for index in answers]

    def _span(self, text: str, messages: Sequence[Message], index: int, variables: Mapping[str, Any]) -> Span:
        before, _ = self._run(messages[:index], True, variables)
        after, _ = self._run(messages[: index + 1], False, variables)
        if not after.startswith(before):
            raise ChatError(
                f"{self.where}: message {index}: the chat template asks for an answer otherwise than it renders one, "
                "so where the answer begins cannot be told; mark it in the template by {% generation %}"
            )
        if not text.startswith(after):
            raise ChatError(
                f"{self.where}: message {index}: the chat template renders an answer otherwise once more messages "
                "follow; end the conversation with it, or mark answers in the template by {% generation %}"
            )
        answer = after[len(before) :]
        stops = [token for id in self.stop_ids if id < self.size and (token := self.tokenizer.id_to_token(id))]
        end = max((answer.rfind(token) + len(token) for token in stops if token in answer), default=len(answer))
        blank = not answer[end:].strip()  # a line break behind the stop token, which no model ever writes
        return len(before), len(before) + (end if blank else len(answer))

    def _check(self, messages: Sequence[Message]) -> None:
        if not self.template:
            raise ChatError(
                f"{self.where}: no chat template, so no chat model; give a plain prompt instead (jpeft generate --raw)"
            )
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ChatError('no messages; expected a list such as [{"role": "user", "content": "Hello"}]')
        roles = list(dict.fromkeys([*_ROLES, *_ROLE_IN_TEMPLATE.findall(self.template)]))
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise ChatError(f"message {index}: expected an object with 'role' and 'content', found {message!r:.60}")
            if message["role"] not in roles:
                raise ChatError(f"message {index}: the role {message['role']!r:.40} is none of {', '.join(roles)}")
            if not isinstance(message["content"], str):
                raise ChatError(f"message {index}: 'content' should be a text, found {message['content']!r:.40}")

    def _run(
        self, messages: Sequence[Message], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> tuple[str, list[Span]]:
        """The rendered text, and the spans that the template marks in it."""
        import jinja2

        pieces, size, marked = [], 0, []
        ours = {"messages": messages, "add_generation_prompt": add_generation_prompt, _ANSWERS: (pieces, marked)}
        try:
            for piece in self._jinja.generate({"tools": None, "documents": None, **self.special, **variables, **ours}):
                pieces.append(piece)
                size += len(piece)
                if size > _MAX_CHARACTERS:
                    raise ChatError(f"{self.where}: the chat template wrote more than {_MAX_CHARACTERS} characters")
        except ChatError:
            raise
        except Exception as error:  # a template can raise whatever Python's operators and methods do
            said = " ".join(str(error).split())[:300]
            if type(error) is jinja2.TemplateError:  # its own `raise_exception`
                raise ChatError(f"{self.where}: the chat template refuses the messages: {said}") from error
            raise ChatError(f"{self.where}: the chat template failed ({type(error).__name__}: {said})") from error
        text = "".join(pieces)
        if any(not text.startswith(answer, start) for start, answer in marked):
            raise ChatError(f"{self.where}: {{% generation %}} stands in a macro or a block, its place cannot be told")
        return text, [(start, start + len(answer)) for start, answer in marked]

    @cached_property
    def _jinja(self) -> jinja2.Template:
        import jinja2

        try:
            return _environment().from_string(self.template or "")
        except (jinja2.TemplateError, RecursionError) as error:
            said = " ".join(str(error).split())[:300]
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ChatError(f"{self.where}: the chat template is not Jinja{line}: {said}") from error


def _environment() -> jinja2.Environment:
    """What transformers gives to chat templates (`utils/chat_template_utils.py`)."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}…{% endgeneration %}` around an answer: notes where it begins and what it is."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance's)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

        @jinja2.pass_context
        def _note(self, context: Any, caller: Any) -> str:
            answer = caller()
            pieces, marked = context[_ANSWERS]
            marked.append((sum(map(len, pieces)), answer))
            return answer

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        """Unlike Jinja's own, it leaves the characters of HTML as they are."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.LoopControlExtension]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


class Stream:
    """Ids to text, one by one: what has been given out is never taken back, and all of it together is `decode`'s.

    Text is held back while it may still change: in the middle of a character, and with SentencePiece throughout a run
    of byte tokens, all of which become U+FFFD if one is wrong.

    >>> stream = Stream(codec)  # doctest: +SKIP
    >>> [stream.push(id) for id in codec.encode("tea 🫖!")] + [stream.finish()]  # doctest: +SKIP
    ['tea', ' ', '', '', '🫖', '!', '']
    """

    def __init__(self, codec: ChatTokenizer):
        self._codec = codec
        self._window: list[int] = []  # the ids of the text last given out, and those since: a token's text may depend
        self._since: list[int] = []  # on whether one stands before it, so the former are decoded again
        self._given = 0  # how much of the window's text was given out

    def push(self, id: SupportsIndex) -> str:
        """The text that is certain now and was not before. An id that the tokenizer does not have is a `ChatError`."""
        number = self._codec._check_id(id)
        if number in self._codec._special_ids:
            return ""
        self._window.append(number)
        self._since.append(number)
        text = self._codec.decode(self._window)
        if text.endswith("\ufffd") or _BYTE_TOKEN.fullmatch(self._codec.tokenizer.id_to_token(number) or ""):
            return ""
        new, self._given = text[self._given :], len(text)
        if again := self._codec.decode(self._since):  # where these give nothing, the next would be taken for the first
            self._window, self._given = self._since, len(again)
        self._since = []
        return new

    def finish(self) -> str:
        """What was held back. The stream is then as new."""
        rest = self._codec.decode(self._window)[self._given :]
        self._window, self._since, self._given = [], [], 0
        return rest


def check_vocabulary(codec: ChatTokenizer, rows: int) -> None:
    """Raises a `ChatError` where the tokenizer has ids for which the model's embedding has no row.

    >>> check_vocabulary(codec, params["embed_tokens"]["embedding"].shape[0])  # doctest: +SKIP
    """
    if codec.size > rows:
        token = codec.tokenizer.id_to_token(codec.size - 1)
        raise ChatError(
            f"{codec.where}: the tokenizer gives {token!r} the id {codec.size - 1}, but the embedding has {rows} rows: "
            "the tokenizer belongs to another model"
        )


# ---------------------------------------------------------------------------------------------------------- reading


def read(path: str | Path) -> ChatTokenizer:
    """The codec of a HuggingFace folder or of a .gguf file.

    Raises:
        UserError: there is no such path or no tokenizer in it, or a file cannot be understood; it is named.

    >>> read("./SmolLM2-135M-Instruct").stop_ids  # doctest: +SKIP
    (2,)
    """
    path = Path(path)
    if path.is_dir():
        codec = _read_folder(path)
    elif path.is_file() and path.suffix.lower() == ".gguf":
        codec = _read_gguf(path)
    else:
        found = "is another file" if path.exists() else "no such path"
        raise ChatError(f"{path}: {found}; expected a HuggingFace folder or a .gguf file")
    codec.tokenizer.no_truncation()
    codec.tokenizer.no_padding()
    # As transformers does: a token that the model's files name is found in a text, and left out of an answer.
    named = {id: token for token in codec.special.values() if (id := codec.tokenizer.token_to_id(token)) is not None}
    known = codec.tokenizer.get_added_tokens_decoder()
    codec.tokenizer.add_special_tokens([named[id] for id in named if id not in known or not known[id].special])
    return codec


def _read_gguf(path: Path) -> ChatTokenizer:
    from jpeft.models import gguf, gguf_file

    file = gguf_file.open_file(path)
    special, template = gguf.read_special(file), gguf.read_chat_template(file)
    return ChatTokenizer(gguf.read_tokenizer(file), template, special, gguf.stop_ids(file), str(path))


def _read_folder(folder: Path) -> ChatTokenizer:
    tokenizer = reading.load_tokenizer(folder, max_length=1 << 31)  # any: the cut is taken off again
    config = _read_optional_json(folder / "tokenizer_config.json")
    special = _special(config)
    if "added_tokens_decoder" not in config:  # before transformers 4.34 the map had the last word, now none
        special |= _special(_read_optional_json(folder / "special_tokens_map.json"))
    stop_ids = _stop_ids(folder)
    if (eos := tokenizer.token_to_id(special.get("eos_token", ""))) is not None and eos not in stop_ids:
        stop_ids.append(eos)
    return ChatTokenizer(tokenizer, _read_template(folder, config), special, tuple(stop_ids), str(folder))


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    """The entries such as `"eos_token": "</s>"` or `"eos_token": {"content": "</s>", …}`."""
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}  # `add_bos_token` is a bool


def _stop_ids(folder: Path) -> list[int]:
    """`eos_token_id`, one or a list, of all the configs: a chat model's turn often ends otherwise than a document."""
    stop_ids = []
    for name in ("generation_config.json", "config.json"):
        config = _read_optional_json(folder / name)
        inner = config.get("text_config")  # of a model that also takes images
        for owner in (config, inner if isinstance(inner, dict) else {}):
            value = owner.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(type(id) is not int for id in ids):
                raise ChatError(f"{folder / name}: eos_token_id should be an id or a list of ids, found {value!r:.40}")
            stop_ids += [id for id in ids if id >= 0]  # -1 stands for none
    return list(dict.fromkeys(stop_ids))


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ChatError(f"{path}: not UTF-8 (byte offset {error.start})") from error
    path, template = folder / "tokenizer_config.json", config.get("chat_template")
    if template is None:  # of a processor, which the tokenizer shares
        path = folder / "chat_template.json"
        template = _read_optional_json(path).get("chat_template")
    if isinstance(template, list) and all(isinstance(each, dict) for each in template):
        named = {str(each.get("name")): each.get("template") for each in template}
        if "default" not in named:
            raise ChatError(f"{path}: the chat templates are {', '.join(named) or 'none'}; expected one named default")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ChatError(f"{path}: chat_template should be a text or a list of named ones, found {template!r:.40}")
    return template


def _read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return read_json(path, ChatError) if path.is_file() else {}
