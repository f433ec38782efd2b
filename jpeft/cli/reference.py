"""The reference pages of the command line and of configuration files, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from jpeft.cli.app import COMMANDS, classes_of
from jpeft.cli.arguments import default_words, flags, known_options, word_for
from jpeft.recipes.config import Config, Execution
from jpeft.recipes.options import GROUPS, Option


def commands() -> Mapping[str, str]:
    """A page for each command: its summary, and a table of options for each group.

    >>> print(commands()["export"].splitlines()[0])
    Write an adapter as a folder that HuggingFace PEFT or jpeft loads, or that vLLM, SGLang or llama.cpp serves.
    """
    return {name: _command(name) for name in COMMANDS}


def configuration(classes: Sequence[type] = (Config, Execution)) -> str:
    """The keys that a configuration file may have, a table for each group.

    >>> print(configuration().splitlines()[4])
    | `task` | classify, chat | classify | label texts, or answer in conversations |
    """
    return _tables(known_options(classes).values(), lambda entry: entry.name, "key", level=2)


def _command(name: str) -> str:
    known = list(known_options(classes_of(name)).values())
    words = [word_for(entry) for entry in known if entry.positional and entry.required]
    words += [f"[{word_for(entry)}]" for entry in known if entry.positional and not entry.required]
    usage = " ".join(["jpeft", name, *words, "[OPTIONS]"])
    return f"{COMMANDS[name].SUMMARY}\n\n```sh\n{usage}\n```\n\n{_tables(known, _flags, 'option')}"


def _flags(entry: Option) -> str:
    return word_for(entry) if entry.positional else ", ".join(flags(entry))


def _tables(entries: Iterable[Option], name: Callable[[Option], str], title: str, level: int = 3) -> str:
    entries = list(entries)
    parts = []
    for group in GROUPS:
        rows = [_row(entry, name(entry)) for entry in entries if entry.group == group]
        if rows:
            parts.append(
                "\n".join(
                    [f"{'#' * level} {group}", "", f"| {title} | value | default | |", "|---|---|---|---|", *rows]
                )
            )
    return "\n\n".join(parts) + "\n"


def _row(entry: Option, name: str) -> str:
    default = default_words(entry)
    shown = "required" if entry.required else (default or "")
    return f"| `{name}` | {_values(entry)} | {shown} | {entry.sentence} |".replace("{", "\\{")


def _values(entry: Option) -> str:
    if entry.values:
        return ", ".join(entry.values)
    words = {int: "integer", float: "number", bool: "true, false", str: "text", tuple: "texts", dict: "fields by name"}
    return words[entry.type]
