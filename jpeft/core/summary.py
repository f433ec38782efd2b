"""The table of a bound method's sites and sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jpeft.core.folding import Fold, fold, listed
from jpeft.core.sites import Site
from jpeft.core.targets import Matched
from jpeft.core.tree import Path, join

Leaf = tuple[tuple[int, ...], str]  # shape and dtype
_NAMED = 4  # how many of the weights that were left alone the table names


class Row(NamedTuple):
    """A method at a site.

    Attributes:
      site: the site.
      member: index of the method in its chain.
      columns: the method's own columns, such as ``{"rank": "8"}``.
      leaves: shape and dtype of its leaves there.
    """

    site: Site
    member: int
    columns: Mapping[str, str]
    leaves: tuple[Leaf, ...]


class Member(NamedTuple):
    """A method of a chain, or the only one.

    Attributes:
      name: its name.
      matched: what the entries of its targets matched.
    """

    name: str
    matched: Sequence[Matched]


def summary(
    rows: Sequence[Row],
    members: Sequence[Member],
    shared: Sequence[tuple[Path, Leaf]],
    non_trainable: Iterable[Leaf],
    base_size: int,
    left_alone: Sequence[str] = (),
    expand: bool = False,
) -> str:
    """The table of the sites, what the targets matched, totals, and what was left alone.

    Args:
      rows: the sites.
      members: the methods.
      shared: the leaves that all sites of a method share.
      non_trainable: the leaves, at sites or shared, that never train.
      base_size: number of parameters of the base.
      left_alone: paths of the weights that no method acts on.
      expand: whether each site has a row of its own; else rows that differ in numbers of their path alone are one.
    """
    every = [leaf for row in rows for leaf in row.leaves] + [leaf for _, leaf in shared]
    frozen = _count(non_trainable)
    trainable = _count(every) - frozen
    lines = _table(rows, _labels(members), shared, expand)
    lines += ["", *_matches(members)]
    lines.append(
        f"{_counted(len(rows), 'site')}; {trainable:,} trainable of {base_size:,} base parameters "
        f"({100 * trainable / max(1, base_size):.3f} %){f', {frozen:,} not trainable' if frozen else ''}; "
        f"adapter {_bytes(every):,} bytes"
    )
    if left_alone:
        listing = ", ".join(left_alone) if expand else listed(left_alone, _NAMED)
        number = _counted(len(left_alone), "parameter")
        lines.append(f"left alone: {number} of two or more axes, listed by .left_alone: {listing}")
    return "\n".join(line.rstrip() for line in lines)


def _table(rows: Sequence[Row], labels: Sequence[str], shared: Sequence[tuple[Path, Leaf]], expand: bool) -> list[str]:
    """The lines of the table: site, owner, weight, the methods' own columns, parameters, bytes, method, path taken."""
    own = list(dict.fromkeys(name for row in rows for name in row.columns))
    table = [("site", "owner", "weight", *own, "parameters", "bytes", "method", "via")]
    mixed = len({row.site.dtype for row in rows}) > 1
    words = [(*_weight(row, mixed), *(row.columns.get(name, "") for name in own), labels[row.member]) for row in rows]
    names = [row.site.name for row in rows]
    keys = [(cells, row.site.via, row.leaves) for cells, row in zip(words, rows, strict=True)]
    for found in [Fold(name, (i,)) for i, name in enumerate(names)] if expand else fold(names, keys):
        row, cells = rows[found.members[0]], words[found.members[0]]
        times = f"{len(found.members)} × " if len(found.members) > 1 else ""
        sizes = (f"{times}{_count(row.leaves):,}", f"{times}{_bytes(row.leaves):,}")
        table.append((str(found), *cells[:-1], *sizes, cells[-1], row.site.via))
    for path, leaf in shared:
        blank = ("",) * len(own)
        table.append((join(path), "shared", "", *blank, f"{_count([leaf]):,}", f"{_bytes([leaf]):,}", "", ""))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    numbers = range(3, 5 + len(own))
    lines = []
    for cells in table:
        columns = enumerate(zip(cells, widths, strict=True))
        lines.append("  ".join(c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in columns))
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


def _weight(row: Row, mixed: bool) -> tuple[str, str]:
    """A row's owner and weight, with its dtype if the sites have several."""
    site = row.site
    shape = "×".join(map(str, site.stored)) or (str(site.outputs or "×".join(map(str, site.heads))))
    return site.owner, f"{shape} {site.dtype}" if mixed else shape


def _labels(members: Sequence[Member]) -> list[str]:
    """The members' names; two of one name have numbers too."""
    names = [member.name for member in members]
    again = [names[:i].count(name) + 1 for i, name in enumerate(names)]
    return [f"{name} ({n})" if names.count(name) > 1 else name for name, n in zip(names, again, strict=True)]


def _matches(members: Sequence[Member]) -> list[str]:
    """A line for each member and field: how many sites its entries matched."""
    lines = []
    for label, member in zip(_labels(members), members, strict=True):
        for field in dict.fromkeys(found.field for found in member.matched):
            entries = [f"{x.entry} {_counted(x.sites, 'site')}" for x in member.matched if x.field == field]
            lines.append(f"{f'{label} ' if len(members) > 1 else ''}{field}: {', '.join(entries)}")
    return lines


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _count(leaves: Iterable[Leaf]) -> int:
    return sum(math.prod(shape) for shape, _ in leaves)


def _bytes(leaves: Iterable[Leaf]) -> int:
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in leaves)
