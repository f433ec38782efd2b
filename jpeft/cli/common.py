"""Options that every command has."""

from __future__ import annotations

from dataclasses import dataclass

from jpeft.recipes import options
from jpeft.recipes.options import OUTPUT, option


@dataclass(frozen=True, kw_only=True)
class Common:
    """The base class of a command's options."""

    json: bool = option("print one JSON object to stdout, all else to stderr", OUTPUT, False)
    debug: bool = option("print the traceback of an error", OUTPUT, False)

    def __post_init__(self) -> None:
        options.check(self)
