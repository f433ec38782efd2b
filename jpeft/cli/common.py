"""Options that every command has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jpeft.errors import UserError
from jpeft.recipes import options
from jpeft.recipes.options import OUTPUT, option
from jpeft.storage import as_path


@dataclass(frozen=True, kw_only=True)
class Common:
    """The base class of a command's options."""

    json: bool = option("print one JSON object to stdout, all else to stderr", OUTPUT, False)
    debug: bool = option("print the traceback of an error", OUTPUT, False)

    def __post_init__(self) -> None:
        options.check(self)


def folder_to_write(out: str) -> Path:
    """The path of a folder that a command is to make. Raises a UserError if there is one.

    >>> folder_to_write("no/folder")
    PosixPath('no/folder')
    """
    path = as_path(out)
    if path.exists():
        raise UserError(f"{out} exists; choose another folder, nothing was written")
    return path
