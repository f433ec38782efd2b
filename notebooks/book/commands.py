"""The reference of the command line and of configurations, from the parsers."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

_HEAD = """\
# Command line

`jpeft COMMAND`, or `python -m jpeft.cli COMMAND`. Results go to stdout, errors to stderr as one line, with a status
other than zero. `jpeft COMMAND --help` shows the same as this page.
"""


def pages() -> dict[str, str]:
    """The two pages."""
    if importlib.util.find_spec("jpeft.cli.reference"):
        from jpeft.cli import reference

        commands, configuration = reference.commands(), reference.configuration()
    else:
        commands, configuration = dict(_commands()), _configuration()
    sections = [f"## jpeft {name}\n\n{text.strip()}\n" for name, text in commands.items()]
    return {
        "reference/command_line.md": "\n".join([_HEAD, *sections]),
        "reference/configuration.md": configuration,
    }


def _commands() -> Iterator[tuple[str, str]]:
    from jpeft.cli.app import _parser

    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        rows = [_row(action) for action in parser._actions if action.help != argparse.SUPPRESS]
        yield name, "\n".join([parser.description or "", "", "| | |", "| --- | --- |", *rows])


def _row(action: Any) -> str:
    value = " " + (action.metavar or "|".join(action.choices or ()) or action.dest.upper())
    flags = ", ".join(action.option_strings) + (value if action.nargs != 0 else "")
    return f"| `{flags.strip()}` | {(action.help or '').replace('|', chr(92) + '|')} |".replace("%%", "%")


def _configuration() -> str:
    from jpeft.recipes.config import Config

    rows = [f"| `{f.name}` | `{f.type}` |".replace(" | None", " \\| None") for f in dataclasses.fields(Config)]
    return "\n".join(
        ["# Configuration", "", "What a run's result depends on.", "", "| field | type |", "| --- | --- |", *rows, ""]
    )
