"""The reference of the command line and of configuration files, from the options that the commands declare."""

from __future__ import annotations

from jpeft.cli import reference

_COMMANDS = """\
# Command line

`jpeft COMMAND`, or `python -m jpeft.cli COMMAND`. Results go to stdout, errors to stderr as one line, with a status
other than zero. `jpeft COMMAND --help` shows the same as this page.
"""
_CONFIGURATION = """\
# Configuration

`jpeft finetune --config FILE` takes a YAML or JSON file of these keys, such as the `config.json` of a run, and
`NAME=VALUE` after it for single ones. An unknown key, or a value of another type, is an error with the nearest name. In
Python the same fields are those of {py:obj}`jpeft.recipes.config.Config`.
"""


def pages() -> dict[str, str]:
    """The two pages."""
    sections = [f"## jpeft {name}\n\n{text.strip()}\n" for name, text in reference.commands().items()]
    return {
        "reference/command_line.md": "\n".join([_COMMANDS, *sections]),
        "reference/configuration.md": f"{_CONFIGURATION}\n{reference.configuration()}",
    }
