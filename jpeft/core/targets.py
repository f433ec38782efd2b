"""The target language: which weights a method acts on, named by the path of their owner.

A target is a regular expression that matches a whole path (``r".*/(query|value)"``), a list of whole paths or of
suffixes at a ``/`` boundary (``["query", "value"]``), ``"all-linear"``, or a callable ``(path, site) -> bool``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jpeft.core.tree import nearest

Targets = str | Sequence[str] | Callable[[str, Any], bool] | None

ALL_LINEAR = "all-linear"


class TargetError(ValueError):
    """A target that names nothing, or names it wrongly. The message lists the nearest paths."""


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression, or a `TargetError` that says where it is malformed."""
    try:
        return re.compile(pattern)
    except re.error as e:
        raise TargetError(f"target {pattern!r} is not a regular expression: {e}") from e


def matches_entry(entry: str, name: str) -> bool:
    """Whether a list entry names this path: the whole of it, or a suffix at a ``/``.

    >>> matches_entry("query", "encoder/layer/0/query"), matches_entry("ery", "encoder/query")
    (True, False)
    """
    return name == entry or name.endswith("/" + entry)


def _names(site: Any) -> tuple[str, ...]:
    return getattr(site, "names", None) or (site.name,)


def _selector(targets: Targets) -> list[tuple[str, Callable[[Any], bool]]]:
    """One named predicate for each entry, so that an entry which matches nothing can be reported."""
    if targets is None:
        return []
    if callable(targets):
        return [(repr(targets), lambda s: bool(targets(s.name, s)))]
    if targets == ALL_LINEAR:
        return [(ALL_LINEAR, lambda s: bool(getattr(s, "linear", False)))]
    if isinstance(targets, str):
        pattern = compile_pattern(targets)
        return [(targets, lambda s: any(pattern.fullmatch(n) for n in _names(s)))]
    if (
        isinstance(targets, Mapping)
        or not isinstance(targets, Iterable)
        or not all(isinstance(t, str) for t in targets)
    ):
        raise TargetError(
            f"targets must be a regular expression, a list of paths, {ALL_LINEAR!r} or a callable "
            f"(path, site) -> bool; got {targets!r}"
        )
    return [(t, lambda s, t=t: any(matches_entry(t, n) for n in _names(s))) for t in targets]


def select(
    candidates: Sequence[Any], targets: Targets, exclude: Targets = None, *, what: str, others: Iterable[str] = ()
) -> list[Any]:
    """The candidates that ``targets`` names and ``exclude`` does not, in their order.

    Args:
      candidates: sites; each has ``name``, optionally ``names`` (other paths it answers to) and ``linear``.
      targets: what to take. exclude: what to leave out; it wins.
      what: the method's name, for messages.
      others: paths that exist in the model but that the method cannot act on, for messages.

    Raises:
      TargetError: an entry that matches nothing, a malformed one, or no target left after ``exclude``.
    """
    chosen: list[Any] = []
    if targets is None or (not callable(targets) and not targets):
        raise TargetError(f"{what} has no targets; give a regular expression, a list of paths, or {ALL_LINEAR!r}")
    for entry, predicate in _selector(targets):
        hits = [s for s in candidates if predicate(s)]
        if not hits:
            raise TargetError(_no_match(entry, candidates, what, list(others)))
        chosen += hits
    # An exclusion that matches nothing is as much a typing error as a target that does: more would train than asked.
    excluded: set[int] = set()
    for entry, predicate in _selector(exclude):
        hits = {id(s) for s in candidates if predicate(s)}
        if not hits:
            raise TargetError(_no_match(entry, candidates, what, list(others), "exclude"))
        excluded |= hits
    taken = {id(s) for s in chosen} - excluded
    if not taken:
        raise TargetError(f"{what}: exclude={exclude!r} leaves nothing of targets={targets!r}")
    return [s for s in candidates if id(s) in taken]


def _no_match(entry: str, candidates: Sequence[Any], what: str, others: list[str], field: str = "target") -> str:
    names = [s.name for s in candidates]
    if not names:
        return f"{what}: {field} {entry!r} matches nothing; the model has nothing that {what} can act on"
    known = [o for o in others if o not in names]
    unusable = []
    if field == "target" and entry != ALL_LINEAR:
        try:
            unusable = [o for o in known if re.fullmatch(entry, o) or matches_entry(entry, o)]
        except re.error:
            unusable = []
    if unusable:
        return f"{what} cannot act on {unusable[0]!r}, which target {entry!r} names{nearest(entry, names)}"
    hint = nearest(re.sub(r"[.*()\\^$?+]", "", entry.split("|")[0]), names) or f"; there are: {', '.join(names[:8])}"
    return f"{what}: {field} {entry!r} matches nothing{hint}"
