"""The result of a plan, and its description in text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpeft.hardware.topologies import Chip, interconnect, parse
from jpeft.planning.hlo.liveness import Buffer
from jpeft.units import GIB, format_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        arguments: by kind (base, adapter, optimizer, batch), with the device's padding.
        temporaries: reserved by XLA for activations, gradients and all else that lives within a step.
        outputs: results that do not reuse an argument's memory.
        program: the compiled code.
        host: of the host's memory, for each device (`remat="offload"`).
        alive: peak of the temporaries that are live at once; XLA reserves more where there are loops.
    """

    arguments: Mapping[str, int]
    temporaries: int
    outputs: int
    program: int
    host: int = 0
    alive: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device at the peak."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The bytes that make up the total, by kind."""
        return {
            **self.arguments,
            "temporaries": self.temporaries,
            "outputs": self.outputs,
            "program": self.program,
        }


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over the same mesh axes, in one step.

    Attributes:
        kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, …
        axes: the mesh axes that they communicate over, such as `fsdp` or `data+fsdp`.
        count: how many run.
        bytes: the bytes that a device receives in total.
    """

    kind: str
    axes: str
    count: int
    bytes: float


@dataclass(frozen=True)
class Plan:
    """The result of `jpeft.plan`. Figures are for one device and one step, unless stated otherwise.

    Attributes:
        topology: such as `v5e:4x4`.
        chip: the data sheet of its chips, if known.
        devices: the number of devices.
        mesh: the sizes of the mesh axes.
        memory: see `Memory`.
        capacity: bytes of a device's memory that a program may use; None if unknown.
        refused: the compiler rejected the program for its size; `memory` is what it reported instead.
        largest: the largest buffers at the peak and the operations that made them, if the program does not fit.
        flops: of all matrix products, recomputed ones included.
        hbm_bytes: bytes read from and written to memory.
        model_flops: FLOPs that the model needs for these tokens, on all devices (`jpeft.hardware.utilization`).
        collectives: see `Traffic`.
        adapter_share: the share of the collectives' bytes that the step without an adapter does not send.
        tokens: per step, on all devices.
        compile_seconds: compilation time on this machine.
        host_bytes: this machine's memory that the compiler used.
        seen_on: the topology with more memory that `largest` was measured on, if not this one.
    """

    topology: str
    chip: Chip | None
    devices: int
    mesh: Mapping[str, int]
    memory: Memory
    capacity: int | None
    refused: bool
    largest: Sequence[Buffer]
    flops: float
    hbm_bytes: float
    model_flops: float | None
    collectives: Sequence[Traffic]
    adapter_share: float | None
    tokens: int
    compile_seconds: float
    host_bytes: int
    seen_on: str = ""

    @property
    def fits(self) -> bool | None:
        """True if the step fits into a device's memory; None if the capacity is unknown."""
        return None if self.capacity is None else self.memory.total <= self.capacity

    @property
    def floor(self) -> dict[str, float]:
        """Lower bounds on step time in seconds: `matmul`, `memory` and `interconnect`, each at the chip's peak rate."""
        if self.chip is None or self.refused:
            return {}
        amounts = {
            "matmul": (self.flops, self.chip.peak_flops),
            "memory": (self.hbm_bytes, self.chip.hbm_bandwidth),
            "interconnect": (sum(each.bytes for each in self.collectives), interconnect(parse(self.topology))),
        }
        return {name: amount / rate for name, (amount, rate) in amounts.items() if rate}

    @property
    def seconds(self) -> float | None:
        """Lower bound on step time: the slowest of compute, memory and interconnect, fully overlapped."""
        return max(self.floor.values(), default=None)

    def chip_seconds_per_token(self) -> float | None:
        """Lower bound on chip-seconds per token; None if the chip is unknown."""
        if self.seconds is None or self.chip is None:
            return None
        return self.seconds * self.devices / self.chip.devices_per_chip / self.tokens

    def usd_per_million_tokens(self, price: float | None = None) -> float | None:
        """Lower bound on the cost of a million tokens.

        Args:
            price: dollars per chip-hour; None uses the list price.
        """
        if price is None and self.chip is not None:
            price = self.chip.usd_per_chip_hour
        seconds = self.chip_seconds_per_token()
        return None if price is None or seconds is None else 1e6 * seconds * price / 3600

    def to_dict(self) -> dict[str, Any]:
        """The fields and the derived figures, for JSON."""
        out = dataclasses.asdict(self)
        out |= {"fits": self.fits, "floor_seconds": self.floor, "seconds": self.seconds}
        out["memory"]["total"] = self.memory.total
        out["mesh"] = dict(self.mesh)
        return out

    def __str__(self) -> str:
        return describe(self)


def verdict(plan: Plan) -> str:
    """States if the step fits, and by what margin.

    >>> verdict(plan)  # doctest: +SKIP
    'fits: 3.94 of 15.75 GiB, 11.81 to spare'
    """
    total, capacity = plan.memory.total, plan.capacity
    if capacity is None:
        return f"the memory of {plan.topology} is unknown"
    if plan.fits:
        return f"fits: {total / GIB:.2f} of {capacity / GIB:.2f} GiB, {(capacity - total) / GIB:.2f} to spare"
    over = f"does not fit: {total / GIB:.2f} of {capacity / GIB:.2f} GiB, {(total - capacity) / GIB:.2f} over"
    return over + (" (rejected by the compiler)" if plan.refused else "")


def describe(plan: Plan) -> str:
    """A plan as lines of text."""
    mesh = ",".join(f"{name}={size}" for name, size in plan.mesh.items())
    lines = [f"{plan.topology}: {plan.devices} devices, mesh {mesh}; {plan.tokens:,} tokens per step", ""]
    lines += [*_memory_lines(plan), *_largest_lines(plan)]
    if not plan.refused:
        lines += ["", *_work_lines(plan)]
    host = format_bytes(plan.host_bytes)
    return "\n".join([*lines, "", f"  compiled in {plan.compile_seconds:.0f} s with {host} of this machine's memory"])


def _memory_lines(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    for name, size in memory.parts().items():
        live = name == "temporaries" and 0 < memory.alive < size
        note = f"   reserved, {format_bytes(memory.alive)} of it live at once" if live else ""
        yield f"  {name:<13}{format_bytes(size):>12}{note}"
    yield f"  {'total':<13}{format_bytes(memory.total):>12}   per device; {verdict(plan)}"
    if memory.host:
        yield f"  {'on the host':<13}{format_bytes(memory.host):>12}   per device"


def _largest_lines(plan: Plan) -> Iterator[str]:
    if not plan.largest:
        return
    where = f", from the same step on {plan.seen_on}" if plan.seen_on else ""
    yield ""
    yield f"  the largest buffers at the peak{where}:"
    for each in plan.largest:
        times = f"{each.count} x " if each.count > 1 else ""
        size = format_bytes(each.bytes * each.count)
        yield f"  {size:>12}  {times}{each.shape}  {_short_path(each.source)}  {_short_name(each.op_name)}"


def _work_lines(plan: Plan) -> Iterator[str]:
    useful = ""
    if plan.model_flops is not None:
        share = plan.model_flops / (plan.flops * plan.devices)
        useful = f", {share:.0%} of them the model's own (the rest is recomputation)"
    yield f"  matmuls       {plan.flops / 1e12:,.4g} TFLOP per device{useful}"
    yield f"  memory        {format_bytes(plan.hbm_bytes)} read and written"
    for each in plan.collectives:
        if each.bytes:
            total = format_bytes(each.bytes)
            yield f"  {each.kind:<22}over {each.axes:<12}{each.count:>7,} moving{total:>12} in total"
    if plan.adapter_share is not None:
        yield f"  the adapter causes {plan.adapter_share:.2%} of this traffic"
    if plan.chip is None or plan.seconds is None:
        return
    floor = ", ".join(f"{name} {1000 * seconds:,.0f} ms" for name, seconds in plan.floor.items())
    speed = plan.tokens / plan.seconds
    yield f"  a step takes at least {1000 * plan.seconds:,.0f} ms ({floor}), {speed:,.0f} tokens/s"
    if (dollars := plan.usd_per_million_tokens()) is not None:
        price = plan.chip.usd_per_chip_hour
        yield f"  a million tokens cost at least ${dollars:.3f}, at ${price:.2f} per chip-hour"


def _short_path(source: str) -> str:
    """A `path:line`, relative to site-packages, to jpeft's parent or to the working folder."""
    path, _, line = source.rpartition(":")
    if not path:
        return source
    if (at := path.find("site-packages/")) >= 0:
        return f"{path[at + len('site-packages/') :]}:{line}"
    own = str(Path(__file__).parents[2]) + os.sep
    return f"{path.removeprefix(own).removeprefix(os.getcwd() + os.sep)}:{line}"


def _short_name(op_name: str) -> str:
    """The last steps of an operation's name, without those that loops and checkpoints add."""
    steps = [step for step in op_name.split("/") if step not in ("while", "body", "closed_call", "checkpoint")]
    return "/".join(steps[-4:])
