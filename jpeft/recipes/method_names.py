"""Methods by their names on the command line: one name for each method, made from the class's."""

from __future__ import annotations

from collections.abc import Mapping

from jpeft.checks import nearest
from jpeft.errors import UserError
from jpeft.methods import METHODS
from jpeft.methods.base import Method
from jpeft.methods.train import Train
from jpeft.recipes.spelling import spelled

FULL = "full"  # trains everything: `Train` with the target `.*`


def method_names() -> Mapping[str, type[Method]]:
    """The classes of all methods by name, `register`ed ones among them.

    >>> [name for name in method_names() if name.startswith("b")]
    ['beft', 'bitfit', 'boft', 'bottleneck']
    """
    return {**{_name(kind): kind for kind in METHODS.values()}, FULL: Train}


def method_class(name: str) -> type[Method]:
    """The class of a method by its name.

    >>> method_class("prefix").__name__
    'PrefixTuning'
    """
    names = method_names()
    if spelled(name) not in names:
        raise UserError(
            f"`method` {name}: unknown method{nearest(name, [*names])}; expected one of {', '.join(sorted(names))}"
        )
    return names[spelled(name)]


def name_of(method: Method) -> str:
    """The name of a method. Inverse of `method_class`.

    >>> name_of(Train(".*")), name_of(Train("classifier"))
    ('full', 'train')
    """
    return FULL if isinstance(method, Train) and method.targets == ".*" else _name(type(method))


def _name(kind: type[Method]) -> str:
    return spelled(kind.__name__)
