"""The result of a run as text: its final table and its samples."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from jpeft.recipes import tasks
from jpeft.recipes.config import CHAT, CLASSIFY
from jpeft.units import format_bytes

# What to do with a run of a task.
_USES: Mapping[str, str] = {CLASSIFY: "jpeft predict {} --text-arg TEXT", CHAT: "jpeft chat {}"}


def result_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of a run's final table, from its result.json."""
    peak, skipped, mfu = result["peak_memory_bytes"], result["skipped_steps"], result["mfu"]
    base = result.get("base_memory_bytes")  # absent in runs of jpeft before quantized training
    trained, total, steps = result["trainable_parameters"], result["total_parameters"], result["steps"]
    seconds, kept = result.get("training_seconds"), result.get("step_kept", steps)
    rows = [
        *tasks.find(result.get("task", CLASSIFY)).result_rows(result),
        ("trainable parameters", f"{trained:,} of {total:,} ({trained / max(1, total):.2%})"),
        (
            "adapter on disk",
            f"{format_bytes(result['adapter_bytes'])} (the base: {format_bytes(result['base_bytes'])})",
        ),
        *([] if base is None else [("base in memory", format_bytes(base))]),
        ("peak memory", "unknown" if peak is None else format_bytes(peak)),
        *([] if seconds is None else [("training time", f"{format_seconds(seconds)} for {steps:,} steps")]),
        ("time per step", f"{1000 * result['seconds_per_step']:.0f} ms (median)"),
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s" + ("" if mfu is None else f", MFU {mfu:.1%}")),
    ]
    if kept != steps:
        rows.append(("adapter", f"that of step {kept:,}, whose evaluation was the best"))
    if skipped:
        rows.append(("skipped steps", f"{skipped}: loss or gradient was not finite; a lower --lr may help"))
    use = _USES.get(result.get("task", CLASSIFY))
    return [*rows, ("run", result["run"]), *([("use it", use.format(shlex.quote(result["run"])))] if use else [])]


def format_seconds(seconds: float) -> str:
    """A duration for people.

    >>> format_seconds(4.24), format_seconds(376), format_seconds(7384)
    ('4.2 s', '6 min 16 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_sample(sample: Mapping[str, Any]) -> str:
    """A prompt with the reference and the generated texts before and after training."""
    marks = {True: " (right)", False: " (wrong)", None: ""}
    parts = [("prompt", sample["prompt"]), ("expected", sample["reference"])]
    parts += [(f"{when}{marks[sample[f'right_{when}']]}", sample[when]) for when in ("before", "after")]
    return "".join(f"\n--- {name}\n{text.strip()}" for name, text in parts) + "\n"
