"""The first floating array of a call's inputs or outputs, which modules nest in tuples, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Keys = tuple[Any, ...]  # the keys of nested containers, outermost first


def first_array(value: Any, *, floating: bool = True) -> Any:
    """The first array of one or more axes, the least nested one; None without one.

    Args:
      value: an array, or tuples, lists, mappings and dataclasses of them.
      floating: whether it must be of a floating dtype.

    >>> first_array(({"key": np.ones((2, 3))}, np.zeros(4))).shape
    (4,)
    """
    found = _find(value, floating)
    return None if found is None else found[1]


def replace_first(value: Any, array: Any) -> Any:
    """A value with another array in place of its first floating one. Containers around others stay the same objects.

    >>> replace_first(({"key": np.ones(2)}, np.zeros(1)), 7)
    ({'key': array([1., 1.])}, 7)
    """
    found = _find(value, True)
    assert found is not None
    return _replaced(value, found[0], array)


def _find(value: Any, floating: bool) -> tuple[Keys, Any] | None:
    level: list[tuple[Keys, Any]] = [((), value)]
    while level:
        for keys, item in level:
            if _is_array(item, floating):
                return keys, item
        level = [((*keys, key), child) for keys, item in level for key, child in _children(item)]
    return None


def _is_array(value: Any, floating: bool) -> bool:
    if not isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct) or not value.shape:
        return False
    return not floating or jnp.issubdtype(value.dtype, jnp.floating)


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not jax.tree_util.all_leaves([value]):  # modules are leaves
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def _replaced(value: Any, keys: Keys, array: Any) -> Any:
    if not keys:
        return array
    key, *rest = keys
    if isinstance(value, Mapping):
        items = {**value, key: _replaced(value[key], tuple(rest), array)}
        # transformers' outputs are dataclasses that are mappings too
        return type(value)(**items) if dataclasses.is_dataclass(value) else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple | list):
        children = [_replaced(child, tuple(rest), array) if i == key else child for i, child in enumerate(value)]
        return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)
    return dataclasses.replace(value, **{key: _replaced(getattr(value, key), tuple(rest), array)})
