"""The reference of the command line and of configurations."""

from __future__ import annotations


def pages() -> dict[str, str]:
    """The two pages."""
    return {"reference/command_line.md": "# Command line\n", "reference/configuration.md": "# Configuration\n"}
