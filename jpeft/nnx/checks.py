"""Checks of what a bound method is given: parameters, other state, a module in their place, keys."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jpeft.checks import shown
from jpeft.core.peft import Peft
from jpeft.core.signatures import signature_of
from jpeft.core.tree import Path, is_array, join, nearest
from jpeft.nnx.state import by_path

Shapes = Mapping[Path, tuple[int, ...]]


def check_parameters(state: Any) -> None:
    """Checks that the parameters of a model are arrays of names of their own. A Param of None is none.

    Raises:
      ValueError: a Param holds something else, or the names of two are the same text.
    """
    names: set[str] = set()
    for path, x in by_path(state).items():
        if x is not None and not hasattr(x, "dtype"):
            raise ValueError(
                f"{join(path)!r} holds {shown(x)}; a nnx.Param must hold one array, or be another Variable"
            )
        if join(path) in names:
            raise ValueError(f"two parameters are called {join(path)!r}: rename a key that has '/' in it")
        names.add(join(path))


def check_leaves(leaves: Mapping[Path, Any], shapes: Shapes, others: Collection[Path] = ()) -> None:
    """Checks that leaves are the parameters of a model.

    Args:
      leaves: the leaves.
      shapes: the shapes of the model's parameters.
      others: paths that may be there too.

    Raises:
      ValueError: a leaf is missing, has another shape, or is none of the model's.
    """
    hint = "; these are variables of Linen: give the tree in 'params'" if any(p[0] == "params" for p in leaves) else ""
    for path, shape in shapes.items():
        if path not in leaves:
            more = hint or nearest(join(path), map(join, leaves))
            raise ValueError(f"params lack {join(path)!r}, which the model has{more}")
        if (found := np.shape(leaves[path])) != shape:
            raise ValueError(f"params have {join(path)!r} of shape {found}, and the model that was bound {shape}")
    for path in leaves:
        if path not in shapes and path not in others:
            known = nearest(join(path), map(join, shapes))
            raise ValueError(f"params have {join(path)!r}, which the model that was bound has not{known}")


def check_classes(found: Mapping[Path, type], bound: Mapping[Path, type]) -> None:
    """Checks that the modules of a model are those that a method was bound to.

    Raises:
      ValueError: one is missing, new, or of another class.
    """
    for path in {**bound, **found}:
        now, then = found.get(path), bound.get(path)
        if now is not then:
            raise ValueError(
                f"this is another model than the method was bound to: {join(path)!r} is {_called(now)}, and was "
                f"{_called(then)}; bind the method again"
            )


def _called(cls: type | None) -> str:
    return f"{cls.__module__}.{cls.__qualname__}" if cls is not None else "no module"


def check_rest(given: Mapping[Path, Any], own: Mapping[Path, Any]) -> None:
    """Checks that other state has the leaves of the model's.

    Raises:
      ValueError: a leaf is missing, or is none of the model's.
    """
    for what, paths in (("lacks", own.keys() - given.keys()), ("has", given.keys() - own.keys())):
        if paths:
            raise ValueError(
                f"rest {what} {join(min(paths))!r}, which the model {'has' if what == 'lacks' else 'has not'} as other "
                "state; give all of nnx.state(model, nnx.Not(nnx.Param))"
            )


def check_usable(leaves: Mapping[Path, Any]) -> None:
    """Checks that arrays are there.

    Raises:
      ValueError: one was donated or deleted.
    """
    for path, x in leaves.items():
        if isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_deleted():
            raise ValueError(
                f"the array of {join(path)!r} was deleted, such as by donating a module of jpeft.nnx.attach, which "
                "shares the arrays of the model: donate nnx.state(tuned, jpeft.nnx.AdapterParam) alone"
            )


def abstract_path(model: nnx.Module) -> Path | None:
    """The first leaf of a model's state that is an abstract array, or None."""
    found = by_path(nnx.state(model))
    return next((path for path, x in found.items() if isinstance(x, jax.ShapeDtypeStruct)), None)


def method_name(model: nnx.Module, method: Any) -> str:
    """The name of a method, which may be given as a function of the model's class.

    Raises:
      ValueError: the model has no such method.
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", "")
    if not name or not callable(getattr(model, name, None)):
        raise ValueError(f"{type(model).__name__} has no method {shown(method)}; give the name of one as method=")
    return name


def takes_rngs(cls: type, method: Any) -> bool:
    """Whether a method of a class has an argument ``rngs`` of its own."""
    signature = signature_of(getattr(cls, method, None) if isinstance(method, str) else method)
    own = signature.parameters.get("rngs") if signature is not None else None
    return own is not None and own.kind is not inspect.Parameter.VAR_KEYWORD


def dropout_key(peft: Peft, rngs: Any) -> Any:
    """The key for an adapter's dropout from ``rngs``: a key, ``{"dropout": key}``, a nnx.Rngs or None.

    Raises:
      TypeError: it is something else.
    """
    if isinstance(rngs, nnx.Rngs):
        return rngs.dropout() if any(action.method.draws for action in peft.actions) else None
    key: Any = rngs.get("dropout") if isinstance(rngs, Mapping) else rngs
    is_typed = is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key is not None and not is_typed and not (is_array(key) and key.dtype == jnp.uint32 and np.ndim(key) == 1):
        raise TypeError(f"rngs must be a nnx.Rngs, a PRNG key or {{'dropout': key}}, got {shown(rngs)}")
    return key
