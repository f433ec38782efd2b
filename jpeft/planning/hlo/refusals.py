"""Out-of-memory messages of the TPU compiler."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from jpeft.planning.hlo.liveness import Buffer


class Refusal(NamedTuple):
    """The content of an out-of-memory message.

    Attributes:
      buffers: those that it names, the largest first.
      used: bytes that the program would take, arguments included; 0 if not stated.
      available: bytes of a device's main memory that a program may take; 0 if not stated.
    """

    buffers: tuple[Buffer, ...]
    used: int
    available: int


_SUFFIXES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _read_bytes(text: str) -> int:
    """The number of bytes of `20.5G` or `32.00K`."""
    found = re.match(r"([\d.]+)\s*([kmgt]?)", text.strip(), re.I)
    return round(float(found[1]) * _SUFFIXES[found[2].lower()]) if found else 0


def read_refusal(message: str) -> Refusal:
    """Reads the message with which the TPU compiler rejects a program that does not fit.

    Newer compilers name no buffers if they find early that memory does not suffice.

    >>> refusal = read_refusal("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.")
    >>> refusal.used / 2**30, refusal.available / 2**30
    (20.5, 15.75)
    """
    sizes = re.search(r"Used ([\d.]+\w?) of ([\d.]+\w?) hbm", message)
    sizes = sizes or re.search(r"required for .*?\(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)", message)
    temporaries = message.split("Largest program arguments")[0]
    found = Counter(map(_read_buffer, re.split(r"\n\s*\d+\. (?=Size: )", temporaries)[1:]))
    buffers = [buffer._replace(count=count) for buffer, count in found.items()]
    used, available = (_read_bytes(sizes[i]) if sizes else 0 for i in (1, 2))
    return Refusal(tuple(sorted(buffers, key=lambda b: -b.bytes * b.count)), used, available)


def _read_buffer(block: str) -> Buffer:
    fields = ("op_name", "source_file", "source_line")
    name, path, line = (re.search(rf'{field}="?([^"\n]*?)"?(?=[" \n])', block) for field in fields)
    shape = re.search(r"Shape: (\S+)", block)
    source = f"{path[1]}:{line[1] if line else 0}" if path else ""
    kind = ("tuple" if shape[1].startswith("(") else shape[1].split("{")[0]) if shape else ""
    size = _read_bytes(block[len("Size: ") :])
    return Buffer(size, kind, name[1] if name else "", source, stack=(source,) if source else ())
