"""What the pages take from docstrings: first lines, the help of fields, and small repairs for Sphinx."""

from __future__ import annotations

import inspect
import re
from typing import Any

from jpeft.methods import METHODS

_SECTION = re.compile(r"^(Args|Attributes):$")
_ENTRY = re.compile(r"^ {2}(\w[\w, *]*): (.*)$")


def summary(thing: Any) -> str:
    """The first sentence of a docstring, in Markdown.

    >>> import jpeft
    >>> summary(jpeft.LoRA)
    'Low-rank updates of weights.'
    """
    first, _, _ = (inspect.getdoc(thing) or "").partition("\n\n")
    first = " ".join(first.split())
    end = re.search(r"[.:](?= [A-Z]|$)", first)
    return markdown(first[: end.start()] + "." if end else first)


def prose(thing: Any) -> str:
    """The paragraphs of a docstring that are neither sections of fields nor examples.

    >>> import jpeft
    >>> prose(jpeft.BitFit)
    'Trains the leaves called ``bias``.'
    """
    paragraphs = (inspect.getdoc(thing) or "").split("\n\n")
    return "\n\n".join(text for text in paragraphs if not re.match(r"(>>>|\w[\w ]*:\n)", text))


def markdown(text: str) -> str:
    """A docstring's prose with single backticks only.

    >>> markdown("see ``rank`` of `LoRA`")
    'see `rank` of `LoRA`'
    """
    return text.replace("``", "`")


def field_help(cls: type) -> dict[str, str]:
    """What the docstrings of a class, its bases and the methods that they refer to say of each field.

    >>> import jpeft
    >>> field_help(jpeft.LoRA)["rank"][:2], field_help(jpeft.LoRA)["exclude"][:22]
    ('r,', 'the sites to leave out')
    """
    found: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    for base in cls.__mro__:
        for name, text in _entries(vars(base).get("__doc__") or "").items():
            if reference := re.match(r"see (?:\{[\w:]+\})?`[~\w.]*?(\w+)`", text):
                elsewhere.setdefault(name, reference[1])
            else:
                found.setdefault(name, text)
    for name, other in elsewhere.items():
        told = field_help(METHODS[other]) if other in METHODS and METHODS[other] is not cls else {}
        if name not in found and name in told:
            found[name] = told[name]
    return found


def _entries(doc: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in inspect.cleandoc(doc).splitlines():
        if line and not line.startswith(" "):
            inside = bool(_SECTION.match(line))
        elif inside and (entry := _ENTRY.match(line)):
            names = [name.strip("* ") for name in entry[1].split(",")]
            entries |= dict.fromkeys(names, entry[2])
        elif inside and line.strip():
            entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
    return {name: markdown(text) for name, text in entries.items()}


def prepare(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Makes a docstring one that napoleon and reStructuredText render as it is meant."""
    fixed: list[str] = []
    for line in lines:
        if what == "class" and line == "Attributes:":
            line = "Args:"  # the fields of a dataclass are its constructor's parameters
        if entry := re.match(r"\s+[\w, ]*\*[\w, *]*:", line):
            line = entry[0].replace("*", r"\*") + line[entry.end() :]
        line = re.sub(r"(``.+?``|`[^`]+`)(?=(\w?))", lambda m: m[1] + r"\ " * bool(m[2]), line)  # as in `jax.Array`s
        if line.lstrip().startswith("- ") and fixed and fixed[-1].strip() and not _in_list(fixed):
            fixed.append("")
        fixed.append(line)
    lines[:] = fixed


def _in_list(lines: list[str]) -> bool:
    """Whether the last line belongs to an item of a list."""
    for line in reversed(lines):
        if not line.strip() or line.lstrip().startswith("- "):
            return bool(line.strip())
    return False
