"""An array added to the output of a model's first embedding, to differentiate by without an adapter."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.nnx.adapted import methods_of, subclass
from jpeft.nnx.state import become, modules, variables


@dataclass
class _Shift:
    shift: Any
    found: list[Any]
    done: list[bool] = field(default_factory=list)


_shift: contextvars.ContextVar[_Shift | None] = contextvars.ContextVar("shift", default=None)


@contextlib.contextmanager
def shift_embedding(shift: Any, found: list[Any]) -> Iterator[None]:
    """A context in which the first lookup of a model that `with_shift` has changed has ``shift`` added to its output.

    Args:
      shift: an array like that output; None adds nothing.
      found: gets the output's shape and dtype, once. It stays empty if the model embeds nothing.
    """
    token = _shift.set(_Shift(shift, found))
    try:
        yield
    finally:
        _shift.reset(token)


def with_shift(model: Any) -> Any:
    """A model of one's own, changed in place where this runs in `shift_embedding`.

    A lookup is a call of a module with parameters that turns whole numbers into floating ones with an axis more.
    """
    if _shift.get() is not None:
        for _, module in list(modules(model)):
            if variables(module):
                cls = type(module)
                become(module, subclass(cls, _run, tuple(methods_of(cls)), _read, ()))
    return model


def _read(module: Any, name: str) -> Any:
    return vars(module)[name]


def _run(module: Any, function: Callable[..., Any], method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    y, own = function(*args, **kwargs), _shift.get()
    if own is None or own.done or not any(_is_lookup(x, y) for x in (*args, *kwargs.values())):
        return y
    own.done.append(True)
    own.found.append((y.shape, y.dtype))
    return y if own.shift is None else y + own.shift


def _is_lookup(x: Any, y: Any) -> bool:
    if not (hasattr(x, "dtype") and hasattr(y, "dtype")) or not jnp.issubdtype(x.dtype, jnp.integer):
        return False
    return jnp.issubdtype(y.dtype, jnp.floating) and np.shape(y)[:-1] == np.shape(x) and np.ndim(y) > np.ndim(x)
