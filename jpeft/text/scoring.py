"""Scoring of generated answers to arithmetic problems."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(
    r"((?<![\w)])[-−])?(?:\$([-−])?)?"  # a sign, but not as in `10-3`
    r"((?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?"  # 1,00,000 in India
    r"|(?<![.\w])\.[0-9]+)"
)


def final_number(text: str) -> str | None:
    """The result of a worked answer as a canonical number: the first after the last `####`, else the last one.

    >>> final_number("6 * 3 = 18, so #### $18.00"), final_number("That makes 1,250."), final_number("I do not know")
    ('18', '1250', None)
    """
    _, mark, after_mark = text.rpartition("####")
    found = _NUMBER.search(after_mark) if mark else None
    if found is None:
        for found in _NUMBER.finditer(text):  # noqa: B007 (the last)
            pass
    if found is None:
        return None
    before, after, digits = found.groups()
    number = format(Decimal(digits.replace(",", "")), "f")  # `normalize` would round to 28 digits
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"-{number}" if (before or after) and number != "0" else number
