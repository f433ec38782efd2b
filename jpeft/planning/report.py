"""A plan in words, and several in a table and a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from jpeft.planning.plan import Plan

GIB = 1 << 30
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_COLOURS = {"base": "#4c78a8", "adapter": "#f58518", "optimiser": "#e45756", "state": "#e45756", "batch": "#72b7b2",
            "temporaries": "#eeca3b", "outputs": "#b279a2", "program": "#9d755d"}  # fmt: skip


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


# ------------------------------------------------------------------------------------------------------------- several


def table(rows: Sequence[tuple[str, Plan]], price: float | None = None) -> Table:
    """Plans by their names, one a row."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    for head in ("", "GiB a device", "of", "fits", "floor ms", "bound by", "tokens/s", "chip-s/M tokens", "$/M tokens"):
        out.add_column(head, justify="left" if head in ("", "bound by") else "right", no_wrap=head == "")
    for name, plan in rows:
        seconds, cost = plan.seconds, dollars_per_million(plan, price)
        chip_seconds = plan.chip_seconds_per_token()
        out.add_row(
            name,
            f"{plan.memory.total / GIB:.2f}",
            "?" if plan.capacity is None else f"{plan.capacity / GIB:.2f}",
            {True: "yes", False: "no", None: "?"}[plan.fits],
            "" if seconds is None else f"{1000 * seconds:,.0f}",
            "" if seconds is None else max(plan.floor, key=lambda key: plan.floor[key]),
            "" if seconds is None else f"{plan.tokens / seconds:,.0f}",
            "" if chip_seconds is None else f"{1e6 * chip_seconds:,.1f}",
            "" if cost is None else f"{cost:.3f}",
        )
    return out


def picture(rows: Sequence[tuple[str, Plan]], path: Path) -> None:
    """Stacked bars of what a device's memory holds, with what there is of it."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.4 * len(rows)), layout="constrained")
    at = [0.0] * len(rows)
    names = [name for name in _COLOURS if any(name in parts(plan) for _, plan in rows)]
    for name in names:
        sizes = [parts(plan).get(name, 0) / GIB for _, plan in rows]
        axes.barh(range(len(rows)), sizes, left=at, color=_COLOURS[name], label=name)
        at = [before + size for before, size in zip(at, sizes, strict=True)]
    for i, (_, plan) in enumerate(rows):
        if plan.capacity is not None:
            axes.plot([plan.capacity / GIB] * 2, [i - 0.45, i + 0.45], color="black", linewidth=2,
                      label="there are" if i == 0 else None)  # fmt: skip
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GiB a device")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.3 / len(rows)), ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def to_json(value: Any) -> Any:
    """What `json.dumps` cannot write by itself."""
    return str(value)
