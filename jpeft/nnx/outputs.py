"""What is done with the outputs of all module calls: they keep a batch's sharding, and one has an array added."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft.core.frontend import output_map
from jpeft.nnx.adapted import methods_of, subclass
from jpeft.nnx.state import become, modules, put, variables

OUTPUTS = "jpeft_outputs"  # the attribute of a module that holds its `_Outputs`


CAPTURED = "jpeft_captured"  # the same, of its `_Captured`


@dataclass(frozen=True, eq=False)
class _Captured:
    """The outputs of a module's calls."""

    found: list[Any]


@dataclass(eq=False)
class _Shift:
    """An array to add to the output of the first lookup, what that is like, and whether it ran."""

    shift: Any
    found: list[Any]
    done: list[bool] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Outputs:
    """A static attribute, and so part of the key of every cache of traces.

    Attributes:
      function: applied to each array of every output.
      shift: see `shift_embedding`.
    """

    function: Callable[[Any], Any] | None
    shift: _Shift | None


_shift: contextvars.ContextVar[_Shift | None] = contextvars.ContextVar("shift", default=None)


@contextlib.contextmanager
def shift_embedding(shift: Any, found: list[Any]) -> Iterator[None]:
    """A context in which the first lookup of a model has ``shift`` added to its output.

    A lookup is a call of a module with parameters that turns whole numbers into floating ones with an axis more.

    Args:
      shift: an array like that output; None adds nothing.
      found: gets the output's shape and dtype, once. It stays empty if the model embeds nothing.
    """
    token = _shift.set(_Shift(shift, found))
    try:
        yield
    finally:
        _shift.reset(token)


def with_outputs(model: Any) -> Any:
    """A model of one's own, changed in place where something is to be done with its modules' outputs."""
    own = _Outputs(output_map(), _shift.get())
    if own.function is not None or own.shift is not None:
        for _, module in list(modules(model)):
            cls = type(module)
            put(module, OUTPUTS, nnx.static(own))
            become(module, subclass(cls, _run, tuple(methods_of(cls)), _read, ()))
    return model


def captured(module: Any) -> list[Any]:
    """The list to which a module of one's own, changed in place, adds the output of each of its calls."""
    found: list[Any] = []
    put(module, CAPTURED, nnx.static(_Captured(found)))
    become(module, subclass(type(module), _capture, ("__call__",), _read, ()))
    return found


def _capture(module: Any, function: Callable[..., Any], method: str, args: Any, kwargs: Any) -> Any:
    y = function(*args, **kwargs)
    vars(module)[CAPTURED].found.append(y)
    return y


def _read(module: Any, name: str) -> Any:
    return vars(module)[name]


def _run(module: Any, function: Callable[..., Any], method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    y, own = function(*args, **kwargs), vars(module)[OUTPUTS]
    if own.shift is not None and variables(module):
        y = _shifted(own.shift, y, (*args, *kwargs.values()))
    return y if own.function is None else jax.tree.map(own.function, y, is_leaf=_is_of_nnx)


def _is_of_nnx(x: Any) -> bool:
    return isinstance(x, (nnx.Module, nnx.Variable, nnx.State))


def _shifted(own: _Shift, y: Any, inputs: tuple[Any, ...]) -> Any:
    if own.done or not any(_is_lookup(x, y) for x in inputs):
        return y
    own.done.append(True)
    own.found.append((y.shape, y.dtype))
    return y if own.shift is None else y + own.shift


def _is_lookup(x: Any, y: Any) -> bool:
    if not (hasattr(x, "dtype") and hasattr(y, "dtype")) or not jnp.issubdtype(x.dtype, jnp.integer):
        return False
    return jnp.issubdtype(y.dtype, jnp.floating) and np.shape(y)[:-1] == np.shape(x) and np.ndim(y) > np.ndim(x)
