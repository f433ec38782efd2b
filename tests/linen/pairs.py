"""Combinations of three axes, for tests whose whole product would take too long."""

import itertools
from collections.abc import Iterable

import pytest


def pairwise(two: Iterable, second: Iterable, third: Iterable) -> list:
    """The product of three axes, the first of two values. By default, each pair of values runs once.

    The rest runs with ``--exhaustive``.
    """
    cases = []
    for (i, a), (j, b), (k, c) in itertools.product(*map(list, map(enumerate, (two, second, third)))):
        marks = [] if (j + k) % 2 == i else [pytest.mark.exhaustive]
        cases.append(pytest.param(a, b, c, marks=marks, id=f"{a}-{b}-{c}"))
    return cases
