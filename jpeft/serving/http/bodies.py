"""Bodies of OpenAI's interface: what a client asks for, and what it gets."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jpeft.checks import Rule, is_int, is_number, nearest, shown
from jpeft.serving.http.errors import HTTPError

_INTEGER: Rule = (lambda value: is_int(value) and value > 0, "a positive integer")
_TEXT: Rule = (lambda value: isinstance(value, str), "a text")
_OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
_STOPS: Rule = (
    lambda value: isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)),
    "a text or a list of texts",
)
_RULES: Mapping[str, Rule] = {
    "model": _TEXT,
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "stream_options": _OBJECT,
    "max_tokens": _INTEGER,
    "max_completion_tokens": _INTEGER,
    "temperature": (lambda value: is_number(value) and value >= 0, "a number of at least 0"),
    "top_p": (lambda value: is_number(value) and 0 < value <= 1, "above 0 and at most 1"),
    "top_k": (lambda value: is_int(value) and (value > 0 or value == -1), "a positive integer, or -1 for all"),
    "seed": (lambda value: is_int(value) and 0 <= value < 1 << 63, "an integer from 0 to 2^63 - 1"),
    "stop": _STOPS,
    "n": _INTEGER,
}
# Fields that change nothing here, and those that must have the value that changes nothing.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_OFF: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (None, False), "top_logprobs": (None, 0), "tools": (None, []), "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}), "logit_bias": (None, {}), "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0), "best_of": (None, 1), "echo": (None, False), "suffix": (None, ""),
    "functions": (None, []), "modalities": (None, ["text"]), "parallel_tool_calls": (None, False, True),
    "reasoning_effort": (None,),
}  # fmt: skip
_CHAT, _COMPLETION = "chat.completion", "text_completion"


@dataclass(frozen=True)
class Ask:
    """What a client asks for.

    Attributes:
      model: the name of an adapter, or of the base.
      messages: the messages of a chat; None for a completion.
      prompts: the prompts of a completion, texts or token ids.
      stream: whether the answer comes in pieces.
      usage: whether a stream ends with the number of tokens.
      max_tokens: the most tokens.
      temperature, top_p, top_k: see `jpeft.generate`.
      seed: the seed of the first choice; None: one at random.
      stop: texts that end an answer, which it does not contain.
      n: the number of choices for each prompt.
    """

    model: str
    messages: Sequence[Any] | None
    prompts: Sequence[str | list[int]]
    stream: bool
    usage: bool
    max_tokens: int | None
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: tuple[str, ...]
    n: int

    @property
    def chat(self) -> bool:
        """Whether it is a chat."""
        return self.messages is not None


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body. Raises an `HTTPError` with the status 400 for anything else.

    >>> read_json(b'{"model": "a"}')
    {'model': 'a'}
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPError(400, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise HTTPError(400, f"the body must be a JSON object, got {type(found).__name__}")
    for name, value in found.items():
        if not _is_unicode(name):
            raise HTTPError(400, f"the field {shown(name, 40)} is not valid Unicode: it has half a surrogate pair")
        if not _is_unicode(value):
            raise HTTPError(400, f"`{name}` is not valid Unicode: it has half a surrogate pair", name)
    return found


def _is_unicode(value: Any) -> bool:
    """Whether all texts in a value can be sent: JSON may escape half a surrogate pair, which has no UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except RecursionError:
        raise HTTPError(400, "the body has too many levels") from None
    return True


def read_ask(body: Mapping[str, Any], chat: bool) -> Ask:
    """What the body of a chat or a completion asks for.

    Raises:
      HTTPError: a field is unknown, missing, wrong, or asks for what there is not (400).

    >>> read_ask({"model": "fr", "prompt": "tea", "max_tokens": 5}, chat=False).prompts
    ['tea']
    """
    own = "messages" if chat else "prompt"
    _check_fields(body, {own, *_RULES, *_IGNORED, *_OFF})
    for name in ("model", own):
        if name not in body:
            raise HTTPError(400, f"`{name}` is missing", name)
    given = {name: body.get(name) for name in _RULES}
    most, stop, top_k = given["max_completion_tokens"] or given["max_tokens"], given["stop"], given["top_k"]
    if not chat and most is None:
        most = 16  # OpenAI's default
    return Ask(
        model=body["model"],
        messages=_messages(body["messages"]) if chat else None,
        prompts=[] if chat else _prompts(body["prompt"]),
        stream=bool(given["stream"]),
        usage=bool((given["stream_options"] or {}).get("include_usage")),
        max_tokens=most,
        temperature=1.0 if given["temperature"] is None else given["temperature"],
        top_p=given["top_p"],
        top_k=None if top_k == -1 else top_k,
        seed=given["seed"],
        stop=tuple(text for text in ([stop] if isinstance(stop, str) else stop or []) if text),
        n=given["n"] or 1,
    )


def _check_fields(body: Mapping[str, Any], known: Collection[str]) -> None:
    for name, value in body.items():
        if name not in known:
            raise HTTPError(400, f"unknown field {shown(name, 40)}{nearest(name, known)}", name)
        accepts, expected = _RULES.get(name, (lambda value: True, ""))
        if not (value is None or accepts(value)) or (name == "model" and value is None):
            raise HTTPError(400, f"`{name}` must be {expected}, got {shown(value, 60)}", name)
        if name in _OFF and not any(type(value) is type(off) and value == off for off in _OFF[name]):
            if is_number(value) and value == 0:
                continue
            raise HTTPError(400, f"`{name}` {shown(value, 40)}: this server has no {name}; leave it out", name)


def _messages(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise HTTPError(400, f"`messages` must be a list of one or more messages, got {shown(value, 40)}", "messages")
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    """A prompt, or several: each a text or a list of token ids."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if isinstance(prompts, list) and prompts and all(isinstance(v, str) or _is_ids(v) for v in prompts):
        for id in (id for prompt in prompts if not isinstance(prompt, str) for id in prompt):
            if id.bit_length() > 31:  # an array of ids could not hold it
                raise HTTPError(400, f"`prompt` has the token id {shown(id, 40)}, which no vocabulary has", "prompt")
        return prompts
    raise HTTPError(400, f"`prompt` must be texts or lists of token ids, got {shown(value, 40)}", "prompt")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_int, value))


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A choice of an answer: its text, why it ended, and the tokens that it took."""

    text: str
    reason: str
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Answer:
    """The form of an answer, whole or in pieces.

    Attributes:
      ask: what was asked for.
      id: the answer's name.
      created: when, in seconds.
    """

    ask: Ask
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of a whole answer."""
        found = []
        for index, choice in enumerate(choices):
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            text = {"message": message} if self.ask.chat else {"text": choice.text}
            found.append({"index": index, **text, "logprobs": None, "finish_reason": choice.reason})
        return self._body(_CHAT if self.ask.chat else _COMPLETION, found) | {"usage": usage(choices, self.ask.n)}

    def first(self, index: int) -> dict[str, Any] | None:
        """The piece that begins a choice of a chat, with its role."""
        return self._piece(index, {"role": "assistant", "content": ""}, None) if self.ask.chat else None

    def piece(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        """A piece of a choice; the last one has the reason for its end."""
        delta: Any = text
        if self.ask.chat:
            delta = {"content": text} if text or reason is None else {}
        return self._piece(index, delta, reason)

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The piece with the number of tokens, after all choices."""
        return self._body(self._kind, []) | {"usage": usage(choices, self.ask.n)}

    @property
    def _kind(self) -> str:
        return f"{_CHAT}.chunk" if self.ask.chat else _COMPLETION

    def _piece(self, index: int, delta: Any, reason: str | None) -> dict[str, Any]:
        text = {"delta": delta} if self.ask.chat else {"text": delta}
        return self._body(self._kind, [{"index": index, **text, "logprobs": None, "finish_reason": reason}])

    def _body(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.ask.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.ask.model,
            "choices": choices,
        }  # fmt: skip


def usage(choices: Sequence[Choice], n: int = 1) -> dict[str, int]:
    """The tokens that choices took. Choices for one prompt, `n` in a row, share its tokens.

    >>> usage([Choice("a", "stop", 3, 1), Choice("b", "stop", 3, 2)], n=2)
    {'prompt_tokens': 3, 'completion_tokens': 3, 'total_tokens': 6}
    """
    prompt, new = sum(c.prompt_tokens for c in choices[::n]), sum(c.new_tokens for c in choices)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
