"""Shared by the benchmarks: interleaved timing, memory and FLOPs of compiled programs, collectives, and tables."""

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
    """Something to time.

    Attributes:
      name: its name in tables.
      step: runs it once and waits for the result.
      facts: other columns of its row.
      times: seconds of each measured step.
    """

    def __init__(self, name: str, step: Callable[[], Any], **facts: Any):
        self.name, self.step, self.facts, self.times = name, step, facts, []


def compiled_facts(compiled: Any) -> dict[str, float]:
    """FLOPs and bytes of a compiled program.

    XLA counts the body of a scan once. "Fresh" outputs are those that do not reuse the memory of an argument.
    """
    memory = compiled.memory_analysis()
    return {
        "flops": compiled.cost_analysis()["flops"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "fresh_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A collective operation of a compiled program.

    Attributes:
      kind: its opcode.
      times: how often a step runs it.
      operands: bytes of its operands on one device.
      moved: bytes of the whole arrays; twice for an all-reduce, which scatters and then gathers.
      shapes: shapes of its operands.
    """

    kind: str
    times: int
    operands: int
    moved: int
    shapes: tuple[tuple[int, ...], ...]


def collectives(text: str) -> list[Collective]:
    """The collectives in the HLO text of a compiled program. Those in the body of a loop run once per iteration."""
    bodies, name = {}, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[1]
            bodies[name] = []
        elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line):
            bodies[name].append(found.groups())
    runs = Counter({re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1]: 1})  # type: ignore[index]
    for caller in reversed(bodies):  # a computation precedes its callers
        for _, _, kind, rest in bodies[caller]:
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            assert trips or kind != "while", "a loop with an unknown trip count"
            for callee in re.findall(r"(?:body|calls|to_apply|_computation)=%([\w.\-]+)", rest):
                runs[callee] += runs[caller] * (int(trips[1]) if trips else 1)
    out = []
    for name, body in bodies.items():
        types_of = {own: result for own, result, _, _ in body}
        for _, result, kind, rest in body:
            if kind.removesuffix("-start") in COLLECTIVES and runs[name]:
                assert kind in COLLECTIVES, "asynchronous collectives are not supported"
                operands = [types_of[own] for own in re.findall(r"%([\w.\-]+)", rest.split(")")[0])]
                held = sum(map(type_bytes, operands))
                moved = max(held, type_bytes(result)) * (2 if kind == "all-reduce" else 1)
                shapes = tuple(shape for each in operands for _, shape in arrays_of(each))
                out.append(Collective(kind, runs[name], held, moved, shapes))
    return out


def arrays_of(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtypes and shapes in an HLO type such as `(f32[8,64]{1,0}, bf16[])`."""
    found = re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", type_text)
    return [(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in found]


def type_bytes(type_text: str) -> int:
    """The bytes of the arrays in an HLO type."""
    return sum(-(-dtype_bits(dtype) * math.prod(shape) // 8) for dtype, shape in arrays_of(type_text))


def dtype_bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8  # pred


def measure(variants: list[Variant], rounds: int, warm_up: int = 2) -> None:
    """Runs a step of each variant ``rounds`` times, after `warm_up` rounds that are not measured.

    Each round has another order, so that the state of caches and allocator affects all variants alike.
    """
    order = random.Random(0)
    for i in range(rounds + warm_up):
        for variant in order.sample(variants, len(variants)):
            start = time.perf_counter()
            variant.step()
            if i >= warm_up:
                variant.times.append(time.perf_counter() - start)


def table(variants: list[Variant]) -> list[dict[str, Any]]:
    """A row of times and facts for each variant."""
    rows = []
    for v in variants:
        times = sorted(1000 * t for t in v.times)
        row = {"name": v.name, "median_ms": statistics.median(times)}
        rows.append(row | {"fastest_ms": times[0]} | v.facts)
    return rows


def ratio(variant: Variant, base: Variant) -> float:
    """The ratio of step times: the median over rounds, each of which ran both."""
    return statistics.median(t / u for t, u in zip(variant.times, base.times, strict=True))


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """The CPU, Python and package versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", info) or [platform.processor() or platform.machine()]
    versions = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}
    return {"cpu": names[0], "cores": os.cpu_count()} | versions


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table."""
    for cells in (head, ["---", *["---:"] * (len(head) - 1)], *body):
        print("| " + " | ".join(cells) + " |")
