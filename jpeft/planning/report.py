"""A plan in words, and several in a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpeft.planning.result import GIB, dollars_per_million, parts

if TYPE_CHECKING:
    from rich.table import Table

    from jpeft.planning.result import Plan
_COLOURS = {"base": "#4c78a8", "adapter": "#f58518", "optimizer": "#e45756", "state": "#e45756", "batch": "#72b7b2",
            "temporaries": "#eeca3b", "outputs": "#b279a2", "program": "#9d755d"}  # fmt: skip


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
