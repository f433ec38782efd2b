"""Continuous batching: requests come and go, each under its own adapter, in rows of one running batch.

    with jpeft.Engine(model, params, bank=bank, rows=64, capacity=4096) as engine:
        for token in engine.submit(prompt, adapter="fr", max_new_tokens=64, temperature=0.7, seed=1):
            ...

Each request gives the tokens that `jpeft.generate` gives it alone, whatever runs beside it. A row holds a request with
its cache, adapter and settings. In turn, the engine reads one chunk of each new prompt and decodes a few tokens of all
other rows, so that no request waits for another's long prompt. Two programs serve whatever comes: prefill of a chunk,
and decode of all rows; a method with virtual tokens adds one for the chunk that a prompt begins with. Adapters are
loaded and unloaded meanwhile. A request keeps the one that had the name when it was submitted.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jpeft.checks import is_int, is_positive_int
from jpeft.core.peft import Peft
from jpeft.models.decoder import Decoder
from jpeft.serving import rows as programs
from jpeft.serving.request import CANCELLED, ClosedError, QueueFullError, Request
from jpeft.serving.rows import Chunk, Forward
from jpeft.serving.sampling import GenerationError, Settings, check_prompt

_STOP_IDS = 8  # of these many a row's program knows; the others end a request after its step
_PREFILLS = 8  # chunks that are read between two steps of decoding


@dataclass
class Stats:
    """Counts of an engine since it was made.

    Attributes:
      submitted: requests that were taken.
      refused: requests that found the queue full.
      finished: requests that ended, by their reason.
      prompt_tokens: tokens of prompts that were read.
      new_tokens: tokens that were generated.
      steps: calls of the decoding program.

    >>> Stats().finished["stop"]
    0
    """

    submitted: int = 0
    refused: int = 0
    finished: collections.Counter[str] = field(default_factory=collections.Counter)
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0


class Engine:
    """A decoder that serves many requests at once, each under an adapter of its own.

    `submit` may be called from any thread. `start`, or a `with` block, runs the engine in a thread of its own; else it
    runs in the threads that iterate over requests, or by `step` and `run`.

    Attributes:
      bank: the adapters; None without a method.
      capacity: the most tokens of a prompt and its answer.
      rows: how many requests run at once.
      stats: counts of what was done.

    >>> import jax.numpy as jnp
    >>> from jpeft.models.decoder import DecoderConfig
    >>> model = Decoder(DecoderConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...                               num_attention_heads=4))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> engine = Engine(model, params, rows=2, capacity=64, chunk=8)
    >>> requests = [engine.submit([3, 1, 4], max_new_tokens=n) for n in (5, 2, 7)]
    >>> [len(request.result()) for request in requests]
    [5, 2, 7]
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        peft: Peft | None = None,
        *,
        bank: Any = None,
        rows: int = 64,
        capacity: int = 4096,
        chunk: int = 128,
        steps: int = 8,
        queue: int | None = None,
        vocabulary: int | None = None,
    ):
        """Args:
          model: a decoder of `jpeft.models`.
          params: its parameters.
          peft: the method of the bank, which may be left out.
          bank: the adapters, from `jpeft.stack`; None: the base alone.
          rows: how many requests run at once.
          capacity: the most tokens of a prompt and its answer; at most those that the model's context has room for.
          chunk: how many tokens of a prompt are read at once.
          steps: how many tokens of each row are decoded between two looks at what has come and gone.
          queue: the most requests that wait for a row. None: any number.
          vocabulary: never generate ids from here on, see `jpeft.generate`.

        Raises:
          TypeError: the model is none of `jpeft.models`.
          ValueError: a number is out of range, the bank is of another model, or a method cannot be served.
        """
        if not isinstance(model, Decoder):
            raise TypeError(f"model must be a decoder of jpeft.models, got {type(model).__name__}")
        for name, value in {"rows": rows, "capacity": capacity, "chunk": chunk, "steps": steps}.items():
            if not is_positive_int(value):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if queue is not None and not (is_int(queue) and queue >= 0):
            raise ValueError(f"queue must be an integer of at least 0 or None, got {queue!r}")
        self._forward = Forward(model, _method_of(model, peft, bank))
        self._params, self._settings = params, Settings(vocabulary=vocabulary)
        virtual = self._forward.virtual_tokens
        self.bank, self.rows = bank, rows
        self.capacity = min(capacity, model.config.context - virtual)
        self._chunk, self._steps, self._room = min(chunk, self.capacity), steps, queue
        self._places = virtual + self.capacity + self._chunk  # the first chunk is padded
        self.stats = Stats()
        self._state = self._empty()
        self._held: list[Request | None] = [None] * rows
        self._queue: collections.deque[Request] = collections.deque()
        self._changed = threading.Condition(threading.RLock())  # of all that follows from a request
        self._stepping, self._loading = threading.Lock(), threading.Lock()
        self._worker: threading.Thread | None = None
        self._closed = False

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_ids: Sequence[int] | None = None,
        seed: int = 0,
        listener: Callable[[Request], None] | None = None,
    ) -> Request:
        """Queues a request, and returns it: an iterable of its new tokens.

        Args:
          prompt: token ids.
          adapter: the name of an adapter in the bank; None: the base.
          max_new_tokens: the most tokens to generate. None: 256, or as many as there is room for.
          temperature: 0: greedy decoding.
          top_k: sample from the k most likely tokens.
          top_p: sample from the most likely tokens with this total probability.
          stop_ids: token ids that end the request. None: the `eos_token_id` of the model's config. (): none.
          seed: for sampling: the tokens are those of `jpeft.generate` with `key=jax.random.key(seed)`.
          listener: is called with the request, in the engine's thread, whenever it has new tokens or is done. It must
            not wait.

        Raises:
          GenerationError: the prompt is empty, too long or has ids outside the vocabulary; a setting is out of range.
          ValueError: there is no adapter of this name.
          QueueFullError: as many requests wait as may.
          ClosedError: the engine was closed.
        """
        settings = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
            "stop_ids": stop_ids,
        }  # fmt: skip
        call = {"prompt": prompt, "adapter": adapter, "seed": seed, "listener": listener, **settings}
        return self.submit_many([call])[0]

    def submit_many(self, calls: Sequence[Mapping[str, Any]]) -> list[Request]:
        """Queues several requests: all of them, or none.

        Args:
          calls: for each request, the arguments of `submit` by name.

        Raises:
          ValueError: they are more than rows and the queue hold.
          Exception: what `submit` raises.

        >>> requests = engine.submit_many([{"prompt": [3, 1], "seed": seed} for seed in range(3)])  # doctest: +SKIP
        """
        requests = [self._request_for(**call) for call in calls]
        with self._changed:
            bank = self.bank
            slots = [self._slot(bank, request.adapter) for request in requests]
            self._check_open()
            self._check_room(len(requests))
            for request, slot in zip(requests, slots, strict=True):
                request._number, request._bank, request._slot = self.stats.submitted, bank, slot
                self._queue.append(request)
                self.stats.submitted += 1
            self._changed.notify_all()
        return requests

    def _request_for(
        self,
        prompt: Sequence[int],
        adapter: str | None = None,
        *,
        seed: int = 0,
        listener: Callable[[Request], None] | None = None,
        **given: Any,
    ) -> Request:
        """A request for the arguments of `submit`, checked. It has no number, bank and slot yet."""
        if not (is_int(seed) and 0 <= seed < 1 << 63):
            raise GenerationError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
        key = jax.random.key(seed) if is_positive(given.get("temperature")) else None
        settings = Settings(**given, key=key, vocabulary=self._settings.vocabulary)
        settings.check()
        config, new = self._forward.model.config, settings.max_new_tokens
        limit = self._limit(np.size(prompt), new)
        ids = check_prompt(prompt, config, new or 1, self._forward.virtual_tokens)
        sampling = settings.sampling(config, 1)
        sampling = sampling._replace(stop_ids=sampling.stop_ids[:, :_STOP_IDS])
        stops = frozenset(settings.stops(config))
        return Request(ids, adapter, limit, self, -1, sampling, stops, None, 0, listener)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this engine was closed; make another one")

    def _check_room(self, count: int) -> None:
        """Raises an error if so many more requests have no place in free rows and the queue."""
        if self.most is None or self._room is None:
            return
        if count > self.most:
            raise ValueError(f"{count} requests at once; {self.rows} rows and a queue of {self._room} hold {self.most}")
        free = sum(request is None or request.done for request in self._held)
        waiting = max(0, len(self._queue) - free)
        if len(self._queue) + count > free + self._room:
            self.stats.refused += count
            more = f", which has no room for {count}" if count > 1 else ""
            raise QueueFullError(f"{waiting} requests wait already, and the queue holds {self._room}{more}")

    def cancel(self, request: Request) -> None:
        """Ends a request now. Nothing happens to one that is done."""
        with self._changed:
            if request.done:
                return
            request.finish_reason = CANCELLED
            if request in self._queue:
                self._queue.remove(request)
            self._count([request])
        self._tell([request])

    def wait(self, until: Callable[[], bool]) -> None:
        """Waits until something holds, and runs the engine meanwhile if no thread of its own does."""
        while True:
            with self._changed:
                if until():
                    return
                if self._worker is not None:
                    self._changed.wait()
                    continue
            self.step()

    def _limit(self, size: int, new: int | None) -> int:
        """The most new tokens after a prompt of a size."""
        room = self.capacity - size
        if room < (new or 1):
            raise GenerationError(
                f"the prompt has {size} tokens; with {new or 1} new ones it exceeds the engine's capacity of "
                f"{self.capacity}; shorten it, or reduce max_new_tokens"
            )
        return min(256, room) if new is None else int(new)

    def _slot(self, bank: Any, adapter: str | None) -> int:
        if bank is not None:
            return int(bank.ids([adapter])[0])
        if adapter is not None:
            raise ValueError(f"there is no adapter {adapter!r}: this engine has no bank, see jpeft.stack")
        return 0

    # --- adapters ---------------------------------------------------------------------------------------------------

    def load(self, name: str, adapter: Any) -> None:
        """Loads an adapter, or replaces the one of this name, for the requests that are submitted from now on.

        Args:
          name: its name.
          adapter: the adapter; or `(peft, adapter)` for one of another rank or alpha.

        Raises:
          ValueError: the bank is full, or the adapter does not fit it or is not finite.
          ClosedError: the engine was closed.
        """
        with self._loading:
            self._replace_bank(self._filled_bank().load(name, adapter))

    def unload(self, name: str) -> None:
        """Frees the place of an adapter. Requests that were submitted keep it.

        Raises:
          ValueError: there is no adapter of this name.
          ClosedError: the engine was closed.
        """
        with self._loading:
            self._replace_bank(self._filled_bank().unload(name))

    def _filled_bank(self) -> Any:
        self._check_open()
        if self.bank is None:
            raise ValueError(
                "this engine has no bank of adapters; give it one: Engine(…, bank=jpeft.stack(peft, {}, slots=8))"
            )
        return self.bank

    def _replace_bank(self, bank: Any) -> None:
        with self._changed:
            self.bank = bank

    # --- running ----------------------------------------------------------------------------------------------------

    @property
    def most(self) -> int | None:
        """The most requests in rows and in the queue together; None: any number."""
        return None if self._room is None else self.rows + self._room

    @property
    def queued(self) -> int:
        """The number of requests that wait for a row."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """The number of requests in rows."""
        return sum(request is not None for request in self._held)

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    def step(self) -> bool:
        """Reads a chunk of each new prompt, and decodes a few tokens of all other rows.

        Returns:
          Whether there was anything to do.
        """
        with self._stepping:
            with self._changed:
                reading = self._admit()
            if not any(self._held):
                return False
            try:
                found = self._compute(reading)
            except BaseException as error:
                self._recover(error)
                if not isinstance(error, Exception):
                    raise
                return True
            self._deliver(found)
            return True

    def run(self) -> None:
        """Runs until all requests are done."""
        while self.step():
            pass

    def _admit(self) -> list[int]:
        """Gives free rows to requests that wait. The rows whose prompts are read next, each by a chunk."""
        for row, request in enumerate(self._held):
            if request is not None and request.done:
                self._held[row] = None
            if self._held[row] is None and self._queue:
                self._held[row] = self._queue.popleft()
        reading = [row for row, request in enumerate(self._held) if request and not request._prompt_is_read]
        # The oldest, so that none waits forever, and those with the least left, which are soon done.
        reading.sort(key=lambda row: self._request(row)._number)
        rest = sorted(reading[1:], key=lambda row: self._request(row)._left)
        return [*reading[:1], *rest[: _PREFILLS - 1]]

    def _request(self, row: int) -> Request:
        request = self._held[row]
        assert request is not None
        return request

    def _compute(self, reading: list[int]) -> dict[int, list[int]]:
        """The new tokens of each row. Nothing is waited for before everything is under way."""
        firsts = {}
        for row in reading:
            request = self._request(row)
            token = self._prefill(request, row)
            if request._prompt_is_read:
                firsts[row] = token
        live = np.array([request is not None and request._prompt_is_read for request in self._held])
        if not live.any():
            return {}
        args = self._forward, self._params, self.bank, self._state, live
        self._state, tokens = programs.decode(*args, steps=self._steps)
        self.stats.steps += 1
        begun, tokens = jax.device_get((firsts, tokens))
        rows = np.flatnonzero(live).tolist()
        return {row: [*([int(begun[row])] if row in begun else []), *tokens[:, row].tolist()] for row in rows}

    def _prefill(self, request: Request, row: int) -> Any:
        """Reads the next chunk of a prompt; the token after it, on the device."""
        chunk = self._chunk_of(request, row)
        first = request._read == 0
        continues = not (first and (self._forward.begins_apart or self._forward.reads_whole_prompts))
        args = self._forward, self._params, request._bank, self._state, chunk
        self._state, token = programs.prefill(*args, continues=continues)
        request._read += int(chunk.mask.sum())
        return token

    def _chunk_of(self, request: Request, row: int) -> Chunk:
        """The next chunk of a prompt. The first one is padded, so that all others are full."""
        left, width = request._left, self._chunk
        if self._forward.reads_whole_prompts:
            width = -(-left // width) * width
        size = left % width or width
        ids, mask = np.zeros((1, width), np.int32), np.zeros((1, width), bool)
        ids[0, width - size :] = request.prompt[request._read : request._read + size]
        mask[0, width - size :] = True
        first, limit = np.bool_(request._read == 0), np.int32(request.limit)
        return Chunk(ids, mask, np.int32(row), np.int32(request._slot), first, limit, request._sampling)

    def _deliver(self, found: dict[int, list[int]]) -> None:
        with self._changed:
            told = []
            for row, tokens in found.items():
                request = self._request(row)
                if request.done:  # cancelled meanwhile
                    continue
                before = len(request.tokens)
                request._extend(tokens)
                self.stats.new_tokens += len(request.tokens) - before
                told.append(request)
            self._count([request for request in told if request.done])
            self._changed.notify_all()
        self._tell(told)

    def _count(self, ended: Iterable[Request]) -> None:
        for request in ended:
            self.stats.finished[str(request.finish_reason)] += 1
            self.stats.prompt_tokens += request._read
        self._changed.notify_all()

    def _tell(self, requests: Iterable[Request]) -> None:
        for request in requests:
            try:
                request._tell()
            except Exception:  # whoever listened is gone
                request._listener = None
                request.cancel()

    def _recover(self, error: BaseException) -> None:
        """Fails the requests in rows, whose state was donated to a program that did not run."""
        with self._changed:
            failed = [request for request in self._held if request is not None and not request.done]
            for request in failed:
                request._fail(error if isinstance(error, Exception) else RuntimeError("the engine was interrupted"))
            self._held = [None] * self.rows
            self._count(failed)
        self._state = self._empty()
        self._tell(failed)

    def _empty(self) -> Any:
        sampling = self._settings.sampling(self._forward.model.config, 1)
        return programs.empty_rows(self._forward, self._params, self.bank, self.rows, self._places, sampling)

    # --- a thread of its own ----------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Runs the engine in a thread of its own, until it is closed."""
        with self._changed:
            self._check_open()
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="jpeft-engine", daemon=True)
                self._worker.start()
        return self

    def close(self, drain: bool = False) -> None:
        """Takes no more requests, and ends the engine's thread.

        Args:
          drain: whether requests that were submitted still get their tokens; else they are cancelled.
        """
        with self._changed:
            self._closed = True
            pending = [*self._queue, *(request for request in self._held if request)]
            self._changed.notify_all()
        if not drain:
            for request in pending:
                self.cancel(request)
        if self._worker is None:
            self.run()
        elif self._worker is not threading.current_thread():
            self._worker.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(drain=kind is None)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or any(self._held)):
                    if self._closed:
                        return
                    self._changed.wait()
            self.step()


def is_positive(value: Any) -> bool:
    """Whether a value is a number above 0; others are told of elsewhere."""
    return isinstance(value, int | float) and value > 0


def _method_of(model: Any, peft: Peft | None, bank: Any) -> Peft | None:
    if bank is None:
        if peft is not None:
            raise ValueError("a peft without a bank of its adapters; give bank=jpeft.stack(peft, {…})")
        return None
    if bank.peft.model != model or (peft is not None and peft.model != model):
        raise ValueError(
            "the bank's Peft was bound to another model; if the layers of one are unrolled, see jpeft.models.unroll"
        )
    if peft is not None and peft != bank.source:
        raise ValueError("the bank is of another Peft than the one given; leave out the peft")
    return bank.peft
