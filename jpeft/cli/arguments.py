"""The command line of a dataclass of options: flags, types, choices and help, made with cyclopts.

make_command(app, "finetune", "Fine-tune a model.", [Config, Execution])
parse(app, ["finetune", "--rank", "16"], known_options([Config, Execution]))  # {"rank": 16}: what was typed alone
"""

from __future__ import annotations

import inspect
import json
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError

from jpeft.checks import nearest, shown
from jpeft.errors import UserError
from jpeft.recipes.options import GROUPS, TYPES, Option, nearest_option, options


class UsageError(UserError):
    """A command line that cannot be parsed."""


def known_options(classes: Iterable[type]) -> dict[str, Option]:
    """The options of several dataclasses by name.

    >>> from jpeft.recipes.config import Config
    >>> known_options([Config])["lr"].help
    'peak learning rate'
    """
    return {name: entry for cls in classes for name, entry in options(cls).items()}


def flag(entry: Option) -> str:
    """The flag of an option on the command line.

    >>> from jpeft.recipes.config import Config
    >>> flag(options(Config)["batch_size"]), flag(options(Config)["settings"])
    ('--batch-size', '--set')
    """
    return entry.flag or f"--{entry.name.replace('_', '-')}"


def flags(entry: Option) -> list[str]:
    """All flags of an option: its own, its alias, and `--no-NAME` of one that is on by default.

    >>> from jpeft.recipes.config import Config
    >>> flags(options(Config)["packed"]), flags(options(Config)["rank"])
    (['--packing', '--no-packing'], ['--rank'])
    """
    found = [flag(entry), *([entry.alias] if entry.alias else [])]
    return found + ([found[0].replace("--", "--no-", 1)] if entry.type is bool and entry.default else [])


def word_for(entry: Option) -> str:
    """The word for an option in messages and tables: its flag, or the name of an argument without one.

    >>> from jpeft.cli.merge import Options
    >>> word_for(options(Options)["run"]), word_for(options(Options)["force"])
    ('RUN', '--force')
    """
    return (entry.metavar or entry.name.upper()) if entry.positional else flag(entry)


def as_flags(message: str, known: Mapping[str, Option]) -> str:
    """A message of the library with the arguments that it names in backticks turned into flags.

    >>> from jpeft.recipes.config import Config
    >>> as_flags("`accumulate` 3 does not divide `batch_size` 16", options(Config))
    '--accumulate 3 does not divide --batch-size 16'
    """

    def replace(found: re.Match[str]) -> str:
        entry = known.get(found[1])
        return found[0] if entry is None else word_for(entry)

    return re.sub(r"`(\w+)`", replace, message)


def make_command(app: App, name: str, summary: str, classes: Sequence[type], **how: Any) -> None:
    """Adds a command to an app, with the options of some dataclasses; `parse` reads what is typed."""

    def bound(*words: Any, **given: Any) -> None:
        """Never called: `parse` reads what cyclopts binds to its parameters."""

    entries = sorted(known_options(classes).values(), key=lambda entry: not entry.positional)
    bound.__signature__ = inspect.Signature([_parameter(entry) for entry in entries])  # type: ignore[attr-defined]
    app.command(bound, name=name, help=summary, **how)


def _parameter(entry: Option) -> inspect.Parameter:
    details: dict[str, Any] = {
        "help": entry.sentence,
        "group": Group(entry.group, sort_key=GROUPS.index(entry.group)),
        "required": entry.required,
        "show_default": _shown_default(entry),
        "metavar": entry.metavar,
        "converter": _whole if entry.type is int else None,
        "allow_repeating": None if entry.type in (tuple, dict) else True,  # the last one wins
    }
    if entry.choices is not None:
        details["choices"] = entry.values
    if entry.positional:
        return _positional(entry, {**details, "name": word_for(entry)})
    details |= {"name": flag(entry), "alias": entry.alias or ()}
    if entry.type is not bool or not entry.default:  # --no-NAME is for what is on by default
        details["negative"] = ()
    is_list = entry.type in (tuple, dict)
    hint = Annotated[_or_absent(entry, list[str] if is_list else entry.type), Parameter(**details)]
    return inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, **_absent(entry))


def _whole(hint: Any, tokens: Sequence[Any]) -> int:
    return int(tokens[0].value)  # cyclopts would round 2.5


def _positional(entry: Option, details: Mapping[str, Any]) -> inspect.Parameter:
    if entry.type is tuple:
        hint = Annotated[str, Parameter(**details)]
        return inspect.Parameter(entry.name, inspect.Parameter.VAR_POSITIONAL, annotation=hint)
    hint = Annotated[_or_absent(entry, entry.type), Parameter(**details)]
    return inspect.Parameter(entry.name, inspect.Parameter.POSITIONAL_ONLY, annotation=hint, **_absent(entry))


def _absent(entry: Option) -> dict[str, None]:
    """The default of a parameter for cyclopts: what is not typed is not in its result."""
    return {} if entry.required else {"default": None}


def _or_absent(entry: Option, hint: Any) -> Any:
    """The type of a parameter, with that of `_absent`: where pydantic is imported, cyclopts checks defaults by it."""
    return hint if entry.required else hint | None


def _shown_default(entry: Option) -> str | bool:
    if entry.type is bool:
        return flag(entry) if entry.default else False
    return False if entry.required else default_words(entry)


def default_words(entry: Option) -> str | bool:
    """The words for an option's default in the help; False for none."""
    if entry.shown is not None:
        return entry.shown
    values = list(dict.fromkeys(map(str, entry.by_task.values())))
    if len(values) > 1:
        first, *others = entry.by_task.items()
        return "; ".join([str(first[1]), *(f"{value} with --task {task}" for task, value in others)])
    if entry.type is bool:
        return str(entry.default).lower()
    return False if entry.default in (None, (), {}) else str(entry.default)


# ------------------------------------------------------------------------------------------------------------ parsing


def parse(app: App, tokens: Sequence[str], known: Mapping[str, Option]) -> dict[str, Any]:
    """The options that a command line gives, by name.

    Args:
        app: the app, with the command.
        tokens: the command and its arguments.
        known: the options of the command.

    Raises:
        UsageError: they cannot be parsed.
    """
    given = _bound(app, tokens, known)
    words = given.pop("overrides", ())
    if isinstance(given.get("sweep"), list | tuple):  # rank=8,16 after --sweep lr=1e-4,1e-3 has several values too
        lists = [word for word in words if _is_list(word, known)]
        given["sweep"], words = [*given["sweep"], *lists], [word for word in words if word not in lists]
    if words:
        named = _bound(app, [tokens[0], *(_as_flag(word, known) for word in words)], known)
        given |= {
            name: {**given.get(name, {}), **value} if isinstance(value, dict) else value
            for name, value in named.items()
        }
    return given


def _is_list(word: str, known: Mapping[str, Option]) -> bool:
    """Whether a word gives several values to an option that has one, a number or a name."""
    name, _, value = word.partition("=")
    entry = known.get(name)
    return "," in value and entry is not None and (entry.type in (int, float) or entry.choices is not None)


def _bound(app: App, tokens: Sequence[str], known: Mapping[str, Option]) -> dict[str, Any]:
    named, others = _arranged(tokens[1:], known)
    try:
        _, bound, _ = app.parse_args([tokens[0], *named, "--", *others], exit_on_error=False, print_error=False)
    except UnusedCliTokensError as error:
        raise UsageError(f"unexpected argument {(error.unused_tokens or tokens[-1:])[0]!r}") from error
    except CycloptsError as error:
        raise UsageError(_explain(error, known)) from error
    given = dict(bound.arguments)
    for name, entry in known.items():
        if name in given and entry.type is dict:
            given[name] = dict(map(name_value, given[name]))
    return given


def _explain(error: CycloptsError, known: Mapping[str, Option]) -> str:
    """An error of cyclopts in the words that a configuration file's have."""
    if error.argument is None:
        return str(error)
    entry, token = known[error.argument.field_info.name], getattr(error, "token", None)
    if token is None:
        return f"{word_for(entry)} is missing: {entry.help}"
    value, name = token.value, token.keyword or word_for(entry)
    return f"{name} must be {_expected(entry)}, got {shown(value)}{nearest(value, entry.values)}"


def _expected(entry: Option) -> str:
    return f"one of {', '.join(entry.values)}" if entry.values else TYPES[entry.type][1]


# A word that can only be a flag. Others that begin with a dash are texts, such as "- a list" or "-1 + 2".
_FLAG = re.compile(r"--[A-Za-z][\w-]*(=.*)?", re.DOTALL)
_LETTER = re.compile(r"-[A-Za-z]\S*")


def _arranged(words: Sequence[str], known: Mapping[str, Option]) -> tuple[list[str], list[str]]:
    """The words of a command line: flags, each in one word with its value, and arguments without a flag.

    Raises:
        UsageError: a flag is unknown, or has no value.
    """
    entries = _by_flag(known)
    named, others, rest = [], [], deque(words)
    while rest:
        word = rest.popleft()
        name, sign, _ = word.partition("=")
        if word == "--":
            others += rest
            break
        if not (_FLAG.fullmatch(word) or _LETTER.fullmatch(word)):
            others.append(word)
            continue
        entry = entries.get(name.replace("_", "-"))
        if entry is None:
            hint = "" if name.startswith("--") else "; a text that begins with a dash stands after --"
            raise UsageError(f"unknown option {name}{nearest(name, entries) or hint}")
        if not sign and entry.type is not bool:
            word = f"{name}={_value(name, entry, rest, known)}"
        if entry.choices is not None:
            word = f"{name}={entry.spelled(word.partition('=')[2])}"
        named.append(word)
    return named, others


def _by_flag(known: Mapping[str, Option]) -> dict[str, Option]:
    """The options by their flags."""
    return {name: entry for entry in known.values() if not entry.positional for name in flags(entry)}


def _value(name: str, entry: Option, rest: deque[str], known: Mapping[str, Option]) -> str:
    """The value of a flag, from the next word, or the one that it implies."""
    if rest and rest[0] != "--" and not _FLAG.fullmatch(rest[0]):
        is_named = "=" in rest[0] and rest[0].partition("=")[0].partition(".")[0] in known
        if entry.implied is None or not is_named:
            return rest.popleft()
    if entry.implied is None:
        raise UsageError(f"{name} has no value; expected {entry.metavar or _expected(entry)}")
    return entry.implied


def _as_flag(word: str, known: Mapping[str, Option]) -> str:
    """`--name=value` for `name=value`; `--set=field=value` for `settings.field=value`."""
    name, sign, value = word.partition("=")
    name, dot, field = name.partition(".")
    entry = known.get(name)
    if not sign:
        raise UsageError(f"unexpected argument {word!r}; options are --NAME VALUE or NAME=VALUE")
    if entry is None or entry.positional:
        raise UsageError(f"{word}: no option is called {name!r}{nearest_option(name, known)}")
    if entry.type is dict and not field:
        raise UsageError(f"{word}: expected {name}.NAME=VALUE")
    if dot and entry.type is not dict:
        raise UsageError(f"{word}: {name!r} has no fields; expected {name}=VALUE")
    return f"{flag(entry)}={field}={value}" if dot else f"{flag(entry)}={value}"


def name_value(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE, where VALUE is JSON or else a string.

    >>> name_value("length=32"), name_value("word=a b")
    (('length', 32), ('word', 'a b'))
    """
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise UsageError(f"--set {text}: expected NAME=VALUE")
    return name, parse_value(value)


def parse_value(text: str) -> Any:
    """The value of a text that is JSON, else the text itself.

    >>> parse_value("true"), parse_value("word")
    (True, 'word')
    """
    try:
        return json.loads(text)
    except ValueError:
        return text
