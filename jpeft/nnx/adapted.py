"""Subclasses of a model's own classes, which the modules of a copy of the model get: their calls and reads are changed.

A graphdef records the class and the static attributes of each module. So ``nnx.jit``, ``nnx.scan``, ``nnx.vmap``,
``nnx.remat``, splitting and merging inside the model, and ``jax.lax.scan`` over a state carry the change along.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from abc import ABCMeta
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

# How a subclass runs a method of its module: (module, the method as the original class has it, its name, args, kwargs)
Run = Callable[[Any, Callable[..., Any], str, tuple[Any, ...], dict[str, Any]], Any]
Read = Callable[[Any, str], Any]  # (module, name) -> what the module reads as its attribute

_ORIGINAL: dict[type, tuple[type, tuple[Any, ...]]] = {}


def original(cls: type) -> type:
    """The class that a class was made from by `subclass`, or the class itself."""
    return _ORIGINAL[cls][0] if cls in _ORIGINAL else cls


@functools.cache  # a class is registered with JAX for good
def subclass(cls: type, run: Run, methods: tuple[str, ...], read: Read, attributes: tuple[str, ...]) -> type:
    """A subclass of a module's class with some methods and attributes replaced.

    Args:
      cls: the class.
      run: runs the methods.
      methods: names of the methods.
      read: computes what the module reads as the attributes.
      attributes: names of the attributes.
    """
    body: dict[str, Any] = {name: _method(cls, name, run) for name in methods}
    body |= {name: _attribute(name, read) for name in attributes}
    body |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce__": _reduce,
        "_graph_node_set_key": _set_key,
        "_pytree__is_pytree": cls._pytree__is_pytree,  # type: ignore[attr-defined]
        "_pytree__nodes": cls._pytree__nodes,  # type: ignore[attr-defined]
    }
    if not hasattr(cls, "set_view"):
        body["set_view"] = _set_view
    # Past a metaclass's __new__: neither that nor __init_subclass__ is to see a class that the user did not write.
    new = ABCMeta.__new__(_metaclass(type(cls)), cls.__name__, (cls,), body)
    _ORIGINAL[new] = cls, (run, methods, read, attributes)
    return new


class _Unseen:
    """Keeps a class from the ``__init_subclass__`` of the user's classes, which may want arguments or keep a registry.

    It stands in the order of resolution alone. As a base, it could give the class another layout than the user's, and a
    module could not get it.
    """

    def __init_subclass__(cls: Any) -> None:
        register = inspect.getattr_static(nnx.Pytree, "__init_subclass__").__func__
        register(cls, pytree=cls._pytree__is_pytree)


@functools.cache
def _metaclass(kind: type) -> Any:
    """A metaclass like another, whose classes are pickled by what they were made from."""

    def mro(cls: type) -> list[type]:
        first, *rest = type.mro(cls)
        return [first, _Unseen, *rest]

    new = type(kind.__name__, (kind,), {"__module__": kind.__module__, "mro": mro})
    copyreg.pickle(new, lambda cls: (subclass, (_ORIGINAL[cls][0], *_ORIGINAL[cls][1])))  # type: ignore[arg-type]
    return new


def _reduce(self: Any) -> Any:
    cls, key = _ORIGINAL[type(self)]
    return _empty, (cls, *key), self.__getstate__()


def _empty(cls: type, *key: Any) -> Any:
    return object.__new__(subclass(cls, *key))


def _set_key(self: Any, key: Any, value: Any) -> None:
    """Sets an attribute as ``nnx.update`` asks: a Variable is updated itself, not the one that a property returns."""
    variable = vars(self).get(str(key))
    if isinstance(variable, nnx.Variable) and isinstance(value, nnx.Variable):
        variable.update_from_state(value)
    else:
        original(type(self))._graph_node_set_key(self, key, value)  # type: ignore[attr-defined]


def _set_view(self: Any, deterministic: bool | None = None) -> None:
    """Sets the mode of an adapter's dropout, as ``nnx.view`` asks."""
    if deterministic is not None and "deterministic" in vars(self):
        vars(self)["deterministic"] = deterministic


def _method(cls: type, name: str, run: Run) -> Any:
    plain = inspect.getattr_static(cls, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, plain.__get__(self, type(self)), name, args, kwargs)

    return functools.wraps(plain)(method) if hasattr(plain, "__name__") else method


def _attribute(name: str, read: Read) -> property:
    def write(self: Any, value: Any) -> None:
        vars(self)[name] = value

    return property(lambda self: read(self, name), write)


def methods_of(cls: type) -> Iterator[str]:
    """Names of the methods that a class has beside those of every NNX module: public ones and ``__call__``."""
    for name in dir(cls):
        if name != "__call__" and (name.startswith("_") or hasattr(nnx.Module, name)):
            continue
        plain = inspect.getattr_static(cls, name, None)
        is_bound = not isinstance(plain, (staticmethod, classmethod, property, type))
        if is_bound and callable(plain) and hasattr(plain, "__get__") and not isinstance(plain, nnx.Variable):
            yield name
