"""The process of a run: signals, profiler, memory."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jpeft.errors import UserError
from jpeft.recipes.config import Interrupted


class Profiler:
    """`jax.profiler` over some steps, if any were asked for."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._on = folder, steps, False

    def __enter__(self) -> Profiler:
        return self

    def before(self, step: int) -> None:
        """To be called before every step."""
        if self._steps is None:
            return
        first, count = self._steps
        if not self._on and first <= step < first + count:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        elif step >= first + count:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on, self._steps = False, None


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or a polite kill asks to stop; a second one does not wait for the step."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals are the main thread's
        return

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stopping_well(run: Path) -> Iterator[None]:
    """Say of a full disk, or of a Ctrl-C that did not wait, what is safe and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(stop.args[0] if stop.args else signal.SIGINT, saved_step(run), run) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        step = saved_step(run)
        raise UserError(
            f"{(error.strerror or 'no space').lower()}, writing to {run}: "
            f"{f'the run is saved up to step {step}' if step else 'no checkpoint was written yet'}; "
            f"free some and continue with: jpeft finetune --out {run} --resume"
        ) from error


def saved_step(run: Path) -> int:
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def peak_memory() -> int | None:
    """The most memory that this process held, in bytes; None where the system does not tell.

    >>> peak_memory() is None or peak_memory() > 2**20
    True
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
