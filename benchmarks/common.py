"""What the benchmarks share: something to time, interleaved rounds, and what a compiled program says of itself."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One by which devices send each other arrays."""

    kind: str
    times: int  # that a step runs it
    operands: int  # bytes of them on a device
    moved: int  # bytes of the whole arrays, twice where they are added up: scattered, then gathered
    shapes: tuple[tuple[int, ...], ...]  # of operands


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program's text; what stands in a loop's body runs as often as the loop."""
    bodies, name = {}, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[1]
            bodies[name] = []
        elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line):
            bodies[name].append(found.groups())
    runs = Counter({re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1]: 1})  # type: ignore[index]
    for caller in reversed(bodies):  # a computation stands before those that call it
        for _, _, kind, rest in bodies[caller]:
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            assert trips or kind != "while", "a loop that may run any number of times: not counted"
            for callee in re.findall(r"(?:body|calls|to_apply|_computation)=%([\w.\-]+)", rest):
                runs[callee] += runs[caller] * (int(trips[1]) if trips else 1)
    out = []
    for name, body in bodies.items():
        types_of = {own: result for own, result, _, _ in body}
        for _, result, kind, rest in body:
            if kind.removesuffix("-start") in COLLECTIVES and runs[name]:
                assert kind in COLLECTIVES, "asynchronous ones are not read"
                operands = [types_of[own] for own in re.findall(r"%([\w.\-]+)", rest.split(")")[0])]
                held = sum(map(type_bytes, operands))
                moved = max(held, type_bytes(result)) * (2 if kind == "all-reduce" else 1)
                shapes = tuple(shape for each in operands for _, shape in arrays_of(each))
                out.append(Collective(kind, runs[name], held, moved, shapes))
    return out


def arrays_of(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes, as in `(f32[8,64]{1,0}, bf16[])`."""
    found = re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", type_text)
    return [(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in found]


def type_bytes(type_text: str) -> int:
    bits = lambda dtype: int((re.search(r"\d+", dtype) or ["8"])[0])  # noqa: E731  # a pred has none
    return sum(-(-bits(dtype) * math.prod(shape) // 8) for dtype, shape in arrays_of(type_text))


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
