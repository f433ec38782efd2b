"""The signatures of methods that are called, the classes that define them, and the forms of calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable, Mapping
from typing import Any

import jax

from jpeft.core.tree import is_array


@functools.lru_cache(maxsize=1024)
def signature_of(function: Any) -> inspect.Signature | None:
    """A method's signature, with ``self``; None for a callable without one."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def by_position(function: Any, module: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, with those given by name moved to their position, where geometries and hooks read them."""
    signature = signature_of(getattr(function, "func", function))
    try:
        bound = signature.bind(module, *args, **kwargs) if kwargs and signature is not None else None
    except TypeError:  # wrong arguments: the module itself raises
        bound = None
    return (args, dict(kwargs)) if bound is None else (bound.args[1:], bound.kwargs)


def owner_of(function: Any) -> str:
    """The full name of the class that defines a method. A subclass that overrides the method is another owner."""
    function = getattr(function, "func", function)
    function = getattr(function, "__func__", function)
    return f"{function.__module__}.{function.__qualname__.rsplit('.', 1)[0]}"


def form_of(inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """The places of a call's arrays and its Python values; None if a value is not hashable."""
    flat, treedef = jax.tree.flatten((inputs, dict(kwargs)), is_leaf=lambda x: x is None)
    form = treedef, tuple(None if is_array(x) else (type(x), x) for x in flat)
    try:
        hash(form)
    except TypeError:
        return None
    return form
