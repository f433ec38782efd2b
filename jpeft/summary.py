"""What a bound method trains, as a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from jpeft.tree import join

if TYPE_CHECKING:
    from jpeft.peft import Peft


def summary(peft: Peft) -> str:
    """A line a site: path, owner, shape, rank, parameters, bytes, path taken; then totals."""
    rows = [("site", "owner", "weight", "rank", "parameters", "bytes", "method", "via")]
    sizes = {path: (math.prod(shape), np.dtype(dtype).itemsize) for path, (shape, dtype) in peft.structure}
    for action in peft.actions:
        site = action.site
        own = [sizes[action.leaf_path(n)] for n in action.stored]
        weight = "×".join(map(str, site.stored)) or (str(site.outputs or "×".join(map(str, site.heads))))
        n, size = sum(n for n, _ in own), sum(n * b for n, b in own)
        rank = str(getattr(action.method, "rank", ""))
        rows.append((site.name, site.owner, weight, rank, f"{n:,}", f"{size:,}", action.method.name, site.via))
    for path in peft.shared_paths:
        n, b = sizes[path]
        rows.append((join(path), "shared", "", "", f"{n:,}", f"{n * b:,}", "", ""))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    right = {3, 4, 5}
    lines = ["  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
             for r in rows]  # fmt: skip
    lines.insert(1, "  ".join("-" * w for w in widths))
    trainable = sum(sizes[p][0] for p, _ in peft.structure if p not in peft.fixed_paths)
    fixed = sum(sizes[p][0] for p in peft.fixed_paths)
    stored = sum(n * b for n, b in sizes.values())
    lines.append("")
    lines.append(
        f"{len(peft.actions)} sites; {trainable:,} trainable of {peft.base_size:,} base parameters "
        f"({100 * trainable / max(1, peft.base_size):.3f} %){f', {fixed:,} fixed' if fixed else ''}; "
        f"adapter {stored:,} bytes"
    )
    return "\n".join(line.rstrip() for line in lines)
