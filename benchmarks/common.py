"""What the benchmarks share: something to time, interleaved rounds, and what a compiled program says of itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Variant:
    """Something to time: ``step()`` runs it once and waits for it."""

    def __init__(self, name: str, step: Callable[[], Any], **facts: Any):
        self.name, self.step, self.facts, self.times = name, step, facts, []


def compiled_facts(compiled: Any) -> dict[str, float]:
    """FLOPs, of which XLA counts a scan's body once, and bytes; "fresh" are outputs that reuse no argument's memory."""
    memory = compiled.memory_analysis()
    return {
        "flops": compiled.cost_analysis()["flops"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "fresh_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


def measure(variants: list[Variant], rounds: int, warm_up: int = 2) -> None:
    """A step of each, ``rounds`` times, after `warm_up` that do not count. Each round has another order: what a step
    leaves in caches and in the allocator falls on all alike."""
    order = random.Random(0)
    for i in range(rounds + warm_up):
        for variant in order.sample(variants, len(variants)):
            start = time.perf_counter()
            variant.step()
            if i >= warm_up:
                variant.times.append(time.perf_counter() - start)


def table(variants: list[Variant]) -> list[dict[str, Any]]:
    """Rows of medians and facts."""
    rows = []
    for v in variants:
        times = sorted(1000 * t for t in v.times)
        row = {"name": v.name, "median_ms": statistics.median(times)}
        rows.append(row | {"fastest_ms": times[0]} | v.facts)
    return rows


def ratio(variant: Variant, base: Variant) -> float:
    """How much longer than another it takes: the median over rounds, of which each ran both."""
    return statistics.median(t / u for t, u in zip(variant.times, base.times, strict=True))


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Where this runs, and on what."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", info) or [platform.processor() or platform.machine()]
    versions = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}
    return {"cpu": names[0], "cores": os.cpu_count()} | versions


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    for cells in (head, ["---", *["---:"] * (len(head) - 1)], *body):
        print("| " + " | ".join(cells) + " |")
