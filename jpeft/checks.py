"""Rules for the fields of a configuration: a predicate, and the words for what it accepts.

The caller raises the error, since only it knows the name of the field: "LoRA.rank must be a positive integer, got 0".
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import Any

Rule = tuple[Callable[[Any], bool], str]


def is_int(value: Any) -> bool:
    """Whether a value is an int; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive_int(value: Any) -> bool:
    """Whether a value is an int above 0."""
    return is_int(value) and value > 0


def is_size(value: Any) -> bool:
    """Whether a value can be the size of an axis: an int above 0, and below 2³¹."""
    return is_positive_int(value) and value < 2**31


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number; booleans are not."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that is too large for a float
        return False


def is_rate(value: Any) -> bool:
    """Whether a value is a number in [0, 1)."""
    return is_number(value) and 0 <= value < 1


POSITIVE_INT: Rule = (is_size, "a positive integer")
NUMBER: Rule = (lambda value: is_number(value) and abs(float(value)) < 2.0**128, "a finite number")  # also in float32
NONZERO: Rule = (lambda value: NUMBER[0](value) and value != 0, "a finite number other than 0")
BOOL: Rule = (lambda value: isinstance(value, bool), "true or false")
RATE: Rule = (is_rate, "a rate in [0, 1)")


def is_ids(value: Any) -> bool:
    """Whether a value is a sequence of token ids, one or more."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return False
    return len(value) > 0 and all(is_int(i) and i >= 0 for i in value)


def one_of(names: Collection[str]) -> Rule:
    """The rule that a value is one of some names."""
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


def or_none(rule: Rule) -> Rule:
    """The rule that a value is None or follows another rule."""
    accepts, expected = rule
    return lambda value: value is None or accepts(value), f"{expected} or None"


def shown(value: Any, limit: int = 100) -> str:
    """A value as an error message shows it: its ``repr`` in one line, cut in the middle where it is long.

    >>> shown("a" * 200, 20)
    "'aaaaaaa…aaaaaaaa'"
    """
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except ValueError:  # an int of more digits than Python converts
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= limit else f"{text[: limit // 2 - 2]}…{text[-limit // 2 + 1 :]}"


def nearest(value: Any, names: Collection[str]) -> str:
    """The end of an error message that suggests the name most like a mistyped value, or nothing if none is like it.

    >>> nearest("clasify", ["classify", "chat"]), nearest("x", ["classify", "chat"])
    ("; did you mean 'classify'?", '')
    """
    names = {name.lower(): name for name in names}
    found = difflib.get_close_matches(str(value).lower(), names, n=1)
    return f"; did you mean {names[found[0]]!r}?" if found else ""
