"""Communication between the processes of a run: errors, texts, numbers and arrays.

Every process must call these functions, in the same order. With one process they return its own value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

_MESSAGE = 2048  # the size in bytes of the buffer that `_gather` sends


class HostError(ValueError):
    """An error on another process, or a difference between processes.

    Attributes:
      kind: the class name of the other process's error; empty for a difference.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


def is_main_process() -> bool:
    """Whether this is process 0, the one that prints and writes.

    >>> is_main_process()
    True
    """
    return jax.process_index() == 0


def _gather(text: str) -> list[str]:
    """The texts of all processes, by process index."""
    if jax.process_count() == 1:
        return [text]
    buffer = np.zeros(_MESSAGE, np.uint8)
    raw = text.encode()[: _MESSAGE - 1]
    buffer[: len(raw)] = np.frombuffer(raw, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(buffer)).reshape(jax.process_count(), _MESSAGE)
    return [bytes(row).split(b"\0", 1)[0].decode(errors="ignore") for row in rows]


def on_all_hosts(fn: Callable[[], T]) -> T:
    """Runs `fn` on every process. If any raises, all raise, so none blocks in a collective.

    Returns:
      The result of `fn` on this process.

    Raises:
      HostError: `fn` raised on another process. Where `fn` raised itself, that error is raised if it is the first.

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
        failure.reported = True  # type: ignore[attr-defined]  # process 0 reports it
    reports = _gather("" if failure is None else f"{type(failure).__name__}\n{failure}")
    failures = {i: report.split("\n", 1) for i, report in enumerate(reports) if report}
    if failures:
        first, (kind, message) = next(iter(failures.items()))
        if failure is not None and first == jax.process_index():
            raise failure
        where = f"process {first}" if len(failures) < len(reports) else "all processes"
        raise HostError(f"{where}: {message or kind}", kind) from failure
    return result


def check_same(values: Mapping[str, str]) -> None:
    """Raises a `HostError` on every process if a value differs between processes; the message names it and them.

    Args:
      values: texts to compare, by the name that the message uses.

    >>> check_same({"data": "3f0c"})
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(value.encode()).hexdigest()[:16] for value in values.values()]
    for name, *others in zip(values, *(text.split() for text in _gather(" ".join(digests))), strict=True):
        if different := [str(i) for i, other in enumerate(others) if other != others[0]]:
            raise HostError(
                f"processes differ in {name}: process {', '.join(different)} has another one than process 0; every "
                "host needs the same command, files and version"
            )


def broadcast(text: str) -> str:
    """The text of process 0, on every process.

    >>> broadcast("runs/smollm2-lora-1")
    'runs/smollm2-lora-1'
    """
    return _gather(text)[0]


def largest(value: int) -> int:
    """The largest of all processes' values, on every process.

    >>> largest(2)
    2
    """
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def on_host(tree: Any) -> Any:
    """The tree with whole arrays in this process's memory, gathered from all processes if sharded over them.

    >>> on_host({"a": np.ones(2)})["a"].shape
    (2,)
    """

    def fetch(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)
