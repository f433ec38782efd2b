"""Output for a terminal."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jpeft.recipes.config import CHAT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def fail(message: str, status: int) -> int:
    print(f"jpeft: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# --------------------------------------------------------------------------------------------------------- printing


def result_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The final table of a run."""
    peak, skipped, mfu = result["peak_memory_bytes"], result["skipped_steps"], result["mfu"]
    held = result.get("base_memory_bytes")
    rows = [
        *(_chat_rows(result) if result.get("task") == CHAT else _label_rows(result)),
        ("trainable parameters", f"{result['trainable_parameters']:,}"),
        ("total parameters", f"{result['total_parameters']:,}"),
        ("adapter on disk", format_bytes(result["adapter_bytes"])),
        ("base on disk", format_bytes(result["base_bytes"])),
        *([] if held is None else [("base in memory", format_bytes(held))]),
        ("time per step", f"{1000 * result['seconds_per_step']:.0f} ms (median of {result['steps']})"),
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s" + ("" if mfu is None else f", MFU {mfu:.1%}")),
        ("peak memory", "unknown" if peak is None else format_bytes(peak)),
        ("run", result["run"]),
    ]
    if skipped:
        rows.insert(-1, ("skipped steps", f"{skipped}: loss or gradient was not finite; a lower --lr may help"))
    return rows


def _label_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("accuracy before", f"{result['accuracy_before']:.1%}"),
        ("accuracy after", f"{result['accuracy_after']:.1%}"),
        ("majority baseline", f"{result['majority_baseline']:.1%}"),
    ]


def _chat_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    shapes = ", ".join(f"{rows}×{width}" for rows, width in result["shapes"])
    rows = [
        ("perplexity before", f"{result['perplexity_before']:.3f} (of {result['eval_examples']:,} held-out answers)"),
        ("perplexity after", f"{result['perplexity_after']:.3f}"),
        ("batches", f"{len(result['shapes'])} shape{'s' * (len(result['shapes']) > 1)} ({shapes}), "
                    f"{result['padding']:.1%} padding"),
    ]  # fmt: skip
    if scored := [s for s in result["samples"] if s["right_after"] is not None]:
        before, after = (sum(s[key] for s in scored) for key in ("right_before", "right_after"))
        rows.insert(2, ("right final number", f"{before} of {len(scored)} before, {after} after"))
    return rows


def format_sample(sample: Mapping[str, Any]) -> str:
    """A prompt with its answers, for people."""
    marks = {True: " (right)", False: " (wrong)", None: ""}
    parts = [("prompt", sample["prompt"]), ("expected", sample["reference"])]
    parts += [(f"{when}{marks[sample[f'right_{when}']]}", sample[when]) for when in ("before", "after")]
    return "".join(f"\n--- {name}\n{text.strip()}" for name, text in parts) + "\n"


def format_bytes(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit} ({size:,} bytes)"
    return f"{size:,} bytes"


class Terminal:
    """Prints what a job says, and its progress: a bar where somebody watches, else a line now and then."""

    def __init__(self, to_stderr: bool, quiet: bool = False):
        self._stderr, self._quiet = to_stderr, quiet
        self._bar: Progress | None = None
        self._mean: float | None = None
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
        self._console.print(text, markup=False)

    def progress(self, done: int, total: int, loss: float, tokens_per_second: float) -> None:
        if math.isfinite(loss):  # a step that is not is skipped, and what a bar shows should not jump
            self._mean = loss if self._mean is None else 0.95 * self._mean + 0.05 * loss
        mean = loss if self._mean is None else self._mean
        if not self._console.is_terminal:
            self._line(done, total, mean, tokens_per_second)
            return
        if self._bar is None:
            self._bar = self._start(done - 1, total)
        self._bar.update(self._task, completed=done, loss=mean, speed=tokens_per_second)
        if done == total:
            self._close()

    def _line(self, done: int, total: int, loss: float, speed: float) -> None:
        now = time.monotonic()
        first, began = self._began = self._began or (done, now)
        if done == total or done % -(-total // 20) == 0:  # some twenty lines in all
            left = (now - began) / max(1, done - first) * (total - done)
            eta = f"{int(left) // 60}:{int(left) % 60:02}"
            self.say(f"step {done}/{total}  loss {loss:.4f}  {speed:,.0f} tokens/s  ETA {eta}")

    def _start(self, done: int, total: int) -> Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        ]
        bar = Progress(*columns, console=self._console, speed_estimate_period=120)
        self._task = bar.add_task("training", total=total, completed=done, loss=0.0, speed=0.0)
        bar.start()
        return bar

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        self._close()
        table = Table(show_header=False)
        for name, value in rows:
            table.add_row(name, Text(value))  # as it is: a path may look like markup
        self._console.print(table)
