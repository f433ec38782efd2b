"""The result of a run as text: its final table and its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jpeft.recipes import tasks
from jpeft.recipes.config import CLASSIFY
from jpeft.units import format_bytes


def result_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of a run's final table, from its result.json."""
    peak, skipped, mfu = result["peak_memory_bytes"], result["skipped_steps"], result["mfu"]
    base = result.get("base_memory_bytes")  # absent in runs of jpeft before quantized training
    rows = [
        *tasks.find(result.get("task", CLASSIFY)).result_rows(result),
        ("trainable parameters", f"{result['trainable_parameters']:,}"),
        ("total parameters", f"{result['total_parameters']:,}"),
        ("adapter on disk", _size(result["adapter_bytes"])),
        ("base on disk", _size(result["base_bytes"])),
        *([] if base is None else [("base in memory", _size(base))]),
        ("time per step", f"{1000 * result['seconds_per_step']:.0f} ms (median of {result['steps']})"),
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s" + ("" if mfu is None else f", MFU {mfu:.1%}")),
        ("peak memory", "unknown" if peak is None else _size(peak)),
    ]
    if skipped:
        rows.append(("skipped steps", f"{skipped}: loss or gradient was not finite; a lower --lr may help"))
    return [*rows, ("run", result["run"])]


def _size(size: int) -> str:
    return f"{format_bytes(size)} ({size:,} bytes)"


def format_sample(sample: Mapping[str, Any]) -> str:
    """A prompt with the reference and the generated texts before and after training."""
    marks = {True: " (right)", False: " (wrong)", None: ""}
    parts = [("prompt", sample["prompt"]), ("expected", sample["reference"])]
    parts += [(f"{when}{marks[sample[f'right_{when}']]}", sample[when]) for when in ("before", "after")]
    return "".join(f"\n--- {name}\n{text.strip()}" for name, text in parts) + "\n"
