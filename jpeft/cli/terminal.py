"""Output to a terminal: messages, errors, JSON, tables and progress bars."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jpeft.recipes.running_mean import RunningMean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


def print_error(message: str) -> None:
    """Prints an error to stderr, on one line."""
    print(f"jpeft: error: {' '.join(message.split())}", file=sys.stderr)


def print_note(message: str) -> None:
    """Prints a message to stderr."""
    print(message, file=sys.stderr)


def print_json(value: Any, **options: Any) -> None:
    """Prints a value to stdout as one line of JSON."""
    print(json.dumps(value, ensure_ascii=False, **options), flush=True)


def progress_bar(console: Console, label: str, *columns: ProgressColumn, **options: Any) -> Progress:
    """A progress bar with a label, the completed and total counts, and further columns."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(TextColumn(label), BarColumn(), MofNCompleteColumn(), *columns, console=console, **options)


class Terminal:
    """Shows the messages and the progress of training: a bar in a terminal, otherwise some twenty lines.

    It is the command line's `jpeft.recipes.tasks.base.Reporter`.

    Args:
        to_stderr: where to show them; stdout by default.
        quiet: show nothing.
        words: rewrites a message of the library in the words of the command line.
    """

    def __init__(self, to_stderr: bool, quiet: bool = False, words: Callable[[str], str] = lambda text: text):
        self._stderr, self._quiet, self._words = to_stderr, quiet, words
        self._bar: Progress | None = None
        self._mean: RunningMean | None = None
        self._shown = math.nan  # the mean so far
        self._began: tuple[int, float] | None = None

    _console: Console

    def __enter__(self) -> Terminal:
        from rich.console import Console

        self._console = Console(stderr=self._stderr, quiet=self._quiet, highlight=False, soft_wrap=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Prints a message."""
        self._console.print(self._words(text), markup=False)

    def progress(self, done: int, total: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `done` of `total` training steps are complete, with the running mean of the loss."""
        self._mean = self._mean or RunningMean(total)
        if math.isfinite(loss):  # a step whose loss is not finite is skipped and should not disturb the mean
            self._shown = self._mean.add(loss)
        mean = loss if math.isnan(self._shown) else self._shown
        if not self._console.is_terminal:
            self._print_progress(done, total, mean, tokens_per_second)
            return
        if self._bar is None:
            self._bar = self._start_bar(done - 1, total)
        self._bar.update(self._task, completed=done, loss=mean, speed=tokens_per_second)
        if done == total:
            self._close()

    def _print_progress(self, done: int, total: int, loss: float, speed: float) -> None:
        now = time.monotonic()
        first, began = self._began = self._began or (done, now)
        if done == total or done % -(-total // 20) == 0:
            rest = ""
            if done > first:  # the first step compiles, and tells nothing of the others
                left = int((now - began) / (done - first) * (total - done))
                rest = f"  {speed:,.0f} tokens/s  ETA {left // 60}:{left % 60:02}"
            self.say(f"step {done}/{total}  mean loss {loss:.4f}{rest}")

    def _start_bar(self, done: int, total: int) -> Progress:
        from rich.progress import TextColumn, TimeRemainingColumn

        loss, speed = TextColumn("mean loss {task.fields[loss]:.4f}"), TextColumn("{task.fields[speed]:,.0f} tokens/s")
        columns = (loss, speed, TextColumn("ETA"), TimeRemainingColumn())
        bar = progress_bar(self._console, "training", *columns, speed_estimate_period=120)
        self._task = bar.add_task("", total=total, completed=done, loss=0.0, speed=0.0)
        bar.start()
        return bar

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Prints names and values as a table."""
        from rich.table import Table
        from rich.text import Text

        self._close()
        table = Table(show_header=False)
        for name, value in rows:
            table.add_row(name, Text(value))  # Text: a path may contain markup
        self._console.print(table)
