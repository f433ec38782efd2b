"""The process of a run: signals, the profiler, and memory."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jpeft.errors import UserError
from jpeft.recipes.config import Interrupted
from jpeft.recipes.run_folder import saved_steps
from jpeft.storage import file_sizes, is_remote, remove_folder, upload


class Profiler:
    """Traces some training steps with `jax.profiler`.

    Args:
        folder: the folder to write the trace to. One on an object store receives it when the trace ends.
        steps: the first step to trace, and how many; None traces nothing.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._on = folder, steps, False
        self._local = Path(tempfile.mkdtemp(prefix="jpeft-")) if steps and is_remote(folder) else folder

    def __enter__(self) -> Profiler:
        return self

    def before(self, step: int) -> None:
        """Starts or stops the trace. Call it before every step."""
        if self._steps is None:
            return
        first, count = self._steps
        if not self._on and first <= step < first + count:
            jax.profiler.start_trace(str(self._local))
            self._on = True
        elif step >= first + count:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on, self._steps = False, None
            if self._local is not self._folder:
                for name in file_sizes(self._local):
                    upload(self._local / name, self._folder / name)
                remove_folder(self._local)


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A context that records SIGINT and SIGTERM in a list, so that the loop can stop after the current step.

    A second signal interrupts at once, within the step.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can handle signals
        return

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def reporting_saved_step(run: Path) -> Iterator[None]:
    """Adds the last checkpoint, and how to resume, to the errors of a full disk and of an interrupt within a step."""
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
            f"free some space and resume with: jpeft finetune --out {run} --resume"
        ) from error


def saved_step(run: Path) -> int:
    """The step of a run's newest checkpoint; 0 if there is none.

    >>> saved_step(Path("runs/none"))
    0
    """
    return max(saved_steps(run), default=0)


def peak_memory() -> int | None:
    """The peak resident memory of this process, in bytes; None where the system does not report it.

    >>> peak_memory() is None or peak_memory() > 2**20
    True
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
