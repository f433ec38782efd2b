"""A request to an engine: what it asks for, and the tokens that come back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jpeft.serving.rows import NOTHING
from jpeft.serving.sampling import INVALID, GenerationError, Sampling

STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"


class QueueFullError(RuntimeError):
    """An engine's queue holds as many requests as it may; submit again later."""


class ClosedError(RuntimeError):
    """An engine that was closed takes no requests and no adapters."""


@dataclass(eq=False)
class Request:
    """A request to an engine: iterate over it for its new tokens, each as soon as there is one.

    An engine that was not started runs in the thread that iterates.

    Attributes:
      prompt: the token ids of the prompt.
      adapter: the name of its adapter; None: the base.
      limit: the most tokens to generate.
      tokens: the new tokens so far, with the stop id.
      finish_reason: "stop" at a stop id, "length" at the limit, "cancelled" or "error"; None while it runs.
      error: what went wrong, which iterating raises.

    >>> request = engine.submit([1, 17, 4], max_new_tokens=3)  # doctest: +SKIP
    >>> list(request), request.finish_reason  # doctest: +SKIP
    ([5, 9, 2], 'length')
    """

    prompt: np.ndarray
    adapter: str | None
    limit: int
    _engine: Any = field(repr=False)
    _number: int = field(repr=False)
    _sampling: Sampling = field(repr=False)
    _stops: frozenset[int] = field(repr=False)
    _bank: Any = field(repr=False)
    _slot: int = field(repr=False)
    _listener: Callable[[Request], None] | None = field(default=None, repr=False)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    _read: int = field(default=0, repr=False)  # tokens of the prompt in the cache

    @property
    def done(self) -> bool:
        """Whether no more tokens come."""
        return self.finish_reason is not None

    def __iter__(self) -> Iterator[int]:
        for i in itertools.count():
            self._engine.wait(lambda i=i: len(self.tokens) > i or self.done)
            if i < len(self.tokens):
                yield self.tokens[i]
            elif self.error is not None:
                raise self.error
            else:
                return

    def result(self) -> list[int]:
        """All new tokens, once the request is done.

        Raises:
          GenerationError: the model's logits are not finite.
        """
        return list(self)

    def cancel(self) -> None:
        """Ends the request now. Nothing happens to one that is done."""
        self._engine.cancel(self)

    # --- for the engine ---

    @property
    def _left(self) -> int:
        return self.prompt.size - self._read

    @property
    def _prompt_is_read(self) -> bool:
        return self._left == 0

    def _extend(self, tokens: list[int]) -> None:
        """Takes what was decoded, up to the request's end."""
        for token in tokens:
            if self.done or token == NOTHING:
                return
            if token == INVALID:
                self._fail(
                    GenerationError(
                        "the model's logits are not finite (NaN or infinite)"
                        + (f" under the adapter {self.adapter!r}" if self.adapter else "; check its weights and dtype")
                    )
                )
                return
            self.tokens.append(token)
            if token in self._stops:
                self.finish_reason = STOP
            elif len(self.tokens) >= self.limit:
                self.finish_reason = LENGTH

    def _fail(self, error: Exception) -> None:
        self.error, self.finish_reason = error, ERROR

    def _tell(self) -> None:
        if self._listener is not None:
            self._listener(self)
