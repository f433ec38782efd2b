"""Several plans as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jpeft.planning.result import Plan
from jpeft.units import GIB

if TYPE_CHECKING:
    from rich.table import Table

_COLORS = {
    "base": "#4c78a8",
    "adapter": "#f58518",
    "optimizer": "#e45756",
    "state": "#e45756",
    "batch": "#72b7b2",
    "temporaries": "#eeca3b",
    "outputs": "#b279a2",
    "program": "#9d755d",
}


def table(rows: Sequence[tuple[str, Plan]], price: float | None = None) -> Table:
    """Named plans, one per row.

    Args:
        price: dollars per chip-hour; None uses the list price.
    """
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    for head in ("", "GiB/device", "of", "fits", "floor ms", "bound by", "tokens/s", "chip-s/M tokens", "$/M tokens"):
        out.add_column(head, justify="left" if head in ("", "bound by") else "right", no_wrap=head == "")
    for name, plan in rows:
        seconds, cost = plan.seconds, plan.usd_per_million_tokens(price)
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
    """Draws a device's memory as stacked bars, one per plan, with a mark at its capacity."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.4 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    parts = [plan.memory.parts() for _, plan in rows]
    for name, color in _COLORS.items():
        if not any(name in each for each in parts):
            continue
        sizes = [each.get(name, 0) / GIB for each in parts]
        axes.barh(range(len(rows)), sizes, left=left, color=color, label=name)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for i, (_, plan) in enumerate(rows):
        if plan.capacity is not None:
            x, y, label = [plan.capacity / GIB] * 2, [i - 0.45, i + 0.45], "capacity" if i == 0 else None
            axes.plot(x, y, color="black", linewidth=2, label=label)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GiB per device")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.3 / len(rows)), ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
