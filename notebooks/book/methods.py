"""A page for each method, and the table of methods, from the classes."""

from __future__ import annotations


def pages() -> dict[str, str]:
    """The pages."""
    return {"methods/index.md": "# Methods\n"}
