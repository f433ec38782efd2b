"""Options: the typed fields of a dataclass, each stated once with its help text.

    @dataclass(frozen=True)
    class Shape:
        rank: int = option("rank of the update", METHOD, 8, rule=POSITIVE_INT)

The command line, the check of values, configuration files and the reference page are made from these fields.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jpeft.checks import BOOL, Rule, is_int, is_number, nearest, one_of, shown
from jpeft.errors import UserError

# Groups of options, in the order of the help.
WHAT, METHOD, TRAINING, SAMPLING = "What", "Method", "Training", "Sampling"
MEMORY, MACHINES, OUTPUT = "Memory", "Machines", "Output"
GROUPS = (WHAT, METHOD, TRAINING, SAMPLING, MEMORY, MACHINES, OUTPUT)
_KEY = "option"
_LARGE = 2**53  # integers beyond it are typing errors
# Paths and names; an empty one is an unset variable of a shell.
TEXT: Rule = (lambda value: isinstance(value, str) and bool(value.strip()) and "\0" not in value, "a non-empty text")
ANY_TEXT: Rule = (lambda value: isinstance(value, str), "a text")
# What the values of a type must be.
TYPES: Mapping[Any, Rule] = {
    int: (is_int, "an integer"),
    float: (is_number, "a finite number"),
    bool: BOOL,
    str: TEXT,
    tuple: (
        lambda value: isinstance(value, list | tuple) and all(isinstance(v, str) for v in value),
        "a list of texts",
    ),
    dict: (lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value), "fields by name"),
}


@dataclass(frozen=True)
class Option:
    """A field of an options dataclass.

    Attributes:
        name: the field's name.
        type: its type without None: int, float, str, bool, tuple (of texts), dict, or a Literal.
        default: its default; that of the first task in `by_task`.
        required: whether it has no default.
        nullable: whether None is a value: the default of the method, the data or the task.
        help: one line of help.
        group: the heading it stands under.
        shown: words for a default that depends on other things.
        by_task: its defaults by task, if they differ.
        tasks: the tasks that use it; empty for all.
        rule: what its values must be, if its type does not say it.
        choices: a function that gives the names it may have, if they are found at run time.
        spelled: a function that gives a name as it is among the choices, from another spelling of it.
        names: names with a meaning of their own, of an option that otherwise takes a path.
        path: whether its values are paths, names aside.
        flag: the name on the command line, if it is not made from the field's.
        alias: another name on the command line.
        metavar: the word for its value in the help.
        implied: its value where the flag is given without one.
        positional: whether it is an argument without a flag.
    """

    name: str
    type: Any
    default: Any
    required: bool
    nullable: bool
    help: str
    group: str
    shown: str | None = None
    by_task: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    tasks: tuple[str, ...] = ()
    rule: Rule | None = None
    choices: Callable[[], Collection[str]] | None = None
    spelled: Callable[[str], str] = str.lower
    names: tuple[str, ...] = ()
    path: bool = False
    flag: str | None = None
    alias: str | None = None
    metavar: str | None = None
    implied: str | None = None
    positional: bool = False

    @property
    def sentence(self) -> str:
        """Its help, with the names that it knows."""
        return f"{self.help}. Named: {', '.join(self.names)}" if self.names else self.help

    @property
    def literals(self) -> tuple[str, ...]:
        """The values of a Literal; empty for other types."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    @property
    def values(self) -> tuple[str, ...]:
        """All values that it may have, if they are listed: those of a Literal, or of `choices`."""
        return self.literals if self.choices is None else tuple(sorted(self.choices()))

    @property
    def expected(self) -> Rule:
        """The rule that its values follow."""
        return self.rule or (one_of(self.literals) if self.literals else TYPES[self.type])

    def check(self, value: Any) -> None:
        """Raises a UserError for a value that the option cannot have.

        >>> options(_Example)["rank"].check("8")
        Traceback (most recent call last):
        ...
        jpeft.errors.UserError: `rank` must be an integer, got '8'
        """
        accepts, expected = self.expected
        if (self.nullable and value is None) or accepts(value):
            return
        if self.type is int and not is_int(value):
            expected = "an integer"
        elif self.type is int and value > _LARGE and "2^" not in expected:  # a rule whose words name no limit
            expected = "a smaller integer"
        raise UserError(f"`{self.name}` must be {expected}, got {shown(value)}{nearest(value, self.literals)}")


def option(
    help: str, group: str = WHAT, default: Any = dataclasses.MISSING, *, by_task: Mapping[str, Any] | None = None,
    **more: Any,
) -> Any:  # fmt: skip
    """A field of an options dataclass; `more` are attributes of `Option`.

    Args:
        by_task: defaults by task. The field is None until `fill` gives it that of its task.

    >>> options(_Example)["rank"].help
    'rank of the update'
    """
    if by_task is not None:
        default, more = None, {**more, "by_task": by_task}
    settings = {"help": help, "group": group, **more}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata={_KEY: settings})
    return dataclasses.field(default=default, metadata={_KEY: settings})


def same(cls: type, name: str, **changed: Any) -> Any:
    """A field like one of another options dataclass, but for some attributes, such as its default.

    >>> dataclasses.make_dataclass("Other", [("rank", int, same(_Example, "rank", default=4))])().rank
    4
    """
    field = cls.__dataclass_fields__[name]
    settings = {**field.metadata[_KEY], **changed}
    default = settings.pop("default", None if field.default is dataclasses.MISSING else field.default)
    return option(settings.pop("help"), settings.pop("group"), default, **settings)


@functools.cache
def options(cls: type) -> Mapping[str, Option]:
    """The options of a dataclass by the names of their fields.

    >>> list(options(_Example))
    ['rank', 'name']
    """
    hints = typing.get_type_hints(cls)
    return {field.name: _read(field, hints[field.name]) for field in dataclasses.fields(cls) if _KEY in field.metadata}


def _read(field: dataclasses.Field[Any], hint: Any) -> Option:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # `Literal[…] | None` is the latter
    members = typing.get_args(hint) if is_union else (hint,)
    kind = next(member for member in members if member is not type(None))
    origin = typing.get_origin(kind)
    if origin not in (None, Literal):
        kind = dict if issubclass(origin, Mapping) else tuple
    settings = field.metadata[_KEY]
    by_task = settings.get("by_task") or {}
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = field.default_factory() if callable(field.default_factory) else field.default
    return Option(
        name=field.name,
        type=kind,
        default=next(iter(by_task.values()), None if required else default),
        required=required,
        nullable=type(None) in members,
        **settings,
    )


def nearest_option(name: str, known: Mapping[str, Option]) -> str:
    """The end of an error message that suggests the option most like a mistyped name, or nothing.

    >>> nearest_option("ranc", options(_Example)), nearest_option("x", options(_Example))
    ("; did you mean 'rank'?", '')
    """
    named = {key: entry for key, entry in known.items() if not entry.positional}
    flags = {entry.flag: key for key, entry in named.items() if entry.flag}
    found = flags.get(f"--{name.lstrip('-')}")
    return f"; did you mean {found!r}?" if found else nearest(name, named)


def fill(instance: Any, task: str) -> None:
    """Gives the fields of a new frozen instance that are None the defaults of its task."""
    for name, entry in options(type(instance)).items():
        if getattr(instance, name) is None and task in entry.by_task:
            object.__setattr__(instance, name, entry.by_task[task])


def check(instance: Any) -> None:
    """Raises a UserError for the first field of an instance that its option does not accept.

    >>> check(_Example(rank=0))
    """
    for name, entry in options(type(instance)).items():
        entry.check(getattr(instance, name))


@dataclass(frozen=True)
class _Example:
    rank: int = option("rank of the update", METHOD, 8)
    name: str | None = option("name of the run", OUTPUT, None)
