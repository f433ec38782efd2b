"""The table of a bound method's sites and sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jpeft.core.sites import Site
from jpeft.core.tree import Path, join

Leaf = tuple[tuple[int, ...], str]  # shape and dtype
_NAMED = 4  # how many of the weights that were left alone the table names


class Row(NamedTuple):
    """A line of the table: a method at a site.

    Attributes:
      site: the site.
      method: name of the method.
      columns: the method's own columns, such as ``{"rank": "8"}``.
      leaves: shape and dtype of its leaves there.
    """

    site: Site
    method: str
    columns: Mapping[str, str]
    leaves: Sequence[Leaf]


def summary(
    rows: Sequence[Row],
    shared: Sequence[tuple[Path, Leaf]],
    non_trainable: Iterable[Leaf],
    base_size: int,
    left_alone: Sequence[str] = (),
) -> str:
    """The table: one line per site (path, owner, shape, parameters, bytes, method, path taken), then totals.

    Args:
      rows: the sites.
      shared: the leaves that all sites of a method share.
      non_trainable: the leaves, at sites or shared, that never train.
      base_size: number of parameters of the base.
      left_alone: paths of the weights that no method acts on.
    """
    own = list(dict.fromkeys(name for row in rows for name in row.columns))
    table = [("site", "owner", "weight", *own, "parameters", "bytes", "method", "via")]
    for site, method, values, leaves in rows:
        weight = "×".join(map(str, site.stored)) or (str(site.outputs or "×".join(map(str, site.heads))))
        cells = (site.name, site.owner, weight, *(values.get(name, "") for name in own))
        table.append((*cells, f"{_count(leaves):,}", f"{_bytes(leaves):,}", method, site.via))
    for path, leaf in shared:
        blank = ("",) * len(own)
        table.append((join(path), "shared", "", *blank, f"{_count([leaf]):,}", f"{_bytes([leaf]):,}", "", ""))
    widths = [max(len(r[i]) for r in table) for i in range(len(table[0]))]
    numbers = range(3, 5 + len(own))
    lines = []
    for cells in table:
        columns = enumerate(zip(cells, widths, strict=True))
        lines.append("  ".join(c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in columns))
    lines.insert(1, "  ".join("-" * w for w in widths))
    every = [leaf for row in rows for leaf in row.leaves] + [leaf for _, leaf in shared]
    frozen = _count(non_trainable)
    trainable = _count(every) - frozen
    lines.append("")
    lines.append(
        f"{len(rows)} sites; {trainable:,} trainable of {base_size:,} base parameters "
        f"({100 * trainable / max(1, base_size):.3f} %){f', {frozen:,} not trainable' if frozen else ''}; "
        f"adapter {_bytes(every):,} bytes"
    )
    if left_alone:
        rest = f", and {len(left_alone) - _NAMED} more" if len(left_alone) > _NAMED else ""
        lines.append(
            f"left alone: {len(left_alone)} parameters of two or more axes, listed by .left_alone: "
            f"{', '.join(left_alone[:_NAMED])}{rest}"
        )
    return "\n".join(line.rstrip() for line in lines)


def _count(leaves: Iterable[Leaf]) -> int:
    return sum(math.prod(shape) for shape, _ in leaves)


def _bytes(leaves: Iterable[Leaf]) -> int:
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in leaves)
