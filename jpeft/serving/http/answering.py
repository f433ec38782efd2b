"""Requests to an engine from what a client asks for, and their texts as they come."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from jpeft.errors import UserError
from jpeft.serving.engine import Engine
from jpeft.serving.http.bodies import Ask, Choice
from jpeft.serving.http.errors import HTTPError
from jpeft.serving.http.texts import TextUntil
from jpeft.serving.request import ERROR, LENGTH, STOP, ClosedError, QueueFullError, Request
from jpeft.serving.sampling import GenerationError
from jpeft.text.chat_template import ChatTokenizer

_MANY = 128  # choices that one call may ask for


@dataclass(frozen=True)
class Served:
    """What a server serves.

    Attributes:
      engine: the engine.
      tokenizer: the model's tokenizer.
      base: the name of the model without an adapter.
    """

    engine: Engine
    tokenizer: ChatTokenizer
    base: str

    def names(self) -> list[str]:
        """The names that a client may give as its model: the base's and the adapters'."""
        return [self.base, *(self.engine.bank.names if self.engine.bank is not None else ())]

    def encode(self, ask: Ask) -> list[list[int]]:
        """The token ids of each prompt.

        Raises:
          HTTPError: the messages or prompts cannot be encoded (400).
        """
        try:
            if ask.messages is not None:
                return [self.tokenizer.encode_chat(ask.messages)]
            return [self.tokenizer.encode(p) if isinstance(p, str) else p for p in ask.prompts]
        except UserError as error:
            raise HTTPError(400, str(error), "messages" if ask.chat else "prompt") from error

    def submit(self, ask: Ask, listener: Any) -> list[Request]:
        """Submits a request for each choice; all of them, or none.

        Raises:
          HTTPError: there is no such model (404), the queue is full (429), the engine is closed (503), or a prompt or a
            setting cannot be (400).
        """
        if ask.model not in self.names():
            names = ", ".join(map(repr, self.names()[:20]))
            raise HTTPError(404, f"the model {ask.model!r} does not exist; there are {names}", "model")
        prompts = self.encode(ask)
        self._check_number(len(prompts) * ask.n, "n" if ask.n > 1 else "prompt")
        calls = []
        for ids in prompts:
            seed = secrets.randbits(62) if ask.seed is None else ask.seed
            calls += [self._call(ask, ids, seed + i, listener) for i in range(ask.n)]
        return self._submit(ask, calls)

    def _check_number(self, choices: int, param: str) -> None:
        """Raises an error for more choices than the engine ever has room for."""
        most = _MANY if self.engine.most is None else min(_MANY, self.engine.most)
        if choices > most:
            why = "" if most == _MANY else ", as many as run and wait at once"
            raise HTTPError(400, f"{choices} choices in one call; this server takes at most {most}{why}", param)

    def _call(self, ask: Ask, ids: Sequence[int], seed: int, listener: Any) -> dict[str, Any]:
        """The arguments of a request to the engine."""
        room = max(1, self.engine.capacity - len(ids))
        return {
            "prompt": ids,
            "adapter": None if ask.model == self.base else ask.model,
            "max_new_tokens": room if ask.max_tokens is None else ask.max_tokens,
            "temperature": ask.temperature,
            "top_k": ask.top_k,
            "top_p": ask.top_p,
            "stop_ids": self.tokenizer.stop_ids,
            "seed": seed,
            "listener": listener,
        }

    def _submit(self, ask: Ask, calls: Sequence[dict[str, Any]]) -> list[Request]:
        try:
            return self.engine.submit_many(calls)
        except QueueFullError as error:
            raise HTTPError(429, f"the server is busy: {error}; try again later") from error
        except ClosedError as error:
            raise HTTPError(503, "the server is stopping") from error
        except GenerationError as error:
            # The field has another name here.
            raise HTTPError(400, str(error).replace("max_new_tokens", "max_tokens")) from error
        except ValueError as error:  # unloaded meanwhile, or a base that has no place in the bank
            raise HTTPError(404 if ask.model not in self.names() else 400, str(error), "model") from error


def cancel(requests: Sequence[Request]) -> None:
    """Ends requests whose answers nobody waits for."""
    for request in requests:
        request.cancel()


class Texts:
    """The texts of some requests as their tokens come, in an event loop.

    Attributes:
      requests: the requests, once they are submitted.
    """

    def __init__(self, tokenizer: ChatTokenizer, ask: Ask):
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._tokenizer, self._ask = tokenizer, ask
        self.requests: list[Request] = []
        self._until: list[TextUntil] = []
        self._reasons: list[str | None] = []

    def listen(self, request: Request) -> None:
        """Takes notice of news, from the engine's thread."""
        self._loop.call_soon_threadsafe(self._news.set)

    async def pieces(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, str, str | None]]:
        """The index of a choice, its next piece of text, and in its last piece the reason for its end.

        Raises:
          HTTPError: a request failed (500), or was cancelled as the server stopped (503).
        """
        self.requests = list(requests)
        self._until = [TextUntil(self._tokenizer, self._ask.stop) for _ in requests]
        self._reasons = [None] * len(requests)
        while None in self._reasons:
            self._news.clear()
            found = [self._next(i) for i, reason in enumerate(self._reasons) if reason is None]
            for index, text, reason in found:
                if text or reason is not None:
                    yield index, text, reason
            if None in self._reasons:
                await self._news.wait()

    def _next(self, index: int) -> tuple[int, str, str | None]:
        request, until = self.requests[index], self._until[index]
        done = request.done  # before its tokens are read: none comes after
        text = until.push(request.tokens[until.count :])
        if until.ended:
            request.cancel()
            reason = STOP
        elif done:
            text += until.finish()
            reason = STOP if until.ended else _reason(request)
        else:
            return index, text, None
        self._reasons[index] = reason
        return index, text, reason

    def choices(self, texts: Sequence[str]) -> list[Choice]:
        """The choices, once all have ended."""
        found = zip(texts, self.requests, self._until, self._reasons, strict=True)
        return [Choice(text, str(why), request.prompt.size, until.count) for text, request, until, why in found]


def _reason(request: Request) -> str:
    if request.finish_reason in (STOP, LENGTH):
        return str(request.finish_reason)
    if request.finish_reason == ERROR:
        raise HTTPError(500, str(request.error)) from request.error
    raise HTTPError(503, "the server is stopping")
