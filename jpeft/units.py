"""Byte counts as text."""

from __future__ import annotations

GIB = 1 << 30

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def format_bytes(size: float) -> str:
    """A byte count in the largest unit of which it makes up a tenth.

    >>> format_bytes(3 * 2**30), format_bytes(2**29), format_bytes(2**20), format_bytes(20), format_bytes(0)
    ('3.00 GiB', '0.50 GiB', '1.00 MiB', '20 B', '0')
    """
    if size < 1:
        return "0"
    value, unit = next(((size / n, unit) for n, unit in _UNITS if size >= 0.1 * n), (size, "B"))
    return f"{value:.2f} {unit}" if value < 100 and unit != "B" else f"{value:,.0f} {unit}"
