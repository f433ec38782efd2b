"""The result of a plan, and its description in text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpeft.hardware.topologies import Chip, interconnect, parse
from jpeft.planning import hlo


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        arguments: by what they are: base, adapter, optimizer, batch; padded as the device pads them.
        temporaries: what XLA reserves for activations, gradients and whatever else lives within a step.
        alive: of these, what lives at once at the most: XLA reserves more where there are loops.
        outputs: those that do not lie in an argument's place.
        program: the compiled code.
        host: of the host's memory, for each device (`remat="offload"`).
    """

    arguments: Mapping[str, int]
    temporaries: int
    outputs: int
    program: int
    host: int = 0
    alive: int = 0

    @property
    def total(self) -> int:
        """At the peak, on the device."""
        return sum(self.arguments.values()) + self.temporaries + self.outputs + self.program


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same axes of the mesh, in one step.

    Attributes:
        kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, …
        axes: what they cross, as `fsdp` or `data+fsdp`.
        count: how many run. bytes: what a device receives in all.
    """

    kind: str
    axes: str
    count: int
    bytes: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Figures are of one device and one step, unless they say otherwise.

    Attributes:
        topology: as `v5e:4x4`. chip: what is known of its chips. devices: how many. mesh: their axes.
        memory: see `Memory`. capacity: bytes that a program may use of a device; None where it is not known.
        refused: the compiler found that it cannot fit, and made no program: `memory` is what it said it would take.
        largest: where it does not fit, the largest buffers that live at the peak, and what made them.
        flops: of all products, those included that are computed again. hbm_bytes: read from and written to memory.
        model_flops: that the model needs for these tokens (`jpeft.utilization.step_flops`), where its size is known.
        collectives: see `Traffic`. adapter_share: of their bytes, what there is of them more than without an adapter.
        tokens: of all devices together, in a step.
        compile_seconds, host_bytes: what compiling took on this machine.
        seen_on: where the largest buffers are those of the same step compiled for other chips, which have more room.
    """

    topology: str
    chip: Chip | None
    devices: int
    mesh: Mapping[str, int]
    memory: Memory
    capacity: int | None
    refused: bool
    largest: Sequence[hlo.Buffer]
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
        """Whether a device has room for it; None where its memory is not known."""
        return None if self.capacity is None else self.memory.total <= self.capacity

    @property
    def floor(self) -> dict[str, float]:
        """Seconds that a step takes at least: `matmul`, `memory` and `interconnect`, each at its chip's peak rate."""
        if self.chip is None or self.refused:
            return {}
        sent = sum(traffic.bytes for traffic in self.collectives)
        rates = {"matmul": (self.flops, self.chip.peak_flops), "memory": (self.hbm_bytes, self.chip.hbm_bandwidth),
                 "interconnect": (sent, interconnect(parse(self.topology)))}  # fmt: skip
        return {name: amount / rate for name, (amount, rate) in rates.items() if rate}

    @property
    def seconds(self) -> float | None:
        """Of a step, at least: whatever takes longest, with all else beside it."""
        return max(self.floor.values(), default=None)

    def chip_seconds_per_token(self) -> float | None:
        """Chip-seconds that a token costs, at least."""
        if self.seconds is None or self.chip is None:
            return None
        return self.seconds * self.devices / self.chip.devices_per_chip / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        out = dataclasses.asdict(self)
        out |= {"fits": self.fits, "floor_seconds": self.floor, "seconds": self.seconds}
        out["memory"]["total"] = self.memory.total
        out["mesh"] = dict(self.mesh)
        return out

    def __str__(self) -> str:
        from jpeft.planning.result import describe

        return describe(self)


GIB = 1 << 30


_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def gib(size: float) -> str:
    """Bytes in GiB, or in what they are some of.

    >>> gib(3 * 2**30), gib(2**20), gib(0)
    ('3.00 GiB', '1.00 MiB', '0')
    """
    if size < 1:
        return "0"
    value, unit = next(((size / n, unit) for n, unit in _UNITS if size >= 0.1 * n), (size, "B"))
    return f"{value:.2f} {unit}" if value < 100 else f"{value:,.0f} {unit}"


def parts(plan: Plan) -> dict[str, int]:
    """What a device's memory holds, by what it is."""
    memory = plan.memory
    return {**memory.arguments, "temporaries": memory.temporaries, "outputs": memory.outputs, "program": memory.program}


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much.

    >>> verdict(plan)  # doctest: +SKIP
    'fits: 3.94 of 15.75 GiB, 11.8 to spare'
    """
    total, capacity = plan.memory.total, plan.capacity
    if capacity is None:
        return f"the memory of {plan.topology} is not known"
    if plan.fits:
        return f"fits: {total / GIB:.2f} of {capacity / GIB:.2f} GiB, {(capacity - total) / GIB:.2f} to spare"
    over = f"does not fit: {total / GIB:.2f} GiB, {(total - capacity) / GIB:.2f} more than there are"
    return over + (" (the compiler refused it)" if plan.refused else "")


def describe(plan: Plan) -> str:
    """A plan as lines of text."""
    mesh = ",".join(f"{name}={size}" for name, size in plan.mesh.items())
    lines = [f"{plan.topology}: {plan.devices} devices, mesh {mesh}; {plan.tokens:,} tokens a step", ""]
    lines += [f"  {name:<13}{gib(size):>12}" for name, size in parts(plan).items()]
    if 0 < plan.memory.alive < plan.memory.temporaries:
        lines[-3] += f"   reserved, of which {gib(plan.memory.alive)} live at once"
    lines += [f"  {'total':<13}{gib(plan.memory.total):>12}   a device; {verdict(plan)}"]
    if plan.memory.host:
        lines.append(f"  {'on the host':<13}{gib(plan.memory.host):>12}   for each device")
    if plan.largest:
        where = f", of the same step on {plan.seen_on}" if plan.seen_on else ""
        lines += ["", f"  the largest buffers at the peak{where}:"]
        for each in plan.largest:
            times = f"{each.count} x " if each.count > 1 else ""
            size = gib(each.bytes * each.count)
            lines.append(f"  {size:>12}  {times}{each.shape}  {_short(each.source)}  {_tail(each.op_name)}")
    if not plan.refused:
        lines += ["", *_work(plan)]
    lines += ["", f"  compiled in {plan.compile_seconds:.0f} s with {gib(plan.host_bytes)} of this machine's memory"]
    return "\n".join(lines)


def _work(plan: Plan) -> list[str]:
    lines = [f"  products      {plan.flops / 1e12:,.4g} TFLOP a device"]
    if plan.model_flops is not None:
        useful = plan.model_flops / (plan.flops * plan.devices)
        lines[0] += f", {useful:.0%} of them the model's own (the rest is computed again)"
    lines.append(f"  memory        {gib(plan.hbm_bytes)} read and written")
    told = [each for each in plan.collectives if each.bytes]
    lines += [f"  {e.kind:<22}over {e.axes:<12}{e.count:>7,} of{gib(e.bytes):>12} in all" for e in told]
    if plan.adapter_share is not None:
        lines.append(f"  of what is sent, the adapter causes {plan.adapter_share:.2%}")
    if plan.chip is not None and plan.seconds is not None:
        floor = ", ".join(f"{name} {1000 * seconds:,.0f} ms" for name, seconds in plan.floor.items())
        lines.append(f"  a step takes at least {1000 * plan.seconds:,.0f} ms ({floor}), "
                     f"{plan.tokens / plan.seconds:,.0f} tokens/s")  # fmt: skip
        if (dollars := dollars_per_million(plan)) is not None:
            lines.append(
                f"  a million tokens cost at least ${dollars:.3f}, at ${plan.chip.usd_per_chip_hour:.2f} a chip-hour"
            )
    return lines


def dollars_per_million(plan: Plan, price: float | None = None) -> float | None:
    """Dollars that a million tokens cost at least, at a price of a chip-hour; None is its list price."""
    price = price if price is not None or plan.chip is None else plan.chip.usd_per_chip_hour
    seconds = plan.chip_seconds_per_token()
    return None if price is None or seconds is None else 1e6 * seconds * price / 3600


def _short(source: str) -> str:
    """A path from the package on, or from here."""
    path, _, line = source.rpartition(":")
    if not path:
        return source
    if (at := path.find("site-packages/")) >= 0:
        return f"{path[at + len('site-packages/') :]}:{line}"
    own = str(Path(__file__).parents[2]) + os.sep
    return f"{path.removeprefix(own).removeprefix(os.getcwd() + os.sep)}:{line}"


def _tail(op_name: str) -> str:
    """The end of a name, where what it is stands."""
    steps = [step for step in op_name.split("/") if step not in ("while", "body", "closed_call", "checkpoint")]
    return "/".join(steps[-4:])
