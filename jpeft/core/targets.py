"""The target language: which weights a method acts on, named by the paths of their owners.

A target is a regular expression that matches a whole path (``r".*/(query|value)"``), a list of whole paths or of
suffixes at a ``/`` (``["query", "value"]``), ``"all-linear"``, or a callable ``(path, site) -> bool``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jpeft.core.tree import nearest

Targets = str | Sequence[str] | Callable[[str, Any], bool] | None
Predicate = Callable[[Any], bool]

ALL_LINEAR = "all-linear"


class TargetError(ValueError):
    """A target that is malformed or matches nothing. The message lists the nearest paths."""


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A compiled regular expression.

    Raises:
      TargetError: the pattern is malformed.
    """
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise TargetError(f"target {pattern!r} is not a regular expression: {e}") from e


def matches_entry(entry: str, path: str) -> bool:
    """Whether an entry of a list of targets matches a path: all of it, or a suffix at a ``/``.

    >>> matches_entry("query", "encoder/layer/0/query"), matches_entry("ery", "encoder/query")
    (True, False)
    """
    return path == entry or path.endswith("/" + entry)


def matches(targets: Targets, site: Any) -> bool:
    """Whether a target matches a site. None matches no site.

    Args:
      targets: a target in any form.
      site: has ``name`` and, optionally, ``names`` (all paths that it answers to) and ``linear``.

    Raises:
      TargetError: the target is malformed.
    """
    return any(predicate(site) for _, predicate in _predicates(targets))


def select(
    candidates: Sequence[Any], targets: Targets, exclude: Targets = None, *, what: str, others: Iterable[str] = ()
) -> list[Any]:
    """The candidates that ``targets`` matches and ``exclude`` does not, in their order.

    Args:
      candidates: sites, as for `matches`.
      targets: the sites to take.
      exclude: the sites to leave out, even if ``targets`` matches them.
      what: the method's name, for error messages.
      others: paths of the model that the method cannot act on, for error messages.

    Raises:
      TargetError: ``targets`` or ``exclude`` is malformed or has an entry that matches nothing, or ``exclude`` leaves
        no site.
    """
    if targets is None or (not callable(targets) and not targets):
        raise TargetError(f"{what} has no targets; give a regular expression, a list of paths, or {ALL_LINEAR!r}")
    others = list(others)

    def matched(targets: Targets, field: str) -> set[int]:
        found: set[int] = set()
        for entry, predicate in _predicates(targets):
            hits = {i for i, site in enumerate(candidates) if predicate(site)}
            # Also for exclude: a misspelled entry would train more than intended.
            if not hits:
                raise TargetError(
                    _no_match(entry if isinstance(entry, str) else repr(entry), candidates, what, others, field)
                )
            found |= hits
        return found

    chosen = matched(targets, "target") - matched(exclude, "exclude")
    if not chosen:
        raise TargetError(f"{what}: exclude={exclude!r} leaves nothing of targets={targets!r}")
    return [site for i, site in enumerate(candidates) if i in chosen]


class Matched(NamedTuple):
    """An entry of a target, and its matches.

    Attributes:
      field: the field that holds it: "targets", "exclude" or "overrides".
      entry: the entry as text.
      sites: how many sites it matched.
    """

    field: str
    entry: str
    sites: int


def count_matches(candidates: Sequence[Any], targets: Targets, field: str) -> list[Matched]:
    """The number of candidates that each entry of a target matches, whatever other entries match or exclude.

    >>> from types import SimpleNamespace
    >>> count_matches([SimpleNamespace(name=f"layer/{i}/query") for i in range(6)], ["query"], "targets")
    [Matched(field='targets', entry="'query'", sites=6)]
    """
    return [
        Matched(field, _written(entry), sum(map(predicate, candidates))) for entry, predicate in _predicates(targets)
    ]


def _written(entry: Any) -> str:
    """An entry as text: a callable's name, else its ``repr``."""
    return getattr(entry, "__name__", type(entry).__name__) if callable(entry) else repr(entry)


def _predicates(targets: Targets) -> list[tuple[Any, Predicate]]:
    """A predicate of sites for each entry of a target, with the entry."""
    if targets is None:
        return []
    if callable(targets):
        return [(targets, lambda site: bool(targets(site.name, site)))]
    if targets == ALL_LINEAR:
        return [(ALL_LINEAR, lambda site: bool(getattr(site, "linear", False)))]
    if isinstance(targets, str):
        pattern = compile_pattern(targets)
        return [(targets, lambda site: any(pattern.fullmatch(n) for n in _names(site)))]
    is_list = isinstance(targets, Iterable) and not isinstance(targets, Mapping)
    if not is_list or not all(isinstance(entry, str) for entry in targets):
        raise TargetError(
            f"a target must be a regular expression, a list of paths, {ALL_LINEAR!r} or a callable "
            f"(path, site) -> bool; got {targets!r}"
        )
    return [(entry, _entry_predicate(entry)) for entry in targets]


def _entry_predicate(entry: str) -> Predicate:
    return lambda site: any(matches_entry(entry, n) for n in _names(site))


def _names(site: Any) -> tuple[str, ...]:
    return getattr(site, "names", None) or (site.name,)


def _no_match(entry: str, candidates: Sequence[Any], what: str, others: list[str], field: str) -> str:
    """The error message for an entry that matches no candidate."""
    names = [site.name for site in candidates]
    if not names:
        return f"{what}: {field} {entry!r} matches nothing; the model has nothing that {what} can act on"
    candidates_hint = f"; candidates: {', '.join(names[:8])}"
    if field == "target" and entry != ALL_LINEAR:
        unusable = _first_match(entry, (o for o in others if o not in names))
        if unusable is not None:
            hint = nearest(entry, names) or candidates_hint
            return f"{what} cannot act on {unusable!r}, which target {entry!r} names{hint}"
    first_option = re.sub(r"[.*()\\^$?+]", "", entry.split("|")[0])
    hint = nearest(first_option, names) or candidates_hint
    if any(matches_entry(entry, name) for name in names):  # a name alone, as one would write it in a list
        hint = f"; a string is a regular expression for whole paths: for names, give [{entry!r}]{hint}"
    return f"{what}: {field} {entry!r} matches nothing{hint}"


def _first_match(entry: str, paths: Iterable[str]) -> str | None:
    """The first path that an entry matches, be it a regular expression or an entry of a list."""
    try:
        return next((path for path in paths if re.fullmatch(entry, path) or matches_entry(entry, path)), None)
    except (re.error, OverflowError, RecursionError):
        return None
