"""What the processes of a run tell each other: failures, texts, numbers. All of them must ask, in the same order.

With one process everything here is its own answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

_MESSAGE = 2048  # bytes of a text that goes round


class HostError(ValueError):
    """What went wrong on another process, or is not the same on all; `kind` is the name of the error there."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


def is_main_process() -> bool:
    """Whether this is the process that speaks and writes.

    >>> is_main_process()
    True
    """
    return jax.process_index() == 0


def _gather(text: str) -> list[str]:
    """What every process says."""
    if jax.process_count() == 1:
        return [text]
    buffer = np.zeros(_MESSAGE, np.uint8)
    raw = text.encode()[: _MESSAGE - 1]
    buffer[: len(raw)] = np.frombuffer(raw, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(buffer)).reshape(jax.process_count(), _MESSAGE)
    return [bytes(row).split(b"\0", 1)[0].decode(errors="ignore") for row in rows]


def on_all_hosts(fn: Callable[[], T]) -> T:
    """What `fn` gives, if it fails on no process: a mistake on one is told on all, and none waits for another.

    >>> on_all_hosts(lambda: 3)
    3
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = fn()
    except Exception as error:
        failure = error
    if jax.process_count() == 1:
        if failure is not None:
            raise failure
        return result
    if failure is not None:
        failure.told = True  # type: ignore[attr-defined]  # process 0 will say it
    told = _gather("" if failure is None else f"{type(failure).__name__}\n{failure}")
    wrong = {i: text.split("\n", 1) for i, text in enumerate(told) if text}
    if wrong:
        first, (kind, message) = next(iter(wrong.items()))
        if failure is not None and first == jax.process_index():
            raise failure
        where = f"process {first}" if len(wrong) < len(told) else "all processes"
        raise HostError(f"{where}: {message or kind}", kind) from failure
    return result


def check_same(values: Mapping[str, str]) -> None:
    """Raises a `HostError`, on all, where processes differ in one of these; it names what, and who.

    >>> check_same({"data": "3f0c"})
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(value.encode()).hexdigest()[:16] for value in values.values()]
    for name, *told in zip(values, *(text.split() for text in _gather(" ".join(digests))), strict=True):
        if different := [i for i, other in enumerate(told) if other != told[0]]:
            raise HostError(f"processes differ in {name}: that of process {', '.join(map(str, different))} is not that "
                            "of process 0; every host needs the same command, files and version")  # fmt: skip


def broadcast(text: str) -> str:
    """The text that process 0 has, on all.

    >>> broadcast("runs/smollm2-lora-1")
    'runs/smollm2-lora-1'
    """
    return _gather(text)[0]


def largest(value: int) -> int:
    """The largest of what the processes have, on all.

    >>> largest(2)
    2
    """
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def on_host(tree: Any) -> Any:
    """A tree's arrays whole, in this process's memory; every process must ask.

    >>> on_host({"a": np.ones(2)})["a"].shape
    (2,)
    """

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)
