"""jpeft.planning.hlo.refusals."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from jpeft.planning.hlo.parse import Buffer


class Refusal(NamedTuple):
    """What a compiler says when memory does not suffice."""

    buffers: tuple[Buffer, ...]  # those that it names, the largest first
    used: int  # bytes that the program would take, arguments included
    available: int  # bytes of a device's main memory that a program may take; 0: not told


# ----------------------------------------------------------------------------------------------------------- refusals

_KEYS = ("op_name", "source_file", "source_line")


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _bytes_of(text: str) -> int:
    found = re.match(r"([\d.]+)\s*([kmgt]?)", text.strip(), re.I)
    return round(float(found[1]) * _UNITS[found[2].lower()]) if found else 0


def refused(message: str) -> Refusal:
    """Reads what a TPU's compiler says when memory does not suffice.

    Newer compilers name no buffers where they see early that memory does not suffice.

    >>> refusal = refused("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.")
    >>> refusal.used / 2**30, refusal.available / 2**30
    (20.5, 15.75)
    """
    sizes = re.search(r"Used ([\d.]+\w?) of ([\d.]+\w?) hbm", message)
    sizes = sizes or re.search(r"required for .*?\(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)", message)
    found: Counter[Buffer] = Counter()
    temporaries = message.split("Largest program arguments")[0]
    for block in re.split(r"\n\s*\d+\. (?=Size: )", temporaries)[1:]:
        name, path, line = (re.search(rf'{key}="?([^"\n]*?)"?(?=[" \n])', block) for key in _KEYS)
        shape = re.search(r"Shape: (\S+)", block)
        source = f"{path[1]}:{line[1] if line else 0}" if path else ""
        stack = (source,) if source else ()
        kind = ("tuple" if shape[1].startswith("(") else shape[1].split("{")[0]) if shape else ""
        found[Buffer(_bytes_of(block[len("Size: ") :]), kind, name[1] if name else "", source, stack=stack)] += 1
    buffers = [buffer._replace(count=count) for buffer, count in found.items()]
    used, available = (_bytes_of(sizes[i]) if sizes else 0 for i in (1, 2))
    return Refusal(tuple(sorted(buffers, key=lambda b: -b.bytes * b.count)), used, available)
